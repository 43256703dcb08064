"""What is read from a config, and what is measured, of the factor and the cap between a head and its loss."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from cotbal_kernels.huggingface.scaling import LogitScaling, configured_scaling, make_probe, measure, poison


class Heads(nn.Module):
    """As much of a transformers model as a config is read for; `inner` has a head of its own."""

    def __init__(self, inner: nn.Module | None = None, **config: Any) -> None:
        super().__init__()
        self.head, self.inner = nn.Linear(2, 3), inner
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(**config))

    def get_output_embeddings(self) -> nn.Module:
        return self.head


class Scaled(Heads):
    def forward(self, logits: Any) -> Any:
        return logits * self.config.logit_scale / self.config.logits_scaling


class Capped(Heads):
    def forward(self, logits: Any) -> Any:
        return logits / self.config.final_logit_softcapping


KEYS = {"logit_scale": 6.0, "logits_scaling": 4.0, "final_logit_softcapping": 30.0}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Scaled(**KEYS), LogitScaling.of(1.5)),
        (Scaled(logits_scaling=4.0), LogitScaling.of(0.25)),
        (Scaled(logit_scale=None, logits_scaling=4.0), LogitScaling.of(0.25)),
        (Capped(**KEYS), LogitScaling.of(1.0, 30.0)),
        (Capped(logit_scale=6.0), LogitScaling.of(1.0)),
        (Capped(final_logit_softcapping=None), LogitScaling.of(1.0)),
        (Heads(**KEYS), LogitScaling.of(1.0)),
        (Capped(inner=Scaled(), **KEYS), LogitScaling.of(1.0, 30.0)),
    ],
)
def test_a_config_counts_as_far_as_the_code_of_this_heads_model_mentions_it(model: Any, expected: LogitScaling) -> None:
    assert configured_scaling(model) == expected


@pytest.mark.parametrize("scale", [0.1, 26**-0.5, 3.0])
def test_a_measured_factor_is_as_exact_as_float32(scale: float) -> None:
    probe = make_probe(97)
    found = measure(probe * scale, probe, "M").scale
    assert found == pytest.approx(scale, rel=2e-7)
    assert found == scale or scale == 26**-0.5  # the number that a config has, not a rounding of it


def test_what_a_guess_does_not_explain_makes_the_loss_nan() -> None:
    probe, guess = make_probe(97), LogitScaling.of(2.0, 30.0)
    exact = guess(probe)
    assert poison(exact, probe, guess, "M") == 0
    assert poison(exact.to(torch.float64) * (1 + 5e-6), probe, guess, "M") == 0  # roundings of the model
    for seen in (exact * (1 + 5e-5), -exact, torch.where(probe == probe[7], -1e38, exact)):
        assert poison(seen, probe, guess, "M").isnan()
    with pytest.raises(ValueError, match=r"makes \(90,\) of logits"):
        poison(exact[:90], probe, guess, "M")
