"""What every task module yields: an image with its questions, before it becomes a record."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from trainer.data.built_in.catalogue import Split


@dataclass(frozen=True)
class Exchange:
    """A question, its answer, and further answers that a caption may be compared with."""

    question: str
    answer: str
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """All exchanges about one image (training), or the only one (validation, test).

    ``draw`` makes the image; None for text. ``shuffle`` is False where the order carries the meaning.
    """

    exchanges: tuple[Exchange, ...]
    draw: Callable[[], Image.Image] | None
    shuffle: bool = True


def generator(seed: int, *names: str) -> random.Random:
    """An own generator per purpose, so that one task's draws never shift another's."""
    return random.Random("/".join([str(seed), *names]))


def split_groups(groups: list[str], rng: random.Random) -> dict[Split, set[str]]:
    """Deal groups (films, series) out to the splits, the same way whatever sizes are asked."""
    shuffled = sorted(groups)
    rng.shuffle(shuffled)
    test, validation = len(shuffled) // 5, len(shuffled) // 10
    return {
        "test": set(shuffled[:test]),
        "validation": set(shuffled[test : test + validation]),
        "train": set(shuffled[test + validation :]),
    }
