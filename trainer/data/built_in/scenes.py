"""Scenes of one to four named objects on a plain background: placed without overlap, with exact boxes."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image

from trainer.data.built_in.drawing import BACKGROUNDS, SIDE, canvas, sprite

# Sixty of OpenMoji's ~790 objects: a model trained from scratch for a couple of thousand steps then meets
# each of them a few hundred times. Chosen for distinct outlines and colours. name -> emoji short name.
OBJECTS: dict[str, dict[str, str]] = {
    "animal": {
        "elephant": "elephant",
        "penguin": "penguin",
        "turtle": "turtle",
        "octopus": "octopus",
        "butterfly": "butterfly",
        "tiger": "tiger2",
        "rooster": "rooster",
        "frog": "frog",
        "flamingo": "flamingo",
        "pig": "pig2",
    },
    "food": {
        "apple": "apple",
        "banana": "banana",
        "watermelon": "watermelon",
        "strawberry": "strawberry",
        "pineapple": "pineapple",
        "carrot": "carrot",
        "hamburger": "hamburger",
        "doughnut": "doughnut",
        "eggplant": "eggplant",
        "avocado": "avocado",
    },
    "vehicle": {
        "bus": "bus",
        "bicycle": "bike",
        "airplane": "airplane",
        "helicopter": "helicopter",
        "rocket": "rocket",
        "tractor": "tractor",
        "taxi": "taxi",
        "train": "steam_locomotive",
        "scooter": "motor_scooter",
        "ambulance": "ambulance",
    },
    "clothing": {
        "hat": "tophat",
        "dress": "dress",
        "shirt": "shirt",
        "shoe": "high_heel",
        "boot": "boot",
        "cap": "billed_cap",
        "kimono": "kimono",
        "crown": "crown",
        "scarf": "scarf",
        "handbag": "handbag",
    },
    "plant": {
        "sunflower": "sunflower",
        "cactus": "cactus",
        "fir tree": "evergreen_tree",
        "palm tree": "palm_tree",
        "tulip": "tulip",
        "rose": "rose",
        "mushroom": "mushroom",
        "maple leaf": "maple_leaf",
        "clover": "four_leaf_clover",
        "bouquet": "bouquet",
    },
    "thing": {
        "key": "key",
        "hammer": "hammer",
        "umbrella": "umbrella",
        "clock": "alarm_clock",
        "candle": "candle",
        "camera": "camera",
        "guitar": "guitar",
        "chair": "chair",
        "balloon": "balloon",
        "gift": "gift",
    },
}
# Longer side in pixels by number of objects: as large as still fits, and never under a few encoder cells.
_SIDES = {1: (64, 90), 2: (52, 76), 3: (46, 66), 4: (42, 58)}
_SIDE_STEP = 2  # even sides only: fewer sprites to draw and keep
_GAP = 4
_TRIES = 8  # places for one object before the whole scene is drawn anew

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Placed:
    """An object at its place; ``box`` is (left, top, right, bottom) in pixels, right and bottom exclusive."""

    name: str
    category: str
    side: int
    box: Box

    @property
    def centre(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class Scene:
    background: str
    objects: tuple[Placed, ...]  # no two of the same name

    def draw(self) -> Image.Image:
        image = canvas(BACKGROUNDS[self.background])
        for placed in self.objects:
            picture = sprite(OBJECTS[placed.category][placed.name], placed.side)
            image.paste(picture, placed.box[:2], picture)
        return image


def random_scene(rng: random.Random, count: int) -> Scene:
    """``count`` different objects; categories equally likely, so that asking for one gives nothing away."""
    background = rng.choice(sorted(BACKGROUNDS))
    chosen: dict[str, str] = {}
    while len(chosen) < count:
        category = rng.choice(sorted(OBJECTS))
        chosen.setdefault(rng.choice(sorted(OBJECTS[category])), category)
    while True:
        objects = _placed(rng, chosen)
        if objects is not None:
            return Scene(background, objects)


def _placed(rng: random.Random, chosen: dict[str, str]) -> tuple[Placed, ...] | None:
    smallest, largest = _SIDES[len(chosen)]
    objects: list[Placed] = []
    for name, category in chosen.items():
        side = rng.randrange(smallest, largest + 1, _SIDE_STEP)
        width, height = sprite(OBJECTS[category][name], side).size
        for _ in range(_TRIES):
            left, top = rng.randint(0, SIDE - width), rng.randint(0, SIDE - height)
            box = (left, top, left + width, top + height)
            if not any(_touch(box, other.box) for other in objects):
                objects.append(Placed(name, category, side, box))
                break
        else:
            return None
    return tuple(objects)


def _touch(a: Box, b: Box) -> bool:
    return (
        a[0] < b[2] + _GAP and b[0] < a[2] + _GAP and a[1] < b[3] + _GAP and b[1] < a[3] + _GAP
    )  # boxes grown by the gap


def box_text(box: Box) -> str:
    """``[x1,y1,x2,y2]`` in parts of the image's side, two decimals."""
    return "[" + ",".join(f"{edge / SIDE:.2f}" for edge in box) + "]"


def with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
