"""From samples to files: LLaVA conversation records and PNG images, written atomically."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image

from trainer.data.built_in import charts, chat, covers, easy_vqa
from trainer.data.built_in.catalogue import BUILT_IN_TASKS, SPLITS, BuiltInTask, Sizes, Split, TaskInfo
from trainer.data.built_in.material import check_material
from trainer.data.built_in.samples import Exchange, Sample, generator
from trainer.data.built_in.scene_tasks import SceneTask
from trainer.errors import UserError

MOST_EXCHANGES = 9  # "fewer than 10 turns", section 4.1 of the paper
Progress = Callable[[str, int, int], None]  # task, records written, records in all
SamplesOf = Callable[[Split, int], Iterator[Sample]]


def write_built_in_tasks(
    directory: Path, *, seed: int = 0, sizes: Sizes | None = None, progress: Progress | None = None
) -> dict[str, BuiltInTask]:
    """Write every built-in task under ``directory`` and say where it lies, in the order of the task table.

    ``directory/<task>/{train,validation,test}.jsonl`` and ``directory/<task>/images/*.png``; image paths in
    the records are relative to ``directory``. The same seed and sizes give the same bytes. A task's folder
    appears complete or not at all; one that exists is replaced.

    Raises MissingPackageError when a wheel is not installed, UserError when more is asked than there is.
    """
    check_material()
    sizes = sizes or Sizes()
    directory.mkdir(parents=True, exist_ok=True)
    return {info.name: _write_task(directory, info, seed, sizes, progress) for info in BUILT_IN_TASKS}


def _samples_of(task: str, seed: int) -> SamplesOf:
    if task == "charts":
        return charts.Charts(seed).samples
    modules = {"easy_vqa": easy_vqa.samples, "film_covers": covers.samples, "chat": chat.samples}
    if task in modules:
        return lambda split, count: modules[task](seed, split, count)
    return SceneTask(task, seed).samples


def _write_task(directory: Path, info: TaskInfo, seed: int, sizes: Sizes, progress: Progress | None) -> BuiltInTask:
    counts: dict[Split, int] = {split: sizes.of(info.name, split) for split in SPLITS}
    files = write_folder(directory, info, seed, counts, _samples_of(info.name, seed), progress)
    return BuiltInTask(info, directory, files["train"], files["validation"], files["test"], counts)


def write_folder(
    directory: Path,
    info: TaskInfo,
    seed: int,
    counts: dict[Split, int],
    samples: SamplesOf,
    progress: Progress | None,
) -> dict[Split, Path]:
    """Write the splits in ``counts`` under ``directory/<name>``, which appears complete or not at all."""
    partial, final = directory / f".{info.name}.partial", directory / info.name
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    if not info.auxiliary:
        (partial / "images").mkdir()
    done = 0
    for split in counts:
        rng = generator(seed, info.name, split, "order of exchanges")
        with (partial / f"{split}.jsonl").open("w", encoding="ascii", newline="\n") as file:
            for record in _records(partial, info, split, samples(split, counts[split]), counts[split], rng):
                file.write(json.dumps(record) + "\n")
                done += 1
                if progress:
                    progress(info.name, done, sum(counts.values()))
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    return {split: final / f"{split}.jsonl" for split in counts}


def _records(
    folder: Path, info: TaskInfo, split: Split, samples: Iterator[Sample], count: int, rng: random.Random
) -> Iterator[dict[str, Any]]:
    """Exactly ``count`` records; an image whose conversations would pass that is left out whole."""
    written = 0
    for number, sample in enumerate(samples):
        conversations = _conversations(sample, rng)
        if written + len(conversations) > count:
            continue
        image = None
        if sample.draw is not None:
            image = f"{info.name}/images/{split}-{number:05d}.png"
            (folder / "images" / Path(image).name).write_bytes(_png(sample.draw()))
        for exchanges in conversations:
            yield _record(f"{info.name}-{split}-{written:05d}", info, split, image, exchanges)
            written += 1
        if written == count:
            return
    raise UserError(f"{info.name}: the material ends after {written} of {count} {split} conversations")


def _png(image: Image.Image) -> bytes:
    """Level 1: the pictures are plain, more effort saves little. One write is faster than Pillow's many."""
    data = io.BytesIO()
    image.save(data, "PNG", compress_level=1)
    return data.getvalue()


def _conversations(sample: Sample, rng: random.Random) -> list[list[Exchange]]:
    """All exchanges about an image, shuffled, in as few conversations of nearly equal length as allowed."""
    exchanges = list(sample.exchanges)
    if sample.shuffle:
        rng.shuffle(exchanges)
    parts = -(-len(exchanges) // MOST_EXCHANGES)
    bounds = [len(exchanges) * part // parts for part in range(parts + 1)]
    return [exchanges[a:b] for a, b in pairwise(bounds)]


def _record(
    identity: str, info: TaskInfo, split: Split, image: str | None, exchanges: list[Exchange]
) -> dict[str, Any]:
    turns = []
    for index, exchange in enumerate(exchanges):
        question = exchange.question
        if index == 0:
            # The image and the response format come once, in the first turn of a conversation.
            parts = ["<image>" if image else None, question, info.instruction]
            question = "\n".join(part for part in parts if part)
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": exchange.answer}]
    record: dict[str, Any] = {"id": identity}
    if image:
        record["image"] = image
    record["conversations"] = turns
    if split != "train" and exchanges[0].references:
        record["references"] = list(exchanges[0].references)
    return record
