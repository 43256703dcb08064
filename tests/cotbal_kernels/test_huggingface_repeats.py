"""TaskWeightedTrainerMixin on two ranks whose last batch accelerate fills up, against one process that needs not."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from hf_models import one_thread  # noqa: F401
from hf_repeats import EPOCHS, EQUAL, EVALUATED, on_rank
from ranks import run_on_ranks
from test_huggingface_trainer import records

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("two_ranks")
    return run_on_ranks(partial(on_rank, out), 2, out)[0]


@pytest.mark.parametrize("name", EQUAL)
def test_training(name: str, two_ranks: dict[str, Any], tmp_path: Path) -> None:
    """Parameters and logs; two sums of the same numbers in another order."""
    found, expected = two_ranks[name], EQUAL[name](tmp_path)
    assert float((found["parameters"] - expected["parameters"]).abs().max()) <= 1e-6
    assert len(found["logs"]) == len(expected["logs"]) > 0
    for a, b in zip(found["logs"], expected["logs"], strict=True):
        assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.parametrize("name", EVALUATED)
def test_evaluation(name: str, two_ranks: dict[str, Any], tmp_path: Path) -> None:
    found, expected = two_ranks[name], EVALUATED[name](tmp_path)
    if "split" in name:  # Trainer then weights batches with a batch size that is not theirs in its mean of losses
        for metrics in (found["metrics"], expected["metrics"]):
            del metrics["eval_loss"], metrics["test_loss"]
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-5)
    assert torch.allclose(found["sums"], expected["sums"], rtol=1e-5)
    assert torch.equal(found["labels"], expected["labels"])
    assert len(found["labels"]) == 6  # of predict
    tokens = sum(int((record["labels"][1:] != -100).sum()) for record in records(6, seed=2))
    assert found["sums"][1] == tokens


@pytest.mark.parametrize("name", EPOCHS)
def test_an_epoch_has_every_token_once(name: str, two_ranks: dict[str, Any]) -> None:
    tokens = [0, 0, 0]
    for record in records(13):
        tokens[record["loss_task_ids"]] += int((record["labels"][1:] != -100).sum())
    logs = two_ranks[name]["logs"]
    assert [sum(log.get(f"task_tokens/{task}", 0) for log in logs) for task in range(3)] == tokens


def test_samples_that_cannot_be_told_apart_are_refused(two_ranks: dict[str, Any]) -> None:
    message = "labels must have one row for each of the 2 samples of a batch, got 1"
    assert two_ranks["refused"].startswith(message)
    assert "dataloader_drop_last=True" in two_ranks["refused"]
