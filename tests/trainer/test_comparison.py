"""Eq. 12-14 against the paper's own numbers and hand-computed cases."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from trainer.comparison import compare, compare_to_json

PAPER = json.loads((Path(__file__).parent / "paper_tables.json").read_text())
ROWS = [(table, name) for table in ("table_2", "table_4") for name in PAPER[table]]


def paper_results(methods):
    def nested(row):
        table = {}
        for (task, metric), value in zip(PAPER["columns"], row, strict=False):
            table.setdefault(task, {})[metric] = value
        return table

    return {
        "tasks": nested(["higher"] * len(PAPER["columns"])),
        "baseline": nested(PAPER["STL"]),
        "methods": {name: nested(row) for name, row in methods.items()},
    }


@pytest.mark.parametrize(("table", "name"), ROWS)
def test_paper_rows(table, name):
    row = PAPER[table][name]
    found = compare(paper_results({name: row}))[name]
    # Printed with two decimals: half a unit in the last place, and the float's own dust.
    assert abs(found.delta_i - row[-2]) <= 0.005 + 1e-9
    assert abs(found.delta_e - row[-1]) <= 0.005 + 1e-9


def test_all_seventeen_rows_are_there():
    assert len(ROWS) == 17


@pytest.fixture
def results():
    return {
        "tasks": {"a": {"EM": "higher", "loss": "lower"}, "b": {"EM": "higher"}},
        "baseline": {"a": {"EM": 50.0, "loss": 2.0}, "b": {"EM": 40.0}},
        "methods": {"m": {"a": {"EM": 55.0, "loss": 1.0}, "b": {"EM": 30.0}}},
    }


def test_worked_out(results):
    # a: EM +10 %, loss halved +50 % -> mean +30 %; b: -25 %. Delta I = 2.5 %, Delta E = 12.5 %.
    assert compare_to_json(results) == {
        "m": {
            "delta_i": pytest.approx(2.5, abs=1e-12),
            "delta_e": pytest.approx(12.5, abs=1e-12),
            "per_task": {"a": pytest.approx(30, abs=1e-12), "b": pytest.approx(-25, abs=1e-12)},
        }
    }


def test_a_method_with_an_infinite_perplexity_has_none(results):
    """Null in the table; of the baseline it is an error, for every method is divided by it."""
    results["methods"] |= {"lost": {"a": {"EM": 55.0, "loss": None}, "b": {"EM": 30.0}}}
    assert compare_to_json(results)["lost"] is None
    assert compare_to_json(results)["m"]["delta_i"] == pytest.approx(2.5)
    results["baseline"]["a"]["loss"] = None
    with pytest.raises(ValueError, match=r"^baseline\['a'\]\['loss'\] must be a finite number, got null$"):
        compare(results)


def test_method_equal_to_the_baseline_is_zero_and_positive_zero(results):
    results["methods"] = {"same": copy.deepcopy(results["baseline"])}
    assert json.dumps(compare_to_json(results)["same"]["delta_e"]) == "0.0"
    assert compare(results)["same"].delta_i == 0


def test_other_keys_are_ignored(results):
    before = compare(results)
    assert compare({**results, "standard_errors": {}, "baselines": {"majority": {}}}) == before


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("methods", "m", "b"), None, r"methods\['m'\]\['b'\] must be an object"),
        (("methods", "m", "b"), {"Em": 3.0}, r"methods\['m'\]\['b'\] has no metric 'EM'.*'Em'"),
        (("methods", "m", "c"), {"EM": 3.0}, r"methods\['m'\] has task 'c'"),
        (("methods", "m", "b", "F1"), 3.0, r"methods\['m'\]\['b'\] has metric 'F1'"),
        (("methods", "m", "b", "EM"), float("nan"), r"\['b'\]\['EM'\] must be a finite number"),
        (("methods", "m", "b", "EM"), 10**400, r"\['b'\]\['EM'\] must be a finite number"),
        (("methods", "m", "b", "EM"), "30", r"\['b'\]\['EM'\] must be a finite number"),
        (("methods", "m", "b", "EM"), True, r"\['b'\]\['EM'\] must be a finite number"),
        (("baseline", "b", "EM"), 0, r"baseline\['b'\]\['EM'\] is 0"),
        (("baseline", "b", "EM"), -1.0, r"baseline\['b'\]\['EM'\] is -1"),
        (("baseline", "b"), {}, r"baseline\['b'\] has no metric 'EM'"),
        (("tasks", "b", "EM"), "up", r"tasks\['b'\]\['EM'\] must be 'higher' or 'lower', got 'up'"),
        (("tasks", "b"), {}, r"tasks\['b'\] must map"),
        (("tasks",), {}, "'tasks' is empty"),
        (("methods",), [], "'methods' must be an object"),
    ],
)
def test_bad_tables_are_named(results, path, value, message):
    place = results
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        compare(results)


def test_missing_task_is_named(results):
    del results["methods"]["m"]["b"]
    with pytest.raises(ValueError, match=r"methods\['m'\] has no task 'b'"):
        compare(results)
