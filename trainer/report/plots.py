"""Figures of the report as inline SVG.

Every colour drawn here is a placeholder that is replaced by a CSS variable of the page, so that one figure
serves the light and the dark theme; text stays text and takes the page's font.
"""

from __future__ import annotations

import html
import io
import itertools
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Dash = str | tuple[int, tuple[float, ...]]
Curve = tuple[Sequence[float], Sequence[float]]

PLACEHOLDERS = {
    "ink": "#100000",
    "muted": "#100001",
    "grid": "#100002",
    "surface": "#100003",
    "blue": "#100004",
    "orange": "#100005",
    "gray": "#100006",
    "green": "#100007",
    "violet": "#100008",
    "gold": "#100009",
}
METHOD_COLORS = {"CoTBal": "blue", "EW": "orange", "STL": "gray"}
SERIES = ("green", "gold", "violet", "orange", "blue")
DASHES: tuple[Dash, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # task names are text, "$" included
    "font.size": 8.5,
    "text.color": PLACEHOLDERS["ink"],
    "axes.labelcolor": PLACEHOLDERS["muted"],
    "axes.edgecolor": PLACEHOLDERS["grid"],
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": PLACEHOLDERS["grid"],
    "grid.linewidth": 0.6,
    "xtick.color": PLACEHOLDERS["grid"],
    "ytick.color": PLACEHOLDERS["grid"],
    "xtick.labelcolor": PLACEHOLDERS["muted"],
    "ytick.labelcolor": PLACEHOLDERS["muted"],
    "legend.frameon": False,
    "legend.labelcolor": PLACEHOLDERS["ink"],
}


def method_strokes(names: Iterable[str]) -> dict[str, tuple[str, Dash]]:
    """Colour and dash of every method, no two alike; those without a colour of their own take what is left in turn."""
    taken = [(color, "-") for color in METHOD_COLORS.values()]
    free = itertools.cycle(
        [stroke for dash in DASHES for color in (*SERIES, "gray") if (stroke := (color, dash)) not in taken]
    )
    return {name: (METHOD_COLORS[name], "-") if name in METHOD_COLORS else next(free) for name in dict.fromkeys(names)}


def legend(figure: Figure, handles: Mapping[str, Any], **options: Any) -> None:
    """Above the axes, in as many columns as the figure is wide; the figure grows by the rows, and by a long name.

    Widths are of matplotlib's own font, which is wider than the usual ones of a page.
    """
    renderer = FigureCanvasAgg(figure).get_renderer()
    for columns in range(max(len(handles), 1), 0, -1):
        drawn = figure.legend(list(handles.values()), list(handles), loc="outside upper left", ncols=columns, **options)
        width = drawn.get_window_extent(renderer).width / figure.dpi + 0.2  # and what is left free at the sides
        if width <= figure.get_figwidth() or columns == 1:
            break
        drawn.remove()
    more_rows = math.ceil(len(handles) / columns) - 1
    figure.set_size_inches(max(width, figure.get_figwidth()), figure.get_figheight() + 0.18 * more_rows)


