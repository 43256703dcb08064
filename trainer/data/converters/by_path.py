"""Data sets in files of any name, whose paths say which split they are of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from trainer.data.converters.base import Context, Converter, Options, Part, Pool, Source
from trainer.data.converters.fields import PARQUET, files_below, split_of
from trainer.data.raw_json import LARGEST_ELEMENT, Element


def container(path: Path) -> Any:
    """By the name of a file; JSON Lines also by an object that is the whole of its first line, as exports have it."""
    if path.suffix in (".jsonl", PARQUET):
        return "lines" if path.suffix == ".jsonl" else "parquet"
    with path.open("rb") as file:
        if not file.read(64).decode("utf-8-sig", "replace").lstrip().startswith("{"):  # a list may be one long line
            return "list"
        file.seek(0)
        return "lines" if file.readline(LARGEST_ELEMENT).rstrip().endswith(b"}") else "list"


def dealt(options: Options) -> Pool:
    """A raw split that is cut into validation, test and the rest, at random."""
    held_out = (Part("validation", options.validation), Part("test", options.test))
    rest = (Part("train", options.train), Part(None)) if options.train else (Part("train"),)
    return Pool((*(part for part in held_out if part.size), *rest))


class SplitByPath(Converter):
    """Validation and test records come from their own files, or where no path speaks of them out of training's."""

    option_names: ClassVar[tuple[str, ...]] = ("train", "validation", "test")
    suffixes: ClassVar[tuple[str, ...]] = (".jsonl",)
    what: ClassVar[str]

    def sources(self, folder: Path, options: Options) -> list[Source]:
        base = folder if folder.is_dir() else folder.parent
        return [
            Source(path, split_of(path, base), container(path), label=path.relative_to(base).with_suffix("").as_posix())
            for path in files_below(folder, self.suffixes, self.what)
        ]

    def pools(self, options: Options, names: Sequence[str]) -> dict[str, Pool]:
        own = super().pools(options, names)
        if "train" not in own:
            return own
        validation, test = (None if split in own else getattr(options, split) for split in ("validation", "test"))
        return own | {"train": dealt(replace(options, validation=validation, test=test))}

    def numbered(self, element: Element, context: Context) -> str:
        """An id for a record that has none: its file, and where in it."""
        return f"{context.source.label}-{element.where.rpartition(' ')[2]}"
