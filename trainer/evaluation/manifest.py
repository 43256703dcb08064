"""What an evaluation folder belongs to. Going on with another model, other records or other options is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trainer.data.records import Record
from trainer.errors import UserError
from trainer.evaluation.spec import EvaluationSpec
from trainer.files import write_json

FORMAT = 5
_PIECES, _PIECE = 256, 16 * 1024  # of a large file: what its digest reads, evenly spread, in bytes


def describe(spec: EvaluationSpec, records: Sequence[Sequence[Record]]) -> dict[str, Any]:
    """Everything that predictions depend on, and nothing else: not the number of ranks, not the metrics."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "model": model_digest(spec.model_path),
        "batch_size": spec.batch_size,
        "precision": spec.precision,
        "device": spec.devices[0].partition(":")[0],
        "attention": spec.attention,
        "features": True if spec.features else None,  # the model tells which ones, and they may have been moved
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
    content |= {f"images.{name}": value for name, value in spec.images.changes().items()}
    for chosen, own in zip(spec.sets, records, strict=True):
        key = f"sets.{chosen.key}"
        content[f"{key}.limit"] = chosen.limit
        content[f"{key}.records"] = records_digest(own)
        content[f"{key}.image_root"] = str(chosen.image_root.absolute())
        if chosen.teacher_forced:
            content[f"{key}.max_length"] = spec.max_length
        else:
            content[f"{key}.max_new_tokens"] = chosen.max_new_tokens
    return content


def claim_folder(spec: EvaluationSpec, content: dict[str, Any]) -> None:
    """Makes ``output_dir`` this evaluation's: goes on with it, starts in it, or refuses it.

    An unfinished one goes on with another batch size too: where memory runs out, what is done is not lost.

    Raises:
        UserError: it holds another evaluation and ``spec.overwrite`` is off; names every difference.
    """
    path = spec.output_dir / "manifest.json"
    manifest: dict[str, Any] = {}
    there: dict[str, Any] | None = None
    if path.exists():
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            there = manifest["evaluation"]
        except (ValueError, KeyError, TypeError):
            there = {}  # not ours, or damaged
    if there == content:
        return
    if there and spec.parts.exists() and there | {"batch_size": spec.batch_size} == content:
        write_json(path, manifest | {"evaluation": content})
        return
    ours = [spec.predictions(chosen) for chosen in spec.sets]
    found = [file for file in (*ours, spec.output_dir / "metrics.json", spec.parts) if file.exists()]
    if (there is not None or found) and not spec.overwrite:
        raise UserError(
            f"{spec.output_dir} holds {_differences(there or {}, content, [file.name for file in found])}; "
            "choose another --output, or replace it with --overwrite"
        )
    for file in found:
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    write_json(path, {"evaluation": content, "model_path": str(spec.model_path)})


def write_throughput(spec: EvaluationSpec, throughput: dict[str, Any]) -> None:
    """Keeps the throughput of every set in the manifest, for scoring again without the parts."""
    path = spec.output_dir / "manifest.json"
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | {"throughput": throughput})


def read_throughput(spec: EvaluationSpec) -> dict[str, Any]:
    """What :func:`write_throughput` kept."""
    return json.loads((spec.output_dir / "manifest.json").read_text(encoding="utf-8")).get("throughput", {})


def _differences(there: dict[str, Any], here: dict[str, Any], files: list[str]) -> str:
    if not there:
        return f"{', '.join(files) or 'a manifest.json'} of unknown origin"
    keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    return "another evaluation: " + ", ".join(
        f"{key} is {there.get(key)!r} there and {here.get(key)!r} here" for key in keys
    )


def records_digest(records: Sequence[Record]) -> str:
    """Of ids, texts, references and image paths in order; not of the images themselves."""
    whole = hashlib.sha256()
    for record in records:
        whole.update(json.dumps(asdict(record), sort_keys=True).encode())
    return whole.hexdigest()[:16]


def model_digest(folder: Path) -> str:
    """Of every file's name and size, and of its content: the whole of small ones, 256 pieces of large ones.

    A copy of a folder has the digest of the original. 256 pieces are 4 MiB of every file, so that a model of 14 GB
    takes no noticeable time; two trainings of it differ in nearly every one of them.

    Raises:
        UserError: there is no such model folder.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a model folder: there is no config.json in it")
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        size = path.stat().st_size
        whole.update(f"{path.name}/{size}/".encode())
        with path.open("rb") as file:
            if size <= _PIECES * _PIECE:
                whole.update(file.read())
                continue
            for piece in range(_PIECES):
                file.seek(piece * (size - _PIECE) // (_PIECES - 1))
                whole.update(file.read(_PIECE))
    return whole.hexdigest()[:16]
