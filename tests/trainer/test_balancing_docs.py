"""docs/balancing.md: its example works as printed, and its tables name what exists."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from tiny_training import make_trainer, read_csv, resume

from trainer.balancing.registry import METHODS, Entry, read_options
from trainer.config import parse_config

PAGE = (Path(__file__).parents[2] / "docs" / "balancing.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.S)


def method_rows() -> list[str]:
    return PAGE[PAGE.index("| name | weights |") :].split("\n\n")[0].splitlines()[2:]


def test_the_example_of_a_new_method_trains_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The class as printed, registered by the line as printed."""
    (code,) = blocks("python")
    module = ModuleType("trainer.balancing.focus")
    exec(code, module.__dict__)
    monkeypatch.setitem(sys.modules, "trainer.balancing.focus", module)
    (line,) = re.findall(r'`"focus": (Entry\(.*?\))`', PAGE)
    monkeypatch.setitem(METHODS, "focus", eval(line, {"Entry": Entry}))
    body = code[code.index("class FocusOptions") :]
    assert len([row for row in body.splitlines() if row.strip()]) <= 20

    config = parse_config({"output_dir": "o", "tasks": "built_in", "comparisons": ["focus"]}, "test")
    assert [comparison.method for comparison in config.comparisons] == ["focus"]
    assert read_options("focus", {"power": 2}).model_dump() == {"aggregation": "token", "power": 2}

    make_trainer("focus", tmp_path / "whole").train()
    make_trainer("focus", tmp_path / "cut", max_steps=4).train()
    resume("focus", tmp_path / "cut")
    expected = read_csv(tmp_path / "whole")
    assert read_csv(tmp_path / "cut") == expected
    assert len({tuple(row[1:]) for row in expected}) == 6


def test_the_configurations_are_valid() -> None:
    for text in blocks("yaml"):
        parse_config({"output_dir": "o", "tasks": "built_in"} | yaml.safe_load(text), "docs/balancing.md")


def test_every_method_has_a_row() -> None:
    names = {name for row in method_rows() for name in re.findall(r"`([a-z0-9_]+)`", row.split("|")[1])}
    assert names == {"stl", *METHODS}


def test_the_defaults_in_the_table_are_the_code_s() -> None:
    rows = {row.split("|")[1].strip(" `"): row for row in method_rows()}
    for name in ("rlw", "dwa", "igbv1", "gradnorm", "lbtw", "famo"):
        assert f"`{read_options(name).aggregation}`" in rows[name]
    options = read_options("dwa")
    assert f"T = {options.temperature:g}, windows of {options.window}" in rows["dwa"]  # type: ignore[attr-defined]
    options = read_options("gradnorm")
    assert f"a = {options.asymmetry:g}, rate {options.learning_rate:g}" in rows["gradnorm"]  # type: ignore[attr-defined]
    options = read_options("famo")
    assert f"rate {options.learning_rate:g}, decay {options.decay:g}" in rows["famo"]  # type: ignore[attr-defined]
    assert f"b = {read_options('lbtw').exponent:g}" in rows["lbtw"]  # type: ignore[attr-defined]
    assert f"tau = {read_options('coba').temperature:g}" in rows["coba"]  # type: ignore[attr-defined]
