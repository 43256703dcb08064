"""The four tasks about scenes: captions, questions, region captions, grounding."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from trainer.data.built_in.catalogue import Split
from trainer.data.built_in.drawing import SIDE
from trainer.data.built_in.samples import Exchange, Sample, generator
from trainer.data.built_in.scenes import Placed, Scene, box_text, random_scene, with_article

CAPTION_QUESTION = "Describe the image in one sentence."
CLEAR = 20  # pixels between centres before "left of" is said: less than that people would argue about
ASKED_CATEGORIES = {
    "animal": "an animal",
    "food": "food",
    "vehicle": "a vehicle",
    "clothing": "clothing",
    "plant": "a plant",
}


# --- captions ------------------------------------------------------------------------------------------


def caption(scene: Scene) -> Exchange | None:
    """One sentence of a fixed grammar; None where the places are too close to name."""
    ending = f"on a {scene.background} background."
    if scene.background == "orange":
        ending = "on an orange background."
    names = [with_article(o.name) for o in scene.objects]
    if len(names) == 1:
        return _caption(f"{names[0]} {ending}")
    if len(names) == 2:
        pair = ordered_pair(*scene.objects)
        if pair is None:
            return None
        here, there = pair.words
        first, second = with_article(pair.first.name), with_article(pair.second.name)
        return _caption(f"{first} {here} {second} {ending}", f"{second} {there} {first} {ending}")
    ordered = left_to_right(scene)
    if ordered is None:
        return None
    names = [with_article(o.name) for o in ordered]
    return _caption(f"{', '.join(names[:-1])} and {names[-1]} {ending}")


@dataclass(frozen=True)
class Pair:
    first: Placed  # the left or upper one
    second: Placed
    words: tuple[str, str]  # how the first stands to the second, and the second to the first


def ordered_pair(a: Placed, b: Placed) -> Pair | None:
    """None where it could be called either left of or above."""
    dx, dy = (b.centre[i] - a.centre[i] for i in (0, 1))
    if abs(abs(dx) - abs(dy)) < CLEAR:
        return None
    sideways = abs(dx) > abs(dy)
    if (dx if sideways else dy) < 0:
        a, b = b, a
    return Pair(a, b, ("to the left of", "to the right of") if sideways else ("above", "below"))


def left_to_right(scene: Scene) -> list[Placed] | None:
    """None where the order cannot be seen."""
    ordered = sorted(scene.objects, key=lambda o: o.centre[0])
    if any(b.centre[0] - a.centre[0] < CLEAR / 2 for a, b in pairwise(ordered)):
        return None
    return ordered


def _caption(*sentences: str) -> Exchange:
    references = tuple(sentence[0].upper() + sentence[1:] for sentence in sentences)
    return Exchange(CAPTION_QUESTION, references[0], references)


# --- questions -----------------------------------------------------------------------------------------


def count_questions(scene: Scene, rng: random.Random) -> list[Exchange]:
    return [Exchange("How many objects are there?", str(len(scene.objects)))]


def background_questions(scene: Scene, rng: random.Random) -> list[Exchange]:
    return [Exchange("What color is the background?", scene.background)]


def category_questions(scene: Scene, rng: random.Random) -> list[Exchange]:
    """One question; whether the answer is yes is decided first, by a fair coin."""
    present = {o.category for o in scene.objects} & ASKED_CATEGORIES.keys()
    answer = rng.choice(("yes", "no"))
    candidates = sorted(present if answer == "yes" else ASKED_CATEGORIES.keys() - present)
    if not candidates:
        return []
    return [Exchange(f"Is there {ASKED_CATEGORIES[rng.choice(candidates)]} in the image?", answer)]


def neighbour_questions(scene: Scene, rng: random.Random) -> list[Exchange]:
    """What is left or right of an object, where exactly one other object clearly is."""
    found = []
    for placed in scene.objects:
        for sign, word in ((-1, "left"), (1, "right")):
            offsets = {o.name: sign * (o.centre[0] - placed.centre[0]) for o in scene.objects}
            on_side = [name for name, offset in offsets.items() if offset > 0]
            if len(on_side) == 1 and offsets[on_side[0]] >= CLEAR:
                found.append(Exchange(f"What is to the {word} of the {placed.name}?", on_side[0]))
    return found


def quarter(placed: Placed) -> str:
    x, y = placed.centre
    return f"{'top' if y < SIDE / 2 else 'bottom'} {'left' if x < SIDE / 2 else 'right'}"


def clearly_in_quarter(placed: Placed) -> bool:
    return min(abs(c - SIDE / 2) for c in placed.centre) >= CLEAR / 2


def corner_questions(scene: Scene, rng: random.Random) -> list[Exchange]:
    """What is in a quarter of the image, where exactly one object's centre clearly is."""
    quarters: dict[str, list[Placed]] = {}
    for placed in scene.objects:
        quarters.setdefault(quarter(placed), []).append(placed)
    return [
        Exchange(f"What is at the {name}?", inside[0].name)
        for name, inside in sorted(quarters.items())
        if len(inside) == 1 and clearly_in_quarter(inside[0])
    ]