def svg(figure: Figure, label: str) -> str:
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": label, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    view = re.search(r'viewBox="([^"]+)"', text)
    assert view is not None
    title = html.escape(label)
    head = f'<svg viewBox="{view.group(1)}" role="img" aria-label="{title}"><title>{title}</title>'
    text = head + text[text.index(">") + 1 :]
    # matplotlib numbers its groups alike in every figure; keep the ids that something refers to.
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda found: found.group(0) if found.group(1) in used else "", text)
    for name, color in PLACEHOLDERS.items():
        text = text.replace(color, f"var(--{name})")
    text = re.sub(r"font:( [0-9.]+px) [^;\"]+", r"font:\1 inherit", text)
    text = re.sub(r"font-family: [^;\"]+;?", "", text)
    return re.sub(r"font:( [0-9.]+px) inherit", r"font-size:\1", text)


def difficulty_bars(
    tasks: Sequence[str], difficulty: Sequence[float], lower: Collection[str] = (), bounded: Collection[str] = ()
) -> str:
    """Fig. 3b: intra-task difficulty D_i of Eq. 9, one bar per task.

    Args:
        lower: tasks where lower scores are better.
        bounded: tasks whose value is not what Eq. 9 gives.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 0.5 + 0.3 * len(tasks)), layout="constrained")
        axes = figure.subplots()
        rows = range(len(tasks))
        axes.barh(rows, difficulty, height=0.62, color=PLACEHOLDERS["blue"])
        for row, (task, value) in enumerate(zip(tasks, difficulty, strict=True)):
            axes.annotate(
                f"{value:.2f}{'*' if task in bounded else ''}",
                (max(value, 0), row),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
            )
        axes.axvline(0, color=PLACEHOLDERS["muted"], linewidth=0.8)
        axes.set(
            yticks=list(rows),
            yticklabels=[f"{task} ↓" if task in lower else task for task in tasks],
            xlim=(min(0.0, *difficulty), max(1.0, *difficulty) * 1.1),
        )
        axes.tick_params(axis="y", labelcolor=PLACEHOLDERS["ink"], length=0)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.invert_yaxis()
        axes.set_xlabel("D = 1 − V(mini) / V(own + mini)" + ("; ↓: D = 1 − V(own + mini) / V(mini)" if lower else ""))
        return svg(figure, "Bar chart of intra-task difficulty")


def grouped_bars(
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    colors: Mapping[str, str],
    reference: float,
    ylabel: str,
    label: str,
) -> str:
    """One group per task and one bar per series, with a line at the reference value."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(5.4, 1.1 * len(groups)), 3.1), layout="constrained")
        axes = figure.subplots()
        width = 0.8 / max(len(series), 1)
        handles = {}
        for k, (name, values) in enumerate(series.items()):
            left = [g + (k - (len(series) - 1) / 2) * width for g in range(len(groups))]
            handles[name] = axes.bar(left, values, width=width * 0.9, color=PLACEHOLDERS[colors[name]])
        axes.axhline(reference, color=PLACEHOLDERS["ink"], linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xticks(range(len(groups)), [_wrap(group) for group in groups])
        axes.tick_params(axis="x", labelcolor=PLACEHOLDERS["ink"], length=0)
        axes.grid(visible=False, axis="x")
        axes.set_ylabel(ylabel)
        legend(figure, handles, handlelength=1, handleheight=1)
        return svg(figure, label)


def loss_curves(panels: Mapping[str, Mapping[str, Curve]]) -> str:
    """One panel per task; a faint line per logged step and a smoothed one per method."""
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    strokes = method_strokes(method for curves in panels.values() for method in curves)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.1 * columns + 0.6, 1.75 * rows + 0.5), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        handles = {}
        for axes, (task, curves) in zip(grid, panels.items(), strict=False):
            for method, (x, y) in curves.items():
                color, dash = strokes[method]
                axes.plot(x, y, color=PLACEHOLDERS[color], linewidth=0.6, alpha=0.3)
                (handles[method],) = axes.plot(x, smooth(y), color=PLACEHOLDERS[color], linestyle=dash, linewidth=1.6)
            axes.set_title(task, fontsize=9, loc="left", color=PLACEHOLDERS["ink"])
            axes.set_xlim(0, 100)
            axes.set_ylim(bottom=0)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        figure.supxlabel("% of the training", fontsize=8.5, color=PLACEHOLDERS["muted"])
        figure.supylabel("cross-entropy per token", fontsize=8.5, color=PLACEHOLDERS["muted"])
        legend(figure, handles, handlelength=2.2)
        return svg(figure, "Training loss of each task")


def weight_curves(panels: Mapping[str, Mapping[str, Curve]]) -> str:
    """One panel per method and one line per task: the weight of every step; equal weighting is the dashed line."""
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    tasks = list(dict.fromkeys(task for curves in panels.values() for task in curves))
    strokes = [(color, dash) for dash in DASHES for color in (*SERIES, "gray")]
    style = {task: strokes[k % len(strokes)] for k, task in enumerate(tasks)}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.7 * columns + 0.6, 1.9 * rows + 0.7), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        handles = {}
        for axes, (method, curves) in zip(grid, panels.items(), strict=False):
            axes.axhline(1.0, color=PLACEHOLDERS["ink"], linewidth=0.8, linestyle=(0, (4, 3)))
            for task, (x, y) in curves.items():
                color, dash = style[task]
                (handles[task],) = axes.plot(*thinned(x, y), color=PLACEHOLDERS[color], linestyle=dash, linewidth=1.1)
            axes.set_title(method, fontsize=9, loc="left", color=PLACEHOLDERS["ink"])
            axes.set_ylim(bottom=0)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        figure.supxlabel("optimizer step", fontsize=8.5, color=PLACEHOLDERS["muted"])
        figure.supylabel("task weight λ", fontsize=8.5, color=PLACEHOLDERS["muted"])
        legend(figure, handles, handlelength=2.2)
        return svg(figure, "Task weights during training")


