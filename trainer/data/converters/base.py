"""What a converter is made of: sources, items, rejections, options."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from trainer.data.raw_json import Container, Element, elements
from trainer.data.records import IMAGE_PLACEHOLDER
from trainer.errors import UserError, unknown_name

PAPER = "cotbal-paper"
ONE_WORD = "Answer the question using a single word or phrase."


class Rejected(Exception):
    """One raw record that gives no item. ``kind`` is counted in the manifest, the message says what was found."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Options:
    """What a conversion can be told. A converter lists the ones it uses; the others keep their default.

    Attributes:
        seed: of every sampling and shuffling.
        limit: read only so many raw records of each file, for a trial; None reads all.
        image_root: folder that image paths are relative to; without it images are not looked at.
        image_folder: put before every image path, e.g. ``coco/train2014``.
        follow_links: let links inside the image root lead out of it.
        merge: questions about the same training image become one conversation, in random order.
        max_turns: longest merged conversation, in question-answer pairs; the rest goes into further ones.
        train, validation, test: largest number of records of that split, drawn at random.
        prompt: response-format instruction of the questions.
        prompt_turns: which questions of a conversation carry it.
        references: ``all``: every annotator's answer is a reference; ``consensus``: the most common answer only.
        boxes: coordinates relative to the ``image``, or to the square that LLaVA's ``pad`` transform makes of it.
        shared_images: training questions about an image that validation or a test set has too are kept, or dropped.
        tokenizer: folder with ``tokenizer.json``, for ``max_tokens``.
        max_tokens: longest conversation; whole turns past it are dropped, a first answer is cut.
        blocked_words: a dialogue with one of them is dropped.
        system: a system message goes before the first question, stays one, or is dropped.
    """

    seed: int = 0
    limit: int | None = None
    image_root: str | None = None
    image_folder: str = ""
    follow_links: bool = False
    merge: bool = False
    max_turns: int | None = None
    train: int | None = None
    validation: int | None = None
    test: int | None = None
    prompt: str = ""
    prompt_turns: Literal["first", "every"] = "first"
    references: Literal["all", "consensus"] = "all"
    boxes: Literal["image", "pad"] = "image"
    shared_images: Literal["keep", "drop"] = "keep"
    tokenizer: str | None = None
    max_tokens: int | None = None
    blocked_words: tuple[str, ...] = ()
    system: Literal["prepend", "keep", "drop"] = "prepend"

    @classmethod
    def build(cls, values: Mapping[str, Any], usable: Sequence[str], name: str) -> Options:
        """Options from plain values.

        Raises:
            UserError: a name this converter does not use, or a value of another type.
        """
        fields = {entry.name: entry for entry in dataclasses.fields(cls)}
        clean: dict[str, Any] = {}
        for key, value in values.items():
            if key not in usable:
                raise unknown_name(f"option of '{name}'", key, usable)
            clean[key] = _typed(key, value, str(fields[key].type))
        return cls(**clean)


_LITERALS = {
    "prompt_turns": ("first", "every"),
    "references": ("all", "consensus"),
    "boxes": ("image", "pad"),
    "shared_images": ("keep", "drop"),
    "system": ("prepend", "keep", "drop"),
}


def _typed(key: str, value: Any, annotation: str) -> Any:
    def refuse(expected: str) -> UserError:
        return UserError(f"option '{key}' must be {expected}, got {value!r}")

    if value is None and annotation.endswith("None"):
        return None
    if key in _LITERALS:
        if value not in _LITERALS[key]:
            raise refuse(" or ".join(_LITERALS[key]))
    elif annotation == "bool":
        if not isinstance(value, bool):
            raise refuse("true or false")
    elif annotation.startswith("int"):
        least = 0 if key == "seed" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise refuse(f"a whole number, at least {least}")
    elif annotation.startswith("tuple"):
        if not isinstance(value, (list, tuple)) or not all(isinstance(word, str) and word for word in value):
            raise refuse("a list of words")
        return tuple(value)
    elif not isinstance(value, (str, Path)) or "\0" in str(value):
        raise refuse("text")
    else:
        return str(value)
    return value


@dataclass(frozen=True)
class Side:
    """A further file that gives what records refer to (annotations, image sizes) by key."""

    path: Path
    container: Container
    member: str | None
    name: str


@dataclass(frozen=True)
class Source:
    """One raw file: what it holds, and the pool of records that it adds to ("" when its items say so)."""

    path: Path
    pool: str
    container: Container | Literal["parquet", "pickle"] = "lines"
    member: str | None = None
    sides: tuple[Side, ...] = ()
    label: str = ""


