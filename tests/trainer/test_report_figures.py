"""Figures of the report as matplotlib lays them out: which line is whose, and that legends are whole."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from matplotlib.figure import Figure

from trainer.report import plots
from trainer.report.balancing import STRATEGIES


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures, laid out, in place of their SVG."""
    figures: list[Figure] = []

    def keep(figure: Figure, label: str) -> str:
        figure.draw_without_rendering()
        figures.append(figure)
        return label

    monkeypatch.setattr(plots, "svg", keep)
    return figures


def stroke(line: Any) -> tuple[Any, ...]:
    return line.get_color(), line.get_linestyle(), *map(str, line._unscaled_dash_pattern)


OTHERS = ["TLA", "uniform", "RLW", "DWA", "IGBv1", "GradNorm", "LBTW", "FAMO", "GradNorm*", "LBTW*", "FAMO*", "CoBa"]


@pytest.mark.parametrize("others", [2, len(OTHERS)])
def test_a_method_is_the_same_line_in_every_panel_and_no_other_method_s(drawn: list[Figure], others: int) -> None:
    """A task's curves are constant at the method's place in `names`. An auxiliary task has no single-task model."""
    names = ["STL", "EW", *OTHERS[:others], "CoTBal"]
    curves = {name: ((0.0, 100.0), (place, place)) for place, name in enumerate(names)}
    without = {name: curve for name, curve in curves.items() if name != "STL"}
    plots.loss_curves({"chat": without, "a": curves, "b": curves})
    (figure,) = drawn
    (legend,) = figure.legends
    told = {text.get_text(): stroke(line) for text, line in zip(legend.get_texts(), legend.get_lines(), strict=True)}
    assert set(told) == set(names)
    assert len(set(told.values())) == len(names)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert len(panels) == 3
    for axes in panels:
        solid = [line for line in axes.lines if line.get_alpha() is None]  # the logged values are faint
        found = {names[round(float(line.get_ydata()[0]))]: stroke(line) for line in solid}
        assert found == {name: told[name] for name in found}
        assert set(found) >= set(names) - {"STL"}


LONG = "a_task_with_a_name_that_is_longer_than_the_figure_of_one_panel_is_wide"
ONE = ((0.0, 1.0), (1.0, 2.0))


@pytest.mark.parametrize("count", [1, 4])
def test_legends_end_inside_their_figures(drawn: list[Figure], count: int) -> None:
    tasks = [f"task_number_{number}" for number in range(count)]
    labels = dict(STRATEGIES.values())
    plots.grouped_bars(tasks, {label: [1.0] * count for label in labels}, labels, 1.0, "weight", "weights")
    plots.loss_curves({tasks[0]: {f"method {n}": ONE for n in range(3 * count)}})
    plots.weight_curves({"RLW": dict.fromkeys([*tasks, LONG], ONE)})
    plots.radar([*tasks, "b", "c"], {"EW": [1.0] * (count + 2), "CoTBal": [1.0] * (count + 2)})
    assert len(drawn) == 4
    for figure in drawn:
        (legend,) = figure.legends
        for text in legend.get_texts():
            box = text.get_window_extent()
            assert 0 <= box.x0 < box.x1 <= figure.bbox.width, text.get_text()
            assert 0 <= box.y0 < box.y1 <= figure.bbox.height, text.get_text()
        for axes in figure.axes:
            assert not axes.get_visible() or axes.get_position().height * figure.get_figheight() > 0.5


def test_long_curves_are_thinned_to_their_ends() -> None:
    x, y = plots.thinned(range(1000), range(1000, 2000))
    assert (len(x), x[0], x[-1]) == (300, 0, 999)
    assert [b - a for a, b in zip(x, y, strict=True)] == [1000] * 300
    assert {b - a for a, b in itertools.pairwise(x)} == {3, 4}
    assert plots.thinned(range(300), range(300)) == (range(300), range(300))