def thinned(x: Sequence[float], y: Sequence[float], most: int = 300) -> tuple[Sequence[float], Sequence[float]]:
    """At most `most` points, evenly spaced, the last one among them: a page is no place for 100,000 steps."""
    if len(x) <= most:
        return x, y
    kept = [round(k * (len(x) - 1) / (most - 1)) for k in range(most)]
    return [x[k] for k in kept], [y[k] for k in kept]


def smooth(values: Sequence[float], share: float = 0.06) -> list[float]:
    """Centred moving average over ``share`` of the points to either side, shorter at the ends: no lag."""
    reach = round(share * len(values))
    sums = [0.0, *itertools.accumulate(values)]
    out = []
    for k in range(len(values)):
        side = min(reach, k, len(values) - 1 - k)
        out.append((sums[k + side + 1] - sums[k - side]) / (2 * side + 1))
    return out


def radar(tasks: Sequence[str], ratios: Mapping[str, Sequence[float]]) -> str:
    """Fig. 2: score of each method relative to the single-task model's, one spoke per task, STL = 100 %."""
    values = [value for row in ratios.values() for value in row] + [1.0]
    # Leave the centre out when nothing comes near it, or the differences cannot be seen.
    low = max(0.0, math.floor((min(values) - 0.15) * 10) / 10) if min(values) > 0.5 else 0.0
    high = math.ceil(max(values) * 10 + 0.2) / 10
    angles = [2 * math.pi * k / len(tasks) for k in range(len(tasks))]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 4.6), layout="constrained")
        axes = figure.add_subplot(projection="polar")
        axes.set_theta_offset(math.pi / 2)  # type: ignore[attr-defined]
        axes.set_theta_direction(-1)  # type: ignore[attr-defined]
        closed = [*angles, angles[0]]
        circle = [2 * math.pi * k / 120 for k in range(121)]
        handles = {}
        (handles["STL"],) = axes.plot(
            circle, [1.0] * 121, color=PLACEHOLDERS["gray"], linewidth=1.3, linestyle=(0, (4, 3))
        )
        for method, row in ratios.items():
            color = PLACEHOLDERS[METHOD_COLORS[method]]
            (handles[method],) = axes.plot(
                closed, [*row, row[0]], color=color, linewidth=1.8, marker="o", markersize=3.5
            )
            axes.fill(closed, [*row, row[0]], color=color, alpha=0.1)
        axes.set_ylim(low, high)
        ticks = mpl.ticker.MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        ticks = [tick for tick in ticks if low < tick <= high]
        axes.set_yticks(ticks, [f"{100 * tick:.0f}%" for tick in ticks], fontsize=7.5)
        axes.set_xticks(angles, [_wrap(task) for task in tasks])
        axes.tick_params(axis="x", labelcolor=PLACEHOLDERS["ink"], pad=7)
        axes.set_rlabel_position(180 / len(tasks))  # type: ignore[attr-defined]  # between two spokes
        axes.spines["polar"].set_visible(False)
        legend(figure, handles, handlelength=1.4)
        return svg(figure, "Radar chart of scores relative to single-task models")


def _wrap(name: str, width: int = 11) -> str:
    """Break a task name at spaces, dashes and underscores so that neighbouring labels do not collide."""
    lines = [""]
    for part in re.findall(r"[^\s_-]+[\s_-]?", name) or [name]:
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)
