"""What a model does between its head and its loss: what a config says, what a probe shows, what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loss_problems import FP32, error
from torch import nn

transformers = pytest.importorskip("transformers")

from hf_models import TEXT, assert_same_gradients, batch_for, build, gradients, labels_for, one_thread  # noqa: E402, F401

from cotbal_kernels.huggingface import apply_fused_loss, fused_loss, head, remove_fused_loss  # noqa: E402
from cotbal_kernels.huggingface.scaling import (  # noqa: E402
    LogitScaling,
    configured_scaling,
    make_probe,
    measure,
    poison,
)


class Heads(nn.Module):
    """As much of a transformers model as a config is read for; `inner` has a head of its own."""

    def __init__(self, inner: nn.Module | None = None, **config: Any) -> None:
        super().__init__()
        self.head, self.inner = nn.Linear(2, 97), inner
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(**config))

    def get_output_embeddings(self) -> nn.Module:
        return self.head


class Scaled(Heads):
    def forward(self, logits: Any) -> Any:
        return logits * self.config.logit_scale / self.config.logits_scaling


class Capped(Heads):
    def forward(self, logits: Any) -> Any:
        return logits / self.config.final_logit_softcapping


class Cut(Heads):
    def forward(self, logits: Any) -> Any:
        return logits[..., : self.config.unpadded_vocab_size]


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
        (Cut(unpadded_vocab_size=90, logit_scale=2.0), LogitScaling.of(1.0, columns=90)),
        (Cut(unpadded_vocab_size=97), LogitScaling.of(1.0)),
        (Cut(unpadded_vocab_size=None), LogitScaling.of(1.0)),
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
    assert poison(exact[:90], probe, LogitScaling.of(2.0, 30.0, 90), "M") == 0


class Odd(transformers.LlamaForCausalLM):
    """A model that does something to its logits, its labels or its loss."""

    between: Any = staticmethod(lambda logits: logits)
    relabel: Any = staticmethod(lambda labels: labels)
    repeat = 1

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.between(self.lm_head(hidden))
        loss = None
        if labels is not None:
            for _ in range(self.repeat):
                loss = self.loss_function(logits, self.relabel(labels), self.config.vocab_size, **kwargs)
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


def odd(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    model = Odd(transformers.LlamaConfig(**TEXT))
    for name, value in changes.items():
        setattr(model, name, value)
    return apply_fused_loss(model)


def _suppress(logits: torch.Tensor) -> torch.Tensor:
    logits[..., 7] = torch.finfo(logits.dtype).min  # image tokens of Chameleon
    return logits


@pytest.mark.parametrize(
    ("between", "message"),
    [
        (_suppress, r"turns .* of column 7 into -3\.4"),
        (lambda logits: logits[..., 7:], r"turns 1e-06 into -17\.08"),
        (lambda logits: logits[..., :1], r"makes \(1, 1, 1\) of logits \(1, 1, 97\)"),
        (lambda logits: torch.cat([logits, logits[..., :3]], -1), r"makes \(1, 1, 100\) of logits \(1, 1, 97\)"),
        (lambda logits: logits + 0.5, r"turns -19\.1667 of column 2 into -18\.6667"),
        (lambda logits: -logits, r"turns 1e-06 into -1e-06"),
        (lambda logits: logits * 0, r"turns 1e-06 into 0,"),
        (lambda logits: logits / 0, "turns 1e-06 into inf"),
        (lambda logits: logits * float("nan"), r"turns 1e-06 into nan"),
        (lambda logits: torch.where(logits > 1e5, float("inf"), logits), r"turns 1e\+06 into inf"),
        (lambda logits: torch.where(logits > 1e5, -1.0, logits), r"turns 1e\+06 into -1,"),
        (lambda logits: logits.transpose(1, 2), r"makes \(1, 97, 1\) of logits \(1, 1, 97\)"),
        (lambda logits: logits.repeat(1, 2, 1), r"makes \(1, 2, 97\) of logits \(1, 1, 97\)"),
        (lambda logits: 3 * torch.clamp(logits / 3, -1, 1), r"turns -17.9167 of column 5 into -3,"),
        (lambda logits: logits * torch.linspace(0.9, 1.1, 97), r"turns .* of column 1 into "),
    ],
)
def test_refuses_what_it_cannot_compute_between_head_and_loss(between: Any, message: str) -> None:
    """The mutations that a model may make, each of which the fused loss would get wrong silently."""
    model = odd(between=between)
    batch = batch_for("llama")
    with pytest.raises(ValueError, match=f"Odd cannot be patched.*{message}"):
        model(**batch, labels=labels_for(batch))
    assert model(**batch).logits.shape[0] == 3  # nothing was left behind


@pytest.mark.parametrize("columns", [None, 85])
def test_scaling_is_found_in_the_code_not_in_the_config(columns: int | None) -> None:
    """And so are columns that are cut off, as those with which Inkling pads its vocabulary."""
    model = odd(between=lambda logits: 2.5 * torch.tanh(logits[..., :columns] * 40 / 2.5))
    model.lm_head.bias = nn.Parameter(torch.randn(97, generator=torch.Generator().manual_seed(1)))
    batch = batch_for("llama")
    labels = labels_for(batch)
    out = model(**batch, labels=labels)
    out.loss.backward()
    found = gradients(model)
    scaling = fused_loss(model).scaling
    assert (scaling.scale, scaling.softcap, scaling.columns) == (40.0, 2.5, columns)
    remove_fused_loss(model)
    model.config.vocab_size = columns or 97  # of the logits, for its own loss
    own = model(**batch, labels=labels)
    own.loss.backward()
    assert error(out.loss, own.loss) <= FP32
    assert_same_gradients(found, gradients(model), 1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"relabel": lambda labels: labels.clone().fill_(5)}, "changes its labels"),
        ({"relabel": lambda labels: labels.to("meta")[:, 1:]}, "changes its labels"),
        ({"repeat": 2}, "more than one loss"),
        ({"repeat": 0}, "did not call its loss function"),
    ],
)
def test_refuses_other_labels_and_several_losses(changes: dict[str, Any], message: str) -> None:
    model = odd(**changes)
    batch = batch_for("llama")
    with pytest.raises(ValueError, match=message):
        model(**batch, labels=labels_for(batch))


def test_labels_that_a_model_moves_to_the_device_of_its_logits() -> None:
    batch = batch_for("llama")
    moving, plain = odd(relabel=lambda labels: labels.to("meta")), odd()
    assert torch.equal(*(model(**batch, labels=labels_for(batch)).loss for model in (moving, plain)))


def test_logits_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for the device: no later pass may."""
    model, calls = apply_fused_loss(build("llama")), []
    monkeypatch.setattr(head, "measure", lambda *args: calls.append(args) or measure(*args))
    batch = batch_for("llama")
    for _ in range(3):
        model(**batch, labels=labels_for(batch))
    assert len(calls) == 1


def test_refuses_a_head_that_is_called_twice() -> None:
    model = odd()
    model.between = lambda logits: logits + model.lm_head(torch.zeros(1, 1, 32))
    batch = batch_for("llama")
    with pytest.raises(ValueError, match="calls its head more than once"):
        model(**batch, labels=labels_for(batch))
