"""Bar charts of real tables: which bar is longest or shortest, a value, the title; split by series.

Every table is in percent or years, so that all charts share one axis from 0 to 100 and "to the nearest
ten" means the same everywhere. A category keeps its colour in all charts of its table.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw

from trainer.data.built_in import material
from trainer.data.built_in.catalogue import Split
from trainer.data.built_in.drawing import BACKGROUNDS, Colour, canvas, fitting_size, write_text
from trainer.data.built_in.samples import Exchange, Sample, generator, split_groups

BAR_COLOURS: tuple[Colour, ...] = (
    (214, 39, 40),
    (31, 88, 200),
    (34, 139, 34),
    (240, 120, 0),
    (128, 50, 170),
    (0, 150, 160),
    (110, 60, 20),
    (225, 60, 150),
)
AXIS_LEFT, PIXELS_PER_UNIT = 8, 1.4
SHORTEST = 2.0  # a bar that can still be seen, three pixels
CLEAR = 5.0  # the longest and shortest bar differ from the next by this much at least (7 pixels)
_PLOT_TOP, _PLOT_BOTTOM = 26, 147

HIGHEST = "Which bar is the longest?"
LOWEST = "Which bar is the shortest?"
TITLE = "What is the title of the chart?"

Values = dict[str, float]  # category -> value


@dataclass(frozen=True)
class Table:
    title: str
    categories: tuple[str, ...]
    series: dict[str, Values]
    groups: dict[str, str]  # series -> what must not be torn apart by the split


@dataclass(frozen=True)
class Chart:
    title: str
    series: str
    bars: tuple[tuple[str, float, Colour], ...]
    background: str

    @property
    def key(self) -> tuple:
        """What makes it another chart; not the background: in another colour it would be the same."""
        return self.title, self.series, tuple(category for category, _, _ in self.bars)

    def draw(self) -> Image.Image:
        image = _paper(self.title, self.background).copy()
        draw = ImageDraw.Draw(image)
        room = (_PLOT_BOTTOM - _PLOT_TOP) / len(self.bars)
        for row, (category, value, colour) in enumerate(self.bars):
            top = round(_PLOT_TOP + row * room)
            bar_top, bar_bottom = top + 15, round(_PLOT_TOP + (row + 1) * room) - 3
            write_text(image, (AXIS_LEFT + 3, top + 8), category, 14, anchor="lm", stroke=0.3)
            right = AXIS_LEFT + round(value * PIXELS_PER_UNIT)
            draw.rectangle((AXIS_LEFT, bar_top, right - 1, bar_bottom), fill=colour)
        return image


@lru_cache(maxsize=64)
def _paper(title: str, background: str) -> Image.Image:
    """Everything but the bars: title, grid and axis."""
    image = canvas(BACKGROUNDS[background])
    draw = ImageDraw.Draw(image)
    write_text(image, (80, 12), title, fitting_size(title, 150, 18), stroke=0.4)
    for value in range(0, 101, 10):
        x = AXIS_LEFT + round(value * PIXELS_PER_UNIT)
        shade = (90, 90, 90) if value % 50 == 0 else (150, 150, 150)
        draw.line((x, _PLOT_TOP, x, _PLOT_BOTTOM), fill=shade)
        if value % 50 == 0:
            write_text(image, (x, 153), str(value), 11)
    return image


# --- tables --------------------------------------------------------------------------------------------


def _years_together(year: int) -> str:
    return f"{year // 4 * 4}"  # neighbouring years are nearly the same row


def _degrees() -> Table:
    columns = {
        "Art": "Art and Performance",
        "Biology": "Biology",
        "Business": "Business",
        "Computing": "Computer Science",
        "Education": "Education",
        "Engineering": "Engineering",
        "English": "English",
        "Farming": "Agriculture",
    }
    rows = {r["Year"]: r for r in material.table("percent-bachelors-degrees-women-usa.csv")}
    series = {year: {c: float(row[full]) for c, full in columns.items()} for year, row in rows.items()}
    return Table("Women graduates", tuple(columns), series, {y: _years_together(int(y)) for y in series})


def _life_expectancy() -> Table:
    countries = ("Brazil", "China", "Egypt", "India", "Japan", "Kenya", "Mexico", "Nigeria")
    series: dict[str, Values] = defaultdict(dict)
    for row in material.table("gapminder.csv.gz"):
        if row["country"] in countries and row["life_expectancy"]:
            series[row["year"]][row["country"]] = float(row["life_expectancy"])
    return Table("Life expectancy", countries, dict(series), {y: _years_together(int(y)) for y in series})


def _ages() -> Table:
    bands: dict[str, tuple[int, int]] = {
        "Under 15": (0, 15),
        "15 to 29": (15, 30),
        "30 to 44": (30, 45),
        "45 to 59": (45, 60),
    }
    bands["60 and over"] = (60, 200)
    people: dict[tuple[str, str], Values] = defaultdict(lambda: dict.fromkeys(bands, 0.0))
    for row in material.table("population.csv.gz"):
        if row["Year"] in ("1960", "1980", "2000", "2020") and row["Value"]:
            age = int(row["AgeGrpStart"])
            band = next(b for b, (low, high) in bands.items() if low <= age < high)
            people[row["Location"], row["Year"]][band] += float(row["Value"])
    series: dict[str, Values] = {}
    groups: dict[str, str] = {}
    for (place, year), counts in people.items():
        total = sum(counts.values())
        if total:
            series[f"{place} {year}"] = {band: 100 * n / total for band, n in counts.items()}
            groups[f"{place} {year}"] = place
    return Table("People by age", tuple(bands), series, groups)


def _film_scores() -> Table:
    genres = ("Action", "Comedy", "Crime", "Drama", "Horror", "Musical", "Romance", "War")
    series: dict[str, Values] = defaultdict(dict)
    for (year, genre), score in sorted(material.film_scores().items()):
        if genre in genres:
            series[str(year)][genre] = score
    return Table("Film ratings", genres, dict(series), {y: _years_together(int(y)) for y in series})


@lru_cache(maxsize=1)
def tables() -> tuple[Table, ...]:
    return (_degrees(), _life_expectancy(), _ages(), _film_scores())


# --- samples -------------------------------------------------------------------------------------------


def nearest_ten(value: float) -> str | None:
    """The value as it is asked for; None close to the middle between two tens, where reading is a guess."""
    answer = int(value / 10 + 0.5) * 10
    return str(answer) if abs(value - answer) <= 4 else None


def value_question(category: str) -> str:
    return f"What is the value of {category} to the nearest ten?"


def random_chart(rng: random.Random, table: Table, series: list[str]) -> Chart:
    """Three or four bars of one series; the longest is drawn first, so that no category usually wins."""
    while True:
        name = rng.choice(series)
        values = {c: v for c, v in table.series[name].items() if SHORTEST <= v <= 100}
        count = rng.choice((3, 4))
        longest = rng.choice(table.categories)
        if longest not in values:
            continue
        below = [c for c in table.categories if c in values and values[c] <= values[longest] - CLEAR]
        if len(below) < count - 1:
            continue
        shown = [longest, *rng.sample(below, count - 1)]
        shortest, second = sorted(values[c] for c in shown)[:2]
        if second - shortest < CLEAR:
            continue
        rng.shuffle(shown)
        bars = tuple((c, values[c], BAR_COLOURS[table.categories.index(c)]) for c in shown)
        return Chart(table.title, name, bars, rng.choice(sorted(BACKGROUNDS)))


def _exchanges(chart: Chart, rng: random.Random) -> dict[str, list[Exchange]]:
    by_value = sorted(chart.bars, key=lambda bar: bar[1])
    readable = [(c, answer) for c, v, _ in chart.bars if (answer := nearest_ten(v)) is not None]
    asked = rng.sample(readable, min(2, len(readable)))
    return {
        "highest": [Exchange(HIGHEST, by_value[-1][0])],
        "lowest": [Exchange(LOWEST, by_value[0][0])],
        "value": [Exchange(value_question(c), answer) for c, answer in asked],
        "title": [Exchange(TITLE, chart.title)],
    }


class Charts:
    """Samples of all splits; one instance, so that no chart comes twice."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._seen: set[tuple] = set()
        rng = generator(seed, "charts", "series")
        self._series: list[dict[Split, list[str]]] = []
        for table in tables():
            groups = split_groups(sorted(set(table.groups.values())), rng)
            self._series.append({s: sorted(n for n in table.series if table.groups[n] in groups[s]) for s in groups})

    def samples(self, split: Split, count: int) -> Iterator[Sample]:
        rng = generator(self.seed, "charts", split)
        for _ in range(count):
            kind = rng.choices(("highest", "lowest", "value", "title"), (30, 25, 30, 15))[0]
            while True:
                which = rng.randrange(len(tables()))
                chart = random_chart(rng, tables()[which], self._series[which][split])
                asked = _exchanges(chart, rng)
                if asked[kind] and chart.key not in self._seen:
                    break
            self._seen.add(chart.key)
            exchanges = [e for some in asked.values() for e in some] if split == "train" else asked[kind][:1]
            yield Sample(tuple(exchanges), chart.draw)

    def readable(self, split: Split, rng: random.Random) -> Chart:
        """A chart that has not been drawn yet, with every value clear of the middle between two tens."""
        which = rng.randrange(len(tables()))
        while True:
            chart = random_chart(rng, tables()[which], self._series[which][split])
            if chart.key not in self._seen and all(nearest_ten(value) for _, value, _ in chart.bars):
                self._seen.add(chart.key)
                return chart
