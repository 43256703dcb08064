"""The training sets of Algorithm 1 against the paper's wording, written out again with plain arithmetic."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Trainer, TrainingArguments

from trainer.data.mixtures import Mixture, mini_size, mini_subset, optimizer_steps, select

ratios = st.floats(0.001, 0.999)
sizes = st.dictionaries(st.text("abcdef", min_size=1, max_size=4), st.integers(1, 400), min_size=2, max_size=5)


def is_rounded_share(size: int, records: int, ratio: float) -> bool:
    """Within half a record of the exact share, in rational numbers; at least one record, at most all."""
    share = records * Fraction(ratio)
    # records * ratio is rounded once to a double: a share within an ulp of x.5 may go either way.
    near = abs(size - share) <= Fraction(1, 2) + share * Fraction(1, 2**52)
    return near if share > 1 else size == 1


@given(st.integers(1, 10**6), ratios)
def test_mini_size_is_the_rounded_share_and_at_least_one(records: int, ratio: float) -> None:
    assert is_rounded_share(mini_size(records, ratio), records, ratio)


def test_mini_sizes_worked_out() -> None:
    # 1/32 as in the paper; 16 / 32 is half a record, and one is the least.
    found = {records: mini_size(records, 1 / 32) for records in (1, 16, 32, 47, 49, 320, 665_298)}
    assert found == {1: 1, 16: 1, 32: 1, 47: 1, 49: 2, 320: 10, 665_298: 20_791}


@given(sizes, ratios, st.integers(0, 10))
def test_every_proxy_sees_the_same_minis(counts: dict[str, int], ratio: float, seed: int) -> None:
    records = {task: [f"{task}-{number}" for number in range(count)] for task, count in counts.items()}
    kinds = [Mixture("mini"), *(Mixture("plus", task) for task in records)]
    sets = [
        {task: select(rows, kind.share(task, ratio), seed, task) for task, rows in records.items()} for kind in kinds
    ]
    minis = sets[0]
    for task, rows in records.items():
        assert is_rounded_share(len(minis[task]), len(rows), ratio)
        assert len(set(minis[task])) == len(minis[task])
        assert minis[task] == [row for row in rows if row in set(minis[task])]  # a subset, in the order of the file
    for kind, chosen in zip(kinds[1:], sets[1:], strict=True):
        assert chosen == {task: rows if task == kind.task else minis[task] for task, rows in records.items()}


@given(st.integers(0, 2**31), st.text("abcdefghij-_.0123", min_size=1, max_size=8))
def test_a_mini_depends_on_seed_and_name_only(seed: int, task: str) -> None:
    rows = list(range(300))
    chosen = mini_subset(rows, 0.25, seed, task)
    assert mini_subset(rows, 0.25, seed, task) == chosen
    assert mini_subset([-row for row in rows], 0.25, seed, task) == [-row for row in chosen]
    # 75 of 300: two draws that agree by chance have probability 1 / C(300, 75), about 1e-72.
    assert mini_subset(rows, 0.25, seed + 1, task) != chosen
    assert mini_subset(rows, 0.25, seed, task + "x") != chosen


def test_a_mini_is_the_same_in_another_process() -> None:
    """Frozen: a run that is continued elsewhere must see the same minis (no use of Python's salted ``hash``)."""
    assert mini_subset(range(20), 0.2, 0, "colour") == [1, 4, 8, 15]


def test_minis_cover_the_whole_task() -> None:
    """Each record is as likely as another: over 400 seeds a quarter is drawn 100 times, sigma sqrt(75) = 8.7."""
    rows = list(range(40))
    drawn = [0] * len(rows)
    for seed in range(400):
        for row in mini_subset(rows, 0.25, seed, "a"):
            drawn[row] += 1
    assert sum(drawn) == 400 * 10
    assert max(abs(count - 100) for count in drawn) < 5 * 8.7


@pytest.mark.parametrize(
    ("mixture", "shares"),
    [
        (Mixture("mini"), {"a": 0.25, "b": 0.25, "chat": 0.25}),
        (Mixture("plus", "a"), {"a": 1.0, "b": 0.25, "chat": 0.25}),
        (Mixture("plus", "b"), {"a": 0.25, "b": 1.0, "chat": 0.25}),
        (Mixture("single", "a"), {"a": 1.0, "b": 0.0, "chat": 0.0}),
        (Mixture("all"), {"a": 1.0, "b": 1.0, "chat": 1.0}),
    ],
)
def test_shares(mixture: Mixture, shares: dict[str, float]) -> None:
    """``chat`` is auxiliary: a mini in the mini mixtures, whole in the full one, in no single-task training."""
    assert {task: mixture.share(task, 0.25) for task in shares} == shares
    rows = list(range(12))
    assert {task: len(select(rows, share, 0, task)) for task, share in shares.items()} == {
        task: {0.0: 0, 0.25: 3, 1.0: 12}[share] for task, share in shares.items()
    }


class _Square(torch.nn.Module):
    """The smallest model that a Trainer accepts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"loss": (self.weight * x).square().mean()}


@pytest.mark.parametrize(
    ("samples", "batch", "epochs", "accumulation"), [(13, 4, 6, 1), (13, 4, 1.5, 3), (8, 4, 2, 1), (3, 4, 0.5, 2)]
)
def test_steps_are_those_that_transformers_makes(
    tmp_path: Path, samples: int, batch: int, epochs: float, accumulation: int
) -> None:
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=batch, num_train_epochs=epochs, report_to=[], save_strategy="no",
        gradient_accumulation_steps=accumulation, use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer = Trainer(_Square(), arguments, train_dataset=[{"x": torch.ones(())}] * samples)
    trainer.train()
    assert trainer.state.global_step == optimizer_steps(samples, batch, epochs, accumulation)
