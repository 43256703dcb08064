"""Samples of the built-in tasks, before they are drawn, against independent readings of their geometry and sources."""

from __future__ import annotations

import csv
import gzip
import re
import sqlite3
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import yaml
from built_in_wheels import wheel

from trainer.data.built_in import charts, chat, covers
from trainer.data.built_in.material import Film
from trainer.data.built_in.samples import generator, split_groups
from trainer.data.built_in.scene_tasks import (
    SceneTask,
    category_questions,
    clearly_in_quarter,
    left_to_right,
    ordered_pair,
)
from trainer.data.built_in.scenes import OBJECTS, Placed, Scene, random_scene

SPLITS = ("train", "validation", "test")


def test_another_seed_gives_other_samples() -> None:
    def captions(seed: int) -> list[str]:
        return [s.exchanges[0].answer for s in SceneTask("scene_captions", seed).samples("test", 30)]

    assert captions(0) == captions(0)
    assert captions(0) != captions(1)


# --- scenes --------------------------------------------------------------------------------------------


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


# --- charts --------------------------------------------------------------------------------------------


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
    known: set[str] = set()
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
                known |= {director} if topic == "directed" else set()
    assert all(len(numbers) == 150 for numbers in films.values())
    assert not films["train"] & films["validation"]
    assert not (films["train"] | films["validation"]) & films["test"]
    assert min(asked.values()) > 40
    assert len(known) <= 24  # names that are seldom seen are asked for nowhere


def test_all_that_is_asked_about_can_be_seen() -> None:
    """Another title, genre, year, director or picture is another cover; another title, category or value another
    chart."""
    film = Film(1, "Heat", 1995, "Crime", "Michael Mann")
    other = {"title": "Alien", "year": 1979, "genre": "War", "director": "Ridley Scott"}
    films = [film, *(replace(film, **{key: value}) for key, value in other.items())]
    bars = (("Art", 40.0, charts.BAR_COLOURS[0]), ("English", 60.0, charts.BAR_COLOURS[1]))
    chart = charts.Chart("Degrees", "2000", bars, "blue")
    shown = [chart, replace(chart, title="Films")]
    shown += [replace(chart, bars=(bars[0], one)) for one in (("Crime", *bars[1][1:]), ("English", 61.0, bars[1][2]))]
    printed = [*(covers.Cover(one, "blue", "hocho") for one in films), covers.Cover(film, "blue", "police_car")]
    for drawn in (printed, shown):
        assert len({one.draw().tobytes() for one in drawn}) == len(drawn)


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
