"""docs/balancing.md: its example works as printed, and its tables name what exists."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from tiny_training import collate, make_trainer, read_csv, resume, samples, tiny_model

from cotbal_kernels import ConvergenceBalancer
from trainer.balancing.cotbal import cotbal_weights
from trainer.balancing.registry import METHODS, Entry, read_options
from trainer.balancing.scores import Scores
from trainer.comparison import compare_to_json
from trainer.config import parse_config

PAGE = (Path(__file__).parents[2] / "docs" / "balancing.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.S)


def method_rows() -> list[str]:
    return PAGE[PAGE.index("| name | weights |") :].split("\n\n")[0].splitlines()[2:]


def test_the_example_of_a_new_method_trains_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The class as printed, registered by the line as printed."""
    _, code = blocks("python")
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


def test_coba_in_a_loop_of_one_s_own() -> None:
    """As printed; L_i(0) and the weights against CoBa fed with the losses of the unpatched model."""
    code, _ = blocks("python")
    validation, training = ([collate(samples(9, seed)) for seed in range(first, first + 6)] for first in (0, 6))
    plain, model = tiny_model(), tiny_model()
    names = {"torch": torch, "model": model, "K": 3, "M": 2, "device": "cpu", "training": training}
    names |= {"validation": validation[:2], "optimizer": torch.optim.SGD(model.parameters(), lr=1.0)}
    used = []

    def losses(batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        batch = {key: torch.cat([one[key] for one in batches]) for key in batches[0]}
        logits = plain(batch["input_ids"]).logits[:, :-1].transpose(1, 2)
        entropy = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:], reduction="none")
        own = [batch["loss_task_ids"] == k for k in range(3)]
        return torch.stack([entropy[rows].sum() / (batch["labels"][rows, 1:] != -100).sum() for rows in own])

    reference = ConvergenceBalancer(3, window=4, warmup=2)
    reference.start(losses(validation[:2]).detach())
    step = ConvergenceBalancer.step

    def checked(balancer: ConvergenceBalancer, val_losses: torch.Tensor) -> torch.Tensor:
        plain.load_state_dict(model.state_dict())
        expected = losses([validation[len(used) % 2]]).detach()
        torch.testing.assert_close(val_losses, expected, rtol=1e-5, atol=1e-6)
        used.append((step(balancer, val_losses), step(reference, expected)))
        return used[-1][0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConvergenceBalancer, "step", checked)
        exec(code, names)
    assert len(used) == 6
    for weights, expected in used:
        # Slopes of six losses near each other, which differ by 1e-6.
        torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-3)
    assert (used[-1][0] - 1).abs().max() > 0.1


def test_the_configurations_are_valid() -> None:
    for text in blocks("yaml"):
        parse_config({"output_dir": "o", "tasks": "built_in"} | yaml.safe_load(text), "docs/balancing.md")


def test_the_table_of_scores_gives_the_weights_that_are_told() -> None:
    """Eq. 3-11 on two tasks by hand; the directions and the models of one task alone as the text adds them."""
    (text,) = blocks("json")
    table = json.loads(text)
    c_vc, c_cv = (0.25 - 0.20) / (0.50 - 0.20), (0.30 - 0.31) / (0.60 - 0.31)
    d_v, d_c = 1 - 0.31 / 0.60, 1 - 0.20 / 0.50
    of_vqa = [2 / (1 + math.exp(-gap / 0.5)) for gap in (c_vc - c_cv, d_v - d_c)]  # of two tasks: Eq. 5 is Eq. 7
    expected = sum(of_vqa) / 2
    result = cotbal_weights(Scores.from_json(table))
    assert result.to_json()["weights"] == pytest.approx([expected, 2 - expected], rel=1e-12)
    assert "`weights` (Eq. 11; here {:.2f} and {:.2f})".format(*result.weights) in PAGE
    for key in ("contribution", "difficulty", "lambda_one2all", "lambda_all2one", "lambda_c", "lambda_d", "clipped"):
        assert key in result.to_json()
        assert f"`{key}`" in PAGE
    lower = Scores.from_json(table | {"higher_is_better": {"captions": False}})
    assert lower.higher_is_better.tolist() == [True, False]
    alone = Scores.from_json(table | {"alone": {"mini": table["mini"], "full": {"vqa": 0.62, "captions": 0.40}}})
    assert cotbal_weights(alone, difficulty="precise").difficulty == pytest.approx([1 - 0.31 / 0.62, 1 - 0.20 / 0.40])


def test_the_table_of_results_gives_what_is_told() -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```json\n(.*?)```", page, flags=re.S)
    (told,) = re.findall(r'in percent, `(\{"EW".*\})` with all digits', page)
    found = compare_to_json(json.loads(text))["EW"]
    assert found["delta_i"] == pytest.approx(100 * (78.27 - 77.73) / 77.73)
    rounded = {"delta_i": round(found["delta_i"], 2), "delta_e": 0.0, "per_task": {"VQAv2": round(found["delta_i"], 2)}}
    assert json.loads(told) == {"EW": rounded}
    assert found["delta_e"] == 0.0


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
