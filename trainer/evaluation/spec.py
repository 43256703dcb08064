"""What an evaluation is made of: a model folder, sets of records, and how they go through the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from trainer.data.records import RecordError, Records, read_records
from trainer.errors import UserError
from trainer.metrics import takes_losses
from trainer.models.config import ImageConfig


@dataclass(frozen=True)
class EvaluationSet:
    """Records that are scored together.

    Attributes:
        name: ``<name>.jsonl`` gets the predictions; of the task, where tasks are scored.
        files: record files, read one after the other.
        image_root: folder that the records' image paths start from.
        metrics: names; with ``perplexity`` the given answers are scored and nothing is generated. Without any, answers
            are generated only, and records need none of their own.
        max_new_tokens: longest generated answer.
        limit: the first so many records of the files in their order; None is all.
        label: how errors call it; empty is by its name.
        task: whose records they are, where those of a file name several tasks.
        part: which of several sets of the task it is; ``<name>@<part>.jsonl`` then gets the predictions.
    """

    name: str
    files: tuple[Path, ...]
    image_root: Path
    metrics: tuple[str, ...]
    max_new_tokens: int
    limit: int | None = None
    label: str = ""
    part: str = ""
    task: str = ""

    @property
    def key(self) -> str:
        """Its name among the sets of an evaluation."""
        return set_key(self.name, self.part)

    @property
    def title(self) -> str:
        """What errors start with."""
        return self.label or f"set '{self.name}'"

    @property
    def teacher_forced(self) -> bool:
        """Whether losses of the given answers are wanted instead of generated answers.

        Raises:
            UserError: both are.
        """
        kinds = {takes_losses(name) for name in self.metrics}
        if len(kinds) == 2:
            raise UserError(
                f"{self.title}: perplexity scores the given answers, {_others(self.metrics)} generated ones; "
                "evaluate them one after the other, each with a folder of its own"
            )
        return kinds == {True}

    def image_path(self, image: str) -> Path:
        return self.image_root / image

    def load(self) -> Records:
        """The set's records.

        Raises:
            RecordError: a malformed record or an id that two files share, named by file and position.
            UserError: there is no record.
        """
        records = Records()
        origin: dict[str, Path] = {}
        for path in self.files:
            for record in read_records(path, answered=bool(self.metrics), task=self.task):
                if record.id in origin:
                    raise RecordError(f"{path}: id '{record.id}' is already used in {origin[record.id]}")
                origin[record.id] = path
                records.append(record)
        if not records:
            raise UserError(f"{self.title}: {', '.join(map(str, self.files))} has no records")
        return records if self.limit is None else Records(records[: self.limit])


@dataclass(frozen=True)
class EvaluationSpec:
    """An evaluation of one model on some sets.

    Attributes:
        model_path: the model's folder, as ``save_pretrained`` leaves it.
        sets: what it is scored on.
        output_dir: gets ``<set>.jsonl``, ``metrics.json`` and ``manifest.json``; while it runs, ``parts/``.
        batch_size: records that go through the model at once.
        precision: of weights and activations.
        devices: one per rank (process): ``cpu``, ``cuda:0``, ...
        threads: CPU threads of a rank.
        attention: implementation; None is the model's own choice.
        max_length: tokens, longer conversations are cut; for perplexity only, a prompt is never cut.
        features: folder of cached vision features, when the tower takes them.
        images: of the configuration; the model folder of a training has it in its processor.
        by_task: ``metrics.json`` has an entry for every score (:func:`trainer.evaluation.scoring.score_key`), and
            predictions carry that of their set's first metric; otherwise there is one set and the file is
            ``{"metrics": {metric: entry}, "throughput"}``.
        overwrite: replace what another evaluation left in ``output_dir`` instead of refusing it.
    """

    model_path: Path
    sets: tuple[EvaluationSet, ...]
    output_dir: Path
    batch_size: int
    precision: Literal["fp32", "bf16"]
    devices: tuple[str, ...]
    threads: int
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = None
    max_length: int = 2048
    features: Path | None = None
    images: ImageConfig = field(default_factory=ImageConfig)
    by_task: bool = False
    overwrite: bool = False

    @property
    def parts(self) -> Path:
        """Folder of what ranks have finished, while there is work left."""
        return self.output_dir / "parts"

    def predictions(self, chosen: EvaluationSet) -> Path:
        return self.output_dir / f"{chosen.key}.jsonl"


def set_key(name: str, part: str) -> str:
    """The name of a task's set in files: NAME, or NAME@PART for one of several. No name has an "@" of its own."""
    return f"{name}@{part}" if part else name


def _others(metrics: tuple[str, ...]) -> str:
    return ", ".join(name for name in metrics if not takes_losses(name))