@dataclass(frozen=True)
class Item:
    """What one raw record gives: a question-answer pair or a conversation, with its images.

    An empty last answer is one that the data set keeps secret: the record ends with its question.
    In a pool that merges, items of the same ``group`` become one conversation. ``pool`` is for files that hold
    several splits; otherwise it is the source's. ``placed``: the questions say themselves where images go; else
    ``<image>`` is text where there is no image. ``system`` is the system message; a merged conversation has none.
    """

    id: str
    turns: tuple[tuple[str, str], ...]
    images: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    group: str | None = None
    pool: str | None = None
    placed: bool = False
    system: str = ""


@dataclass(frozen=True)
class Part:
    """Part of a pool: the output file, and how many records it takes (None: all that are left).

    ``name`` None throws the rest away.
    """

    name: str | None
    size: int | None = None


@dataclass(frozen=True)
class Pool:
    """Records of one raw split and the outputs they are dealt to, in random order unless one takes them all."""

    parts: tuple[Part, ...]
    merge: bool = False


@dataclass
class Context:
    """What a converter may use while it reads one file."""

    source: Source
    options: Options
    output: Path
    lookup: Callable[[str, str], Any]
    notes: Counter[str] = field(default_factory=Counter)
    cache: dict[str, Any] = field(default_factory=dict)


class Converter(ABC):
    """One data set. Subclasses say which files there are and what one raw record becomes."""

    name: ClassVar[str]
    summary: ClassVar[str]
    files: ClassVar[str]
    option_names: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[Mapping[str, Any]] = {}
    paper_size: ClassVar[int | None] = None  # Table 1
    has_images: ClassVar[bool] = True
    rename_duplicates: ClassVar[bool] = False  # the published file itself repeats ids
    unique_content: ClassVar[bool] = False

    def options(self, values: Mapping[str, Any], preset: str | None) -> Options:
        """The options of a conversion: the preset's, overridden by `values`.

        Raises:
            UserError: an unknown preset or option, or a bad value.
        """
        if preset is not None and (preset != PAPER or not self.paper):
            known = [PAPER] if self.paper else []
            raise unknown_name(f"preset of '{self.name}'", preset, known or ["none"])
        usable = ("seed", "limit", *(("image_root", "image_folder", "follow_links") if self.has_images else ()))
        chosen = dict(self.paper) if preset else {}
        return Options.build({**chosen, **values}, (*usable, *self.option_names), self.name)

    @abstractmethod
    def sources(self, folder: Path, options: Options) -> list[Source]:
        """The raw files under `folder`, in a fixed order.

        Raises:
            UserError: none of them is there.
        """

    def pools(self, options: Options, names: Sequence[str]) -> dict[str, Pool]:
        """How each pool becomes output files."""
        sizes = {"train": options.train, "validation": options.validation, "test": options.test}
        return {
            name: Pool(
                (Part(name, sizes[name]), Part(None)) if sizes.get(name) else (Part(name),),
                options.merge and name == "train",
            )
            for name in names
        }

    def read(self, source: Source) -> Iterator[Element]:
        """Raw records of one file."""
        if source.container == "pickle":
            from trainer.data.converters.pickles import pickled_list

            return pickled_list(source.path)
        if source.container == "parquet":
            from trainer.data.converters.parquet import table_rows  # what it needs takes a while to load

            return table_rows(source.path)
        return elements(source.path, source.container, source.member)

    def side_rows(self, side: Side, value: Any) -> Iterator[tuple[str, Any]]:
        """Key and value of one element of a side file, as ``Context.lookup`` will find it, where there are any."""
        raise NotImplementedError(f"{type(self).__name__} names the side file {side} and does not read it")

    @abstractmethod
    def items(self, element: Element, context: Context) -> list[Item]:
        """What one raw record becomes; nothing when the data set itself marks it as left out (note why).

        Raises:
            Rejected: it cannot be used.
        """


def conversation(item: Item, prompt: str, prompt_turns: str) -> list[dict[str, str]]:
    """LLaVA turns of an item: image placeholders before the first question, the instruction after questions."""
    turns = [{"from": "system", "value": item.system}] if item.system else []
    for index, (question, answer) in enumerate(item.turns):
        if prompt and (index == 0 or prompt_turns == "every"):
            question = f"{question}\n{prompt}"
        if index == 0 and not item.placed:
            question = f"{IMAGE_PLACEHOLDER}\n" * len(item.images) + question
        turns.append({"from": "human", "value": question})
        if answer:
            turns.append({"from": "gpt", "value": answer})
    return turns
