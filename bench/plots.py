"""Figures of the page, drawn in the style of the trainer's report: inline SVG that follows the page's theme."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from bench.peers import OURS
from bench.results import Row, Run
from trainer.report.plots import PLACEHOLDERS, SERIES, STYLE, svg

Points = tuple[list[float], list[float]]
Stroke = tuple[str, object, str]  # colour, dash, marker
DASHES: tuple[object, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)))
MARKERS = "osD^vP"


def strokes(names: Sequence[str]) -> dict[str, Stroke]:
    """One colour, dash and marker per peer, the same in every figure; ours is solid blue."""
    others = [name for name in names if name != OURS]
    kinds = itertools.cycle(
        (color, dash, MARKERS[k]) for k, dash in enumerate(DASHES) for color in (*SERIES[:4], "gray")
    )
    return {OURS: ("blue", "-", "o"), **dict(zip(others, kinds, strict=False))}


def sweeps(run: Run) -> dict[str, list[Row]]:
    """Training cases that differ in M only, at least two of them, by what they have in common."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in run.rows:
        if row.suite == "linear" and row.case["mode"] == "train" and not row.case["tasks"] and row.entries:
            case = row.case
            common = f"{case['head']} {case['V']}x{case['D']}, {case['supervised']:.0%} supervised, {case['dtype']}"
            found[common].append(row)
    ordered = {name: sorted(rows, key=lambda row: row.case["M"]) for name, rows in found.items()}
    return {name: rows for name, rows in ordered.items() if len({row.case["M"] for row in rows}) > 1}


def times(rows: Sequence[Row]) -> dict[str, Points]:
    """Milliseconds against M of everybody timed."""
    lines: dict[str, Points] = defaultdict(lambda: ([], []))
    for row in rows:
        for entry in row.entries:
            if entry.seconds:
                lines[entry.name][0].append(row.case["M"])
                lines[entry.name][1].append(1e3 * entry.seconds[1])
    return dict(lines)


def memories(rows: Sequence[Row]) -> dict[str, Points]:
    """MiB beyond inputs and outputs against M, where two sizes were measured; nothing below 1 MiB can be drawn."""
    lines: dict[str, Points] = defaultdict(lambda: ([], []))
    for row in rows:
        for entry in row.entries:
            if entry.memory is not None:
                lines[entry.name][0].append(row.case["M"])
                lines[entry.name][1].append(max(1.0, entry.memory / 2**20))
    sizes = {size for sizes, _ in lines.values() for size in sizes}
    return dict(lines) if len(sizes) > 1 else {}


def against_size(panels: Mapping[str, Mapping[str, Points]], ylabel: str, label: str) -> str:
    """One panel per sweep, both axes logarithmic."""
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    style = strokes(names)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(5.4, 4.2 * len(panels)), 3.6), layout="constrained")
        handles = {}
        for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            for name, (x, y) in lines.items():
                color, dash, marker = style[name]
                (handles[name],) = axes.plot(
                    x,
                    y,
                    color=PLACEHOLDERS[color],
                    linestyle=dash,
                    marker=marker,
                    markersize=3.5,
                    linewidth=2.0 if name == OURS else 1.2,
                    label=name,
                )
            axes.set_title(title, fontsize=9, loc="left", color=PLACEHOLDERS["ink"])
            _logarithmic(axes, sorted({value for x, _ in lines.values() for value in x}))
        figure.supxlabel("positions M", fontsize=8.5, color=PLACEHOLDERS["muted"])
        figure.supylabel(ylabel, fontsize=8.5, color=PLACEHOLDERS["muted"])
        figure.legend(list(handles.values()), list(handles), loc="outside upper left", ncols=3, handlelength=2.4)
        return svg(figure, label)


def _logarithmic(axes: Axes, sizes: Sequence[float]) -> None:
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(ScalarFormatter())
    low, high = axes.get_ylim()
    if high / low < 10:  # less than a decade: the ticks between carry the numbers
        axes.yaxis.set_minor_formatter(ScalarFormatter())
    else:
        axes.yaxis.set_minor_formatter(NullFormatter())


def floors(rows: Sequence[Row]) -> str:
    """Multiples of the bare products, one group per case; 1 is the floor."""
    names = list(dict.fromkeys(entry.name for row in rows for entry in row.entries if entry.seconds))
    style = strokes(names)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.8, 0.6 + sum(0.35 + 0.17 * len(names) for _ in rows)), layout="constrained")
        axes = figure.subplots()
        at, ticks, handles = 0.0, [], {}
        for row in rows:
            assert row.floor is not None
            start = at
            for name in names:
                entry = row.entry(name)
                if entry is None or entry.seconds is None:
                    continue
                value = entry.seconds[1] / row.floor
                bar = axes.barh(at, value, height=0.8, color=PLACEHOLDERS[style[name][0]], label=name)
                axes.annotate(
                    f"{value:.2f}  {name}", (value, at), (4, 0), textcoords="offset points", va="center", fontsize=7
                )
                handles[name] = bar
                at += 1
            ticks.append(((start + at - 1) / 2, row))
            at += 1
        axes.axvline(1, color=PLACEHOLDERS["ink"], linewidth=1, linestyle=(0, (4, 3)))
        axes.set_yticks(
            [place for place, _ in ticks],
            [f"{row.case['head']}\nM={row.case['M']}\n{row.case['supervised']:.0%}" for _, row in ticks],
        )
        axes.tick_params(axis="y", labelcolor=PLACEHOLDERS["ink"], length=0)
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.3)
        axes.set_xlim(left=0)
        axes.invert_yaxis()
        axes.set_xlabel("multiple of the bare products over the supervised rows")
        return svg(figure, "Time as a multiple of the bare matrix products")
