"""What experiment trackers are told: where logs go, and which run a training that continues belongs to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trainer.loop.tracking import prepare_trackers


def told(monkeypatch: pytest.MonkeyPatch, names: list[str], folder: Path, rank: int = 0) -> dict[str, str]:
    """The environment that a new training process would have."""
    monkeypatch.setattr(os, "environ", {"RANK": str(rank)})
    prepare_trackers(names, "mine", folder)
    return dict(os.environ)


def test_a_training_that_continues_is_the_same_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first, again, other = (told(monkeypatch, ["wandb"], tmp_path / name) for name in ("a", "a", "b"))
    assert first["WANDB_RUN_ID"] == again["WANDB_RUN_ID"] != other["WANDB_RUN_ID"]
    assert first["WANDB_RESUME"] == "allow"
    assert {item["WANDB_RUN_GROUP"] for item in (first, again, other)} == {"mine"}


def test_what_is_set_stays_and_nothing_is_written_unasked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "environ", {"RANK": "0", "WANDB_RUN_ID": "own", "WANDB_RUN_GROUP": "group"})
    prepare_trackers(["wandb"], "mine", tmp_path)
    assert (os.environ["WANDB_RUN_ID"], os.environ["WANDB_RUN_GROUP"]) == ("own", "group")
    assert "WANDB_RUN_ID" not in told(monkeypatch, ["tensorboard"], tmp_path / "c")
    assert "WANDB_RUN_ID" not in told(monkeypatch, ["wandb"], tmp_path / "d", rank=1)
    assert not (tmp_path / "c").exists()
    assert not (tmp_path / "d").exists()
