"""Covers of real films: genre, decade, director and title are printed on them; split by film."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw

from trainer.data.built_in.catalogue import Split, require_material
from trainer.data.built_in.drawing import BACKGROUNDS, SIDE, canvas, fitting_size, sprite, wrapped, write_text
from trainer.data.built_in.material import Film, films, prolific_directors
from trainer.data.built_in.samples import Exchange, Sample, generator, split_groups

# A genre's cover shows one of these; emoji short names.
PICTOGRAMS: dict[str, tuple[str, ...]] = {
    "Action": ("boom", "fire"),
    "Comedy": ("joy", "clown_face"),
    "Crime": ("police_car", "hocho"),
    "Documentary": ("movie_camera", "earth_africa"),
    "Drama": ("performing_arts", "sob"),
    "Fantasy": ("dragon_face", "unicorn_face"),
    "Horror": ("ghost", "skull"),
    "Musical": ("musical_note", "microphone"),
    "Romance": ("heart", "kiss"),
    "Sci-Fi": ("alien", "robot_face"),
    "War": ("bomb", "crossed_swords"),
    "Western": ("face_with_cowboy_hat", "cactus"),
}
# Asked for only where the name comes often enough to be learnt.
KNOWN_DIRECTORS = 24

GENRE = "What is the genre of the film?"
DECADE = "In which decade was the film released?"
DIRECTOR = "Who directed the film?"
TITLE = "What is the title of the film?"
_TITLE_SHARE = 0.25  # of training covers: titles are never seen twice, most of such an answer cannot be learnt


@dataclass(frozen=True)
class Cover:
    film: Film
    background: str
    pictogram: str

    def draw(self) -> Image.Image:
        image = canvas(BACKGROUNDS[self.background])
        size = fitting_size(self.film.title, 150, 20)
        lines = [self.film.title]
        if size < 15:
            size = 16
            lines = wrapped(self.film.title, size, 152)
        for row, line in enumerate(lines):
            y = 20 if len(lines) == 1 else 11 + 19 * row
            write_text(image, (80, y), line, fitting_size(line, 152, size), stroke=0.4)
        ImageDraw.Draw(image).rectangle((0, 42, SIDE, 70), fill="black")
        write_text(image, (80, 56), self.film.genre, 25, colour="white", stroke=0.5)
        picture = sprite(self.pictogram, 54)
        image.paste(picture, (36 - picture.width // 2, 102 - picture.height // 2), picture)
        write_text(image, (114, 102), str(self.film.year), 37, stroke=0.8)
        write_text(image, (80, 146), self.film.director, fitting_size(self.film.director, 154, 19), stroke=0.4)
        return image


@lru_cache(maxsize=2)
def films_by_split(seed: int) -> dict[Split, list[Film]]:
    """Every usable film in one split, in an order whose beginning has genres and decades evenly mixed."""
    by_number = {str(film.number): film for film in films()}
    groups = split_groups(list(by_number), generator(seed, "film_covers", "films"))
    return {
        split: evenly_mixed(
            [by_number[n] for n in sorted(numbers, key=int)], generator(seed, "film_covers", split, "order")
        )
        for split, numbers in groups.items()
    }


def evenly_mixed(pool: list[Film], rng: random.Random) -> list[Film]:
    """Take one film of each (genre, decade) in turn; films of the known directors come first in theirs."""
    known = prolific_directors(KNOWN_DIRECTORS)
    pool = pool.copy()
    rng.shuffle(pool)
    pool.sort(key=lambda film: film.director in known)  # stable; popped from the end
    cells: dict[tuple[str, str], list[Film]] = {}
    for film in pool:
        cells.setdefault((film.genre, film.decade), []).append(film)
    ordered: list[Film] = []
    while cells:
        for key in rng.sample(sorted(cells), len(cells)):
            ordered.append(cells[key].pop())
            if not cells[key]:
                del cells[key]
    return ordered


def samples(seed: int, split: Split, count: int) -> Iterator[Sample]:
    pool = films_by_split(seed)[split]
    require_material("film_covers", split, count, len(pool), "films")
    chosen = pool[:count]
    rng = generator(seed, "film_covers", split)
    rng.shuffle(chosen)
    for film in chosen:
        cover = Cover(film, rng.choice(sorted(BACKGROUNDS)), rng.choice(PICTOGRAMS[film.genre]))
        yield Sample(tuple(_exchanges(film, split, rng)), cover.draw)


def _exchanges(film: Film, split: Split, rng: random.Random) -> list[Exchange]:
    known = film.director in prolific_directors(KNOWN_DIRECTORS)
    genre, decade = Exchange(GENRE, film.genre), Exchange(DECADE, film.decade)
    director, title = Exchange(DIRECTOR, film.director), Exchange(TITLE, film.title)
    if split == "train":
        asked = [genre, decade, *([director] if known else [])]
        return [*asked, title] if rng.random() < _TITLE_SHARE else asked
    shares = (20, 20, 50, 10) if known else (45, 45, 0, 10)
    return rng.choices((genre, decade, director, title), shares)
