"""Image descriptions for the small model to learn to see from, before Algorithm 1 starts (LLaVA's first stage).

Four kinds of images, drawn as those of the tasks are, from what the tasks train on at most:

- scenes, about half: new ones, from generators of their own;
- easy-VQA figures: official training images that are not in the task's validation, from the far end of the
  list whose beginning the task trains on;
- charts: training series, other charts than the first few thousand of the task;
- film covers: training films after the first few thousand, likewise.

With tasks of at most ``TASK_RECORDS`` training records no figure, chart or film is shared with any of them.
Larger tasks train on some of the same; validation and test never have one. That no scene comes twice is left
to chance (one object alone can stand in some 40 million ways).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count as count_from
from pathlib import Path

from trainer.data.built_in import covers, easy_vqa
from trainer.data.built_in.catalogue import (
    DEGREES,
    EASY_VQA,
    EMOJI_DATA,
    FILMS,
    GAPMINDER,
    LETTERS,
    OPENMOJI,
    POPULATION,
    Split,
    TaskInfo,
)
from trainer.data.built_in.charts import Chart, Charts, nearest_ten
from trainer.data.built_in.material import Film, check_material, easy_vqa_questions
from trainer.data.built_in.samples import Exchange, Sample, generator
from trainer.data.built_in.scene_tasks import (
    ASKED_CATEGORIES,
    clearly_in_quarter,
    left_to_right,
    ordered_pair,
    quarter,
)
from trainer.data.built_in.scenes import Placed, Scene, box_text, random_scene, with_article
from trainer.data.built_in.writing import Progress, write_folder
from trainer.errors import UserError

PRETRAINING = TaskInfo(
    "pretraining",
    "LLaVA's image-caption pairs",
    None,
    False,
    "Say everything that is in the image; read before the tasks are, never scored.",
    None,
    (OPENMOJI, EMOJI_DATA, EASY_VQA, DEGREES, GAPMINDER, POPULATION, FILMS, LETTERS),
)
# Which of the two is asked tells lists (boxes, labels) from sentences: one image has one right answer to each.
IN_DETAIL = "Describe the image in detail."
IN_WORDS = "Describe the image in words."
TASK_RECORDS = 2000  # what the beginning of a training pool is kept for

_SHAPES = ("circle", "rectangle", "triangle")
_COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
_Samples = Iterator[Sample]


def write_pretraining(directory: Path, *, seed: int, count: int, progress: Progress | None = None) -> Path:
    """Write ``count`` image descriptions and return ``directory/pretraining/train.jsonl``.

    The images are ``directory/pretraining/images/*.png``, with paths in the records relative to ``directory``.
    Half are scenes; figures, charts and covers have a sixth each, or as many as there are, and what is missing
    becomes scenes. The same arguments give the same bytes; the folder appears complete or not at all.

    Raises MissingPackageError when a wheel is not installed, UserError when ``count`` is no positive integer.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise UserError(f"the number of descriptions must be an integer of at least 1, got {count!r}")
    check_material()
    directory.mkdir(parents=True, exist_ok=True)
    samples = partial(_samples, seed)
    return write_folder(directory, PRETRAINING, seed, {"train": count}, samples, progress)["train"]


def _samples(seed: int, split: Split, count: int) -> _Samples:
    assert split == "train"
    figures, films = _figures(seed), _films(seed)
    share = count // 6
    counts = {"figures": min(share, len(figures)), "charts": share, "covers": min(share, len(films))}
    counts["scenes"] = count - sum(counts.values())
    rngs = {name: generator(seed, "pretraining", name) for name in counts}
    iterators: dict[str, _Samples] = {
        "scenes": _scene_samples(rngs["scenes"]),
        "figures": _figure_samples(rngs["figures"], figures),
        "charts": _chart_samples(rngs["charts"], seed),
        "covers": _cover_samples(rngs["covers"], films),
    }
    order = [name for name, number in sorted(counts.items()) for _ in range(number)]
    generator(seed, "pretraining", "order").shuffle(order)
    for name in order:
        yield next(iterators[name])


def _listed(names: list[str]) -> str:
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


# --- scenes --------------------------------------------------------------------------------------------


def scene_with_boxes(scene: Scene, ordered: list[Placed]) -> Exchange:
    boxes = ", ".join(f"{with_article(o.name)} {box_text(o.box)}" for o in ordered)
    names = ", ".join(o.name for o in ordered)
    return Exchange(IN_DETAIL, f"{_capital(boxes)}. Background: {scene.background}. Left to right: {names}.")


def scene_as_sentences(scene: Scene, ordered: list[Placed]) -> Exchange:
    """How many, which, the background; of two objects also how they stand, where the captions would say it."""
    names = _listed([with_article(o.name) for o in ordered])
    verb, noun = ("is", "object") if len(ordered) == 1 else ("are", "objects")
    text = f"There {verb} {len(ordered)} {noun}: {names}. The background is {scene.background}."
    pair = ordered_pair(*ordered) if len(ordered) == 2 else None
    if pair:
        text += f" The {pair.first.name} is {pair.words[0]} the {pair.second.name}."
    return Exchange(IN_WORDS, text)


def scene_by_places(scene: Scene, ordered: list[Placed]) -> Exchange:
    """What each object is and in which quarter, where the questions would ask for it."""
    parts = []
    for placed in ordered:
        part = with_article(placed.name)
        if placed.category in ASKED_CATEGORIES:
            part += f" ({ASKED_CATEGORIES[placed.category]})"
        if clearly_in_quarter(placed):
            part += f" at the {quarter(placed)}"
        parts.append(part)
    return Exchange(IN_WORDS, f"{_capital(_listed(parts))}. The background is {scene.background}.")


SCENE_TEMPLATES: tuple[Callable[[Scene, list[Placed]], Exchange], ...] = (
    scene_with_boxes,
    scene_as_sentences,
    scene_by_places,
)


def _scene_samples(rng: random.Random) -> _Samples:
    """One to four objects in turn, each number with every template equally often; no scene twice."""
    seen: set[Scene] = set()
    for index in count_from():
        template = SCENE_TEMPLATES[index // 4 % len(SCENE_TEMPLATES)]
        while True:
            scene = random_scene(rng, 1 + index % 4)
            ordered = left_to_right(scene)
            if ordered is not None and scene not in seen:
                break
        seen.add(scene)
        yield Sample((template(scene, ordered),), scene.draw)


# --- figures -------------------------------------------------------------------------------------------


def figure_facts(asked: list[tuple[str, str]]) -> tuple[str, str] | None:
    """(colour, shape) as the published answers give them away; None where they leave one open."""
    told: set[str] = set()
    for question, answer in asked:
        words = set(question.rstrip("?").split())
        named = words & {*_SHAPES, *_COLOURS}
        if answer not in ("yes", "no"):
            told |= {answer, *named}  # "what color is the triangle?" tells the shape as well
        elif (answer == "yes") != bool(words & {"no", "not"}):
            told |= named
    colours, shapes = told & set(_COLOURS), told & set(_SHAPES)
    if len(colours) != 1 or len(shapes) != 1:
        return None
    return colours.pop(), shapes.pop()


def _figures(seed: int) -> list[tuple[int, str, str]]:
    """(number, colour, shape) of the training images, those that the task comes to last first."""
    questions = easy_vqa_questions("train")
    numbers = easy_vqa.images_of(seed, "train")[TASK_RECORDS:]
    return [(n, *facts) for n in reversed(numbers) if (facts := figure_facts(questions[n]))]


def _figure_samples(rng: random.Random, figures: list[tuple[int, str, str]]) -> _Samples:
    for number, colour, shape in figures:
        exchange = rng.choice(
            (
                Exchange(IN_DETAIL, f"A {colour} {shape}."),
                Exchange(IN_WORDS, f"The shape is a {shape}. The color is {colour}."),
            )
        )
        yield Sample((exchange,), partial(easy_vqa.enlarged, "train", number))


# --- charts --------------------------------------------------------------------------------------------


def chart_exchange(chart: Chart, rng: random.Random) -> Exchange:
    values = [(category, nearest_ten(value)) for category, value, _ in chart.bars]
    by_value = sorted(chart.bars, key=lambda bar: bar[1])
    longest, shortest = by_value[-1][0], by_value[0][0]
    if rng.random() < 0.5:
        bars = ", ".join(f"{category}: {value}" for category, value in values)
        ends = f"Longest: {longest}. Shortest: {shortest}."
        return Exchange(IN_DETAIL, f"Title: {chart.title}. Bars from the top: {bars}. {ends}")
    bars = _listed([f"the value of {category} is {value}" for category, value in values])
    return Exchange(
        IN_WORDS,
        f"The title of the chart is {chart.title}. The longest bar is {longest}. The shortest bar is {shortest}. "
        f"To the nearest ten, {bars}.",
    )


def _chart_samples(rng: random.Random, seed: int) -> _Samples:
    task = Charts(seed)
    for _ in task.samples("train", TASK_RECORDS):
        pass  # not drawn, only marked as taken
    while True:
        chart = task.readable("train", rng)
        yield Sample((chart_exchange(chart, rng),), chart.draw)


# --- covers --------------------------------------------------------------------------------------------


def cover_exchange(film: Film, rng: random.Random) -> Exchange:
    """The title last: it is met once, and what stands before it should not hang on having guessed it."""
    if rng.random() < 0.5:
        text = f"Genre: {film.genre}. Decade: {film.decade}. Year: {film.year}. Director: {film.director}."
        return Exchange(IN_DETAIL, f"{text} Title: {film.title}.")
    text = f"The genre of the film is {film.genre}. It was released in the {film.decade}, in {film.year}."
    return Exchange(IN_WORDS, f"{text} {film.director} directed the film. The title of the film is {film.title}.")


def _films(seed: int) -> list[Film]:
    pool = covers.films_by_split(seed)["train"][TASK_RECORDS:]
    # Dealt out anew: the beginning has taken most of the rare genres, the rest should still be mixed.
    return covers.evenly_mixed(pool, generator(seed, "pretraining", "films"))


def _cover_samples(rng: random.Random, films: list[Film]) -> _Samples:
    for film in films:
        cover = covers.Cover(film, rng.choice(sorted(covers.BACKGROUNDS)), rng.choice(covers.PICTOGRAMS[film.genre]))
        yield Sample((cover_exchange(film, rng),), cover.draw)
