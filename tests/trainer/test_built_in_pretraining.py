"""The image descriptions against independent readings of their pixels and sources, and apart from the tasks."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trainer.data.built_in import Sizes, charts, covers, easy_vqa, pretraining, write_built_in_tasks, write_pretraining
from trainer.data.built_in.drawing import BACKGROUNDS
from trainer.data.built_in.samples import Sample
from trainer.data.built_in.scenes import OBJECTS, Scene
from trainer.data.records import read_records
from trainer.errors import UserError

SEED, COUNT = 3, 145
SPLITS = ("train", "validation", "test")
CATEGORY = {name: category for category, names in OBJECTS.items() for name in names}
BOX = r"\[[01]\.\d\d(?:,[01]\.\d\d){3}\]"
FIGURE_COLOURS = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}
Row = dict[str, Any]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretraining")
    assert write_pretraining(folder, seed=SEED, count=COUNT) == folder / "pretraining" / "train.jsonl"
    return folder


@pytest.fixture(scope="module")
def rows(root: Path) -> list[Row]:
    return [json.loads(line) for line in (root / "pretraining" / "train.jsonl").read_text().splitlines()]


def description(row: Row) -> str:
    text: str = row["conversations"][1]["value"]
    return text


def domain(row: Row) -> str:
    text = description(row)
    if "hortest" in text:
        return "charts"
    if "enre" in text:
        return "covers"
    return "scenes" if "ackground" in text else "figures"


def of(rows: list[Row], name: str) -> list[Row]:
    return [row for row in rows if domain(row) == name]


def picture(root: Path, row: Row) -> Image.Image:
    with Image.open(root / row["image"]) as image:
        return image.copy()


def background_of(image: Image.Image) -> tuple[int, ...]:
    colours = image.getcolors(image.width * image.height)
    assert colours is not None
    found = max(colours)[1]
    assert isinstance(found, tuple)
    return found


def scene_of(sample: Sample, image: Image.Image) -> Scene:
    """The scene behind a record, whose boxes are compared with the pixels of its image first."""
    scene = sample.draw.__self__  # type: ignore[union-attr]
    assert isinstance(scene, Scene)
    ink_YX = (np.asarray(image) != background_of(image)).any(axis=2)
    for placed in scene.objects:
        left, top, right, bottom = placed.box
        y0, x0 = max(0, top - 2), max(0, left - 2)  # nothing of a neighbour, four pixels away
        ys, xs = np.nonzero(ink_YX[y0 : bottom + 2, x0 : right + 2])
        assert (x0 + xs.min(), y0 + ys.min(), x0 + xs.max() + 1, y0 + ys.max() + 1) == placed.box
        ink_YX[top:bottom, left:right] = False
    assert not ink_YX.any()  # and nothing else is there
    return scene


# --- records -------------------------------------------------------------------------------------------


def test_records_have_the_form_of_the_tasks_and_exactly_the_counts(root: Path, rows: list[Row]) -> None:
    assert len(rows) == COUNT
    assert Counter(map(domain, rows)) == {"scenes": 73, "figures": 24, "charts": 24, "covers": 24}
    assert len({row["id"] for row in rows}) == len({row["image"] for row in rows}) == COUNT
    for row in rows:
        assert set(row) == {"id", "image", "conversations"}
        human, gpt = row["conversations"]
        assert (human["from"], gpt["from"]) == ("human", "gpt")
        assert human["value"] in ("<image>\nDescribe the image in detail.", "<image>\nDescribe the image in words.")
        assert re.fullmatch(r"[A-Z].*[.]", gpt["value"])
        assert "  " not in gpt["value"]
        image = picture(root, row)
        assert (image.size, image.mode) == ((160, 160), "RGB")
    file = root / "pretraining" / "train.jsonl"
    assert file.read_bytes().isascii()
    assert "\\u" not in file.read_text()
    assert len(read_records(file)) == COUNT
    on_disk = {f"pretraining/images/{p.name}" for p in (root / "pretraining" / "images").glob("*")}
    assert on_disk == {row["image"] for row in rows}
    assert len({hashlib.sha256((root / name).read_bytes()).hexdigest() for name in on_disk}) == COUNT
    # the kinds are mixed: no stretch of the file is of one only
    assert all(len(set(map(domain, rows[i : i + 40]))) == 4 for i in range(0, 120, 40))


def test_the_same_arguments_give_the_same_bytes_in_another_process(root: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from trainer.data.built_in import *; "
        f"write_pretraining(Path(sys.argv[1]), seed={SEED}, count={COUNT})"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)
    digests = [
        {
            p.relative_to(top): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in (top / "pretraining").rglob("*")
            if p.is_file()
        }
        for top in (root, tmp_path)
    ]
    assert digests[0] == digests[1]
    assert len(digests[0]) == COUNT + 1


def test_another_seed_gives_other_descriptions(rows: list[Row], tmp_path: Path) -> None:
    other = [json.loads(x) for x in write_pretraining(tmp_path, seed=SEED + 1, count=30).read_text().splitlines()]
    assert not set(map(description, of(rows, "scenes"))) & set(map(description, of(other, "scenes")))


@pytest.mark.parametrize("count", [1, 6])
def test_small_counts_are_exact_and_progress_reaches_them(tmp_path: Path, count: int) -> None:
    calls: list[tuple[str, int, int]] = []
    file = write_pretraining(tmp_path, seed=0, count=count, progress=lambda *call: calls.append(call))
    assert len(file.read_text().splitlines()) == count
    assert calls == [("pretraining", done, count) for done in range(1, count + 1)]
    assert [p.name for p in tmp_path.iterdir()] == ["pretraining"]


@pytest.mark.parametrize("count", [0, -1, True, 2.0])
def test_the_count_must_be_a_positive_integer(tmp_path: Path, count: Any) -> None:
    with pytest.raises(UserError, match="descriptions must be an integer of at least 1"):
        write_pretraining(tmp_path / "out", seed=0, count=count)
    assert not (tmp_path / "out").exists()


def test_scenes_stand_in_where_figures_run_out() -> None:
    figures = len(pretraining._figures(SEED))
    assert figures > 1000
    drawn = [s.draw for s in pretraining._samples(SEED, "train", 6 * figures + 60)]
    kinds = Counter(getattr(draw, "__qualname__", "figure") for draw in drawn)
    assert kinds["figure"] == figures
    assert kinds["Chart.draw"] == kinds["Cover.draw"] == figures + 10
    assert kinds["Scene.draw"] == 3 * figures + 40


# --- what the descriptions say -------------------------------------------------------------------------


def test_scenes_are_what_the_pixels_show(root: Path, rows: list[Row]) -> None:
    forms: Counter[str] = Counter()
    numbers: Counter[int] = Counter()
    relations: Counter[str] = Counter()
    samples = pretraining._samples(SEED, "train", COUNT)
    for row, sample in zip(rows, samples, strict=True):
        if domain(row) != "scenes":
            continue
        text, image = description(row), picture(root, row)
        objects = sorted(scene_of(sample, image).objects, key=lambda o: o.box[0] + o.box[2])
        seen = [o.box for o in objects]
        centres = [((a + c) / 2, (b + d) / 2) for a, b, c, d in seen]
        numbers[len(seen)] += 1
        [colour] = re.findall(r"(?:Background: |background is )(\w+)\.", text)
        assert background_of(image) == BACKGROUNDS[colour]
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text.lower())
        if "Left to right" in text:
            forms["boxes"] += 1
            assert row["conversations"][0]["value"].endswith("in detail.")
            found = re.findall(rf"an? ([a-z ]+) ({BOX})", text[0].lower() + text[1:])
            named = [name for name, _ in found]
            expected = ["[" + ",".join(f"{edge / 160:.2f}" for edge in box) + "]" for box in seen]
            assert [box for _, box in found] == expected
            assert text.endswith(f" Left to right: {', '.join(named)}.")
        elif told := re.fullmatch(r"There (is|are) (\d) objects?: (.+?)\. The background is \w+\.(.*)", text):
            forms["sentences"] += 1
            assert (told[1], int(told[2])) == ("is" if len(seen) == 1 else "are", len(seen))
            named = [re.sub("^an? ", "", part) for part in re.split(", | and ", told[3])]
            if told[4]:
                pair = re.fullmatch(r" The (.+) is (to the left of|above) the (.+)\.", told[4])
                assert pair is not None
                assert sorted(named) == sorted((pair[1], pair[3]))
                relations[pair[2]] += 1
                (x1, y1), (x2, y2) = (centres[named.index(pair[i])] for i in (1, 3))
                assert abs(abs(x1 - x2) - abs(y1 - y2)) >= 20
                if pair[2] == "above":
                    assert y2 - y1 > abs(x1 - x2)
                else:
                    assert x2 - x1 > abs(y1 - y2)
        else:
            forms["places"] += 1
            body = text.split(". The background")[0]
            named = []
            for part, (x, y) in zip(re.split(", | and ", body[0].lower() + body[1:]), centres, strict=True):
                told = re.fullmatch(r"an? (.+?)(?: \((?:an? )?(\w+)\))?(?: at the (\w+ \w+))?", part)
                assert told is not None
                named.append(told[1])
                assert (told[2] or "thing") == CATEGORY[told[1]]
                corner = f"{'top' if y < 80 else 'bottom'} {'left' if x < 80 else 'right'}"
                assert told[3] == (corner if min(abs(x - 80), abs(y - 80)) >= 10 else None)
        assert named == [o.name for o in objects]
        assert all(b[0] - a[0] >= 10 for a, b in pairwise(centres))
    assert min(forms[f] for f in ("boxes", "sentences", "places")) == 24
    assert min(numbers[n] for n in (1, 2, 3, 4)) == 18
    assert set(relations) == {"to the left of", "above"}


def test_figures_have_the_colour_and_shape_of_the_pixels(root: Path, rows: list[Row]) -> None:
    told: set[tuple[str, str]] = set()
    for row in of(rows, "figures"):
        found = re.fullmatch(r"A (\w+) (\w+)\.|The shape is a (\w+)\. The color is (\w+)\.", description(row))
        assert found is not None
        colour, shape = found[1] or found[4], found[2] or found[3]
        told.add((colour, shape))
        pixels_YXC = np.asarray(picture(root, row)).astype(int)
        near_YX = np.abs(pixels_YXC - FIGURE_COLOURS[colour]).max(axis=2) < 40
        others = [c for c in FIGURE_COLOURS if c != colour]
        counts = [(np.abs(pixels_YXC - FIGURE_COLOURS[c]).max(axis=2) < 40).sum() for c in others]
        assert near_YX.sum() > 3 * max(counts)
        # a rectangle fills its box, a circle pi/4 of it, a triangle half at most
        ys, xs = np.nonzero(near_YX)
        filled = near_YX.sum() / ((ys.max() - ys.min() + 1) * (xs.max() - xs.min() + 1))
        assert shape == ("triangle" if filled < 0.62 else "circle" if filled < 0.87 else "rectangle")
    assert {c for c, _ in told} == set(FIGURE_COLOURS)
    assert {s for _, s in told} == {"circle", "rectangle", "triangle"}


def test_figure_facts_follow_from_answers_only() -> None:
    facts = pretraining.figure_facts
    assert facts([("what color is the triangle?", "red")]) == ("red", "triangle")
    assert facts([("is no teal shape present?", "no"), ("what shape is in the image?", "circle")]) == ("teal", "circle")
    assert facts([("is there not a red shape?", "yes"), ("what shape is in the image?", "circle")]) is None
    assert facts([("is there a circle?", "no"), ("is there a red shape?", "yes")]) is None


def test_charts_are_what_the_pixels_show(root: Path, rows: list[Row]) -> None:
    titles: Counter[str] = Counter()
    for row in of(rows, "charts"):
        text = description(row)
        [title] = re.findall(r"(?:Title: |title of the chart is )([^.]+)\.", text)
        titles[title] += 1
        names = next(t.categories for t in charts.tables() if t.title == title)
        pixels_YXC = np.asarray(picture(root, row))
        bars: list[tuple[int, str, int]] = []  # top, category, length in pixels
        for colour, category in zip(charts.BAR_COLOURS, names, strict=False):
            ys, xs = np.nonzero((pixels_YXC == colour).all(axis=2))
            if len(ys):
                bars.append((int(ys.min()), category, int(xs.max() - xs.min() + 1)))
        if listed := re.search(r"Bars from the top: (.+?)\. Longest", text):
            found = [tuple(bar.split(": ")) for bar in listed[1].split(", ")]
        else:
            found = re.findall(r"the value of (.+?) is (\d+)", text)
        assert [name for name, _ in found] == [name for _, name, _ in sorted(bars)]
        lengths = {name: length for _, name, length in bars}
        for name, value in found:
            assert int(value) % 10 == 0
            assert abs(lengths[name] / 1.4 - int(value)) < 4.5
        [longest] = re.findall(r"(?:Longest: |longest bar is )([^.]+)\.", text)
        [shortest] = re.findall(r"(?:Shortest: |shortest bar is )([^.]+)\.", text)
        assert longest == max(lengths, key=lambda name: lengths[name])
        assert shortest == min(lengths, key=lambda name: lengths[name])
    assert len(titles) == 4


def test_covers_are_films_of_the_database(rows: list[Row]) -> None:
    spec = find_spec("bokeh_sampledata")
    assert spec is not None
    assert spec.origin is not None
    database = sqlite3.connect(Path(spec.origin).parent / "_data" / "movies.db")
    for row in of(rows, "covers"):
        found = re.fullmatch(
            r"Genre: (.+)\. Decade: (\d+s)\. Year: (\d+)\. Director: (.+)\. Title: (.+)\.|"
            r"The genre of the film is (.+)\. It was released in the (\d+s), in (\d+)\. (.+) directed the film\. "
            r"The title of the film is (.+)\.",
            description(row),
        )
        assert found is not None
        genre, decade, year, director, title = [part for part in found.groups() if part is not None]
        listed = database.execute("SELECT Genre, Director FROM omdb WHERE Title = ? AND Year = ?", (title, year))
        assert any(genre in genres.split(", ") and director == name for genres, name in listed)
        assert decade == f"{year[:3]}0s"


# --- apart from the tasks ------------------------------------------------------------------------------


def test_no_picture_is_one_of_the_tasks(root: Path, rows: list[Row], tmp_path: Path) -> None:
    sizes = Sizes(train=30, validation=15, test=20, chat_train=10, chat_validation=5, chat_test=5)
    write_built_in_tasks(tmp_path, seed=SEED, sizes=sizes)
    of_tasks = {hashlib.sha256(p.read_bytes()).hexdigest() for p in tmp_path.rglob("*.png")}
    assert len(of_tasks) > 300
    assert not of_tasks & {hashlib.sha256((root / row["image"]).read_bytes()).hexdigest() for row in rows}


def test_films_series_and_figures_are_not_those_of_the_tasks() -> None:
    """Whole pools, not only what the counts happen to draw."""
    films = {film.number for film in pretraining._films(SEED)}
    for split in SPLITS:
        pool = covers.films_by_split(SEED)[split]  # type: ignore[index]
        taken = {film.number for film in (pool[: pretraining.TASK_RECORDS] if split == "train" else pool)}
        assert taken
        assert not films & taken
    figures = {number for number, _, _ in pretraining._figures(SEED)}
    for split in ("train", "validation"):
        count = pretraining.TASK_RECORDS if split == "train" else 500
        samples = list(easy_vqa.samples(SEED, split, count))  # type: ignore[arg-type]
        assert len(samples) == count
        assert not figures & {sample.draw.args[1] for sample in samples}  # type: ignore[union-attr]
    described = [s.draw.__self__ for s in _first(pretraining._chart_samples(pretraining.generator(0, "x"), SEED), 600)]
    task = charts.Charts(SEED)
    series: dict[str, set[tuple[str, str]]] = {}
    keys: set[tuple] = set()
    for split in SPLITS:
        count = pretraining.TASK_RECORDS if split == "train" else 600
        drawn = [s.draw.__self__ for s in task.samples(split, count)]  # type: ignore[union-attr, arg-type]
        series[split] = {(c.title, c.series) for c in drawn}
        keys |= {c.key for c in drawn}
    assert len({c.key for c in described}) == 600
    assert not {c.key for c in described} & keys
    assert not {(c.title, c.series) for c in described} & (series["validation"] | series["test"])


def _first(samples: Any, count: int) -> list[Any]:
    return [next(samples) for _ in range(count)]
