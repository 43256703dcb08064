"""Where logs of a training go beside ``log.jsonl``: the experiment trackers that transformers knows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

from trainer.errors import UserError, unknown_name

RUN_ID_FILE = "wandb_run_id.txt"  # in the folder of a training


def check_trackers(names: Sequence[str]) -> None:
    """Checks ``training.report_to``.

    Raises:
        UserError: transformers knows no such tracker, or its package is not installed.
    """
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise unknown_name("tracker in training.report_to", name, INTEGRATION_TO_CALLBACK)
        if name not in get_available_reporting_integrations():
            raise UserError(f"training.report_to: the package of '{name}' is not installed; install it, or take it out")


def prepare_trackers(names: Sequence[str], run: str, output_dir: Path) -> None:
    """Says to trackers that read the environment where logs go; what is set there already stays.

    Args:
        names: ``training.report_to``.
        run: whose trainings belong together.
        output_dir: of one training; one that continues there continues its run in Weights & Biases too.
    """
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(output_dir / "tensorboard"))
    os.environ.setdefault("WANDB_RUN_GROUP", run)
    if "wandb" in names and os.environ.get("RANK", "0") == "0":
        known = output_dir / RUN_ID_FILE
        if not known.exists():
            output_dir.mkdir(parents=True, exist_ok=True)
            known.write_text(uuid4().hex, encoding="utf-8")
        os.environ.setdefault("WANDB_RUN_ID", known.read_text(encoding="utf-8"))
        os.environ.setdefault("WANDB_RESUME", "allow")