_KINDS: tuple[Callable[[Scene, random.Random], list[Exchange]], ...] = (
    count_questions,
    background_questions,
    category_questions,
    neighbour_questions,
    corner_questions,
)
_MOST_OF_A_KIND = 2  # in a training conversation: else four objects would drown the other questions


# --- regions -------------------------------------------------------------------------------------------


def region_caption(scene: Scene, placed: Placed) -> Exchange:
    article = "an" if scene.background == "orange" else "a"
    text = f"{with_article(placed.name)} on {article} {scene.background} background"
    return Exchange(box_text(placed.box), text, (text,))


def grounded(placed: Placed) -> Exchange:
    return Exchange(f"the {placed.name}", box_text(placed.box))


# --- samples -------------------------------------------------------------------------------------------


class SceneTask:
    """Samples of one of the four tasks; one instance for all splits, so that no scene comes twice."""

    def __init__(self, task: str, seed: int) -> None:
        self.task = task
        self.seed = seed
        self._seen: set[Scene] = set()

    def samples(self, split: Split, count: int) -> Iterator[Sample]:
        rng = generator(self.seed, self.task, split)
        exchanges_of = {
            "scene_captions": self._captions,
            "scene_questions": self._questions,
            "region_captions": self._regions,
            "grounding": self._regions,
        }[self.task]
        for index in range(count):
            while True:
                scene, exchanges = exchanges_of(rng, split, index)
                if exchanges and scene not in self._seen:
                    break
            self._seen.add(scene)
            yield Sample(tuple(exchanges), scene.draw)

    def _captions(self, rng: random.Random, split: Split, index: int) -> tuple[Scene, list[Exchange]]:
        scene = random_scene(rng, 1 + index % 4)
        exchange = caption(scene)
        return scene, [exchange] if exchange else []

    def _questions(self, rng: random.Random, split: Split, index: int) -> tuple[Scene, list[Exchange]]:
        scene = random_scene(rng, rng.randint(1, 4))
        if split == "train":
            found = [kind(scene, rng) for kind in (*_KINDS, category_questions)]
            sampled = [rng.sample(some, min(len(some), _MOST_OF_A_KIND)) for some in found]
            return scene, list(dict.fromkeys(e for some in sampled for e in some))
        # Kinds in turn, not those that happen to apply: the mix is the same in every build.
        candidates = _KINDS[index % len(_KINDS)](scene, rng)
        return scene, [rng.choice(candidates)] if candidates else []

    def _regions(self, rng: random.Random, split: Split, index: int) -> tuple[Scene, list[Exchange]]:
        scene = random_scene(rng, rng.randint(2, 4))
        objects = scene.objects if split == "train" else (rng.choice(scene.objects),)
        if self.task == "grounding":
            return scene, [grounded(placed) for placed in objects]
        return scene, [region_caption(scene, placed) for placed in objects]
