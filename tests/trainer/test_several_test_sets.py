"""A task with several test sets and metrics: Eq. 12 over all of them, files and fingerprints by set.

In whole runs trainings are replaced by what they leave behind, and the model's answers by ones whose scores are known
by hand; metrics, results, Delta I and the report are made from them as always.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from several_sets import rows_of, with_test_sets
from stand_ins import Quiet
from synthetic_run import Page

import trainer.nodes.machine as machine
from trainer.comparison import compare
from trainer.config import RunConfig, parse_config
from trainer.data.records import Record, write_jsonl
from trainer.errors import UserError
from trainer.evaluation.progress import Meter
from trainer.evaluation.running import evaluate, finish
from trainer.evaluation.scoring import score_key, scores_by_task
from trainer.evaluation.spec import EvaluationSet, EvaluationSpec
from trainer.files import write_json
from trainer.metrics import get_metric
from trainer.pipeline.algorithm1 import Pipeline
from trainer.pipeline.evaluations import evaluation_sets
from trainer.pipeline.outcome import score_table
from trainer.report import build_report
from trainer.task_config import TaskConfig
from trainer.training import TrainingSpec

# Of "colour": how many answers are right and how many have one word too many, per set of 4 and 3 records.
ANSWERS = {
    "stl-colour": {"testA+": (2, 1), "testB": (1, 2)},
    "ew": {"testA+": (1, 3), "testB": (2, 0)},
    "cotbal": {"testA+": (3, 1), "testB": (1, 1)},
}
# Of "box": loss per token.
LOSSES = {
    "stl-box": {"near": 1.0, "far": 2.0},
    "ew": {"near": 1.25, "far": 1.5},
    "cotbal": {"near": 0.5, "far": 2.25},
}


@pytest.fixture
def data(run_data: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return with_test_sets(run_data, tmp_path)


@pytest.mark.parametrize(
    ("part", "metrics", "keys"),
    [
        ("", ("exact_match",), {"vqa": ("vqa", "EM")}),
        ("", ("exact_match", "bleu"), {"vqa EM": ("vqa", "EM"), "vqa BLEU": ("vqa", "BLEU")}),
        ("dev", ("exact_match",), {"vqa dev EM": ("vqa", "dev EM")}),
    ],
)
def test_every_score_has_a_key_of_its_own(
    part: str, metrics: tuple[str, ...], keys: dict[str, tuple[str, str]]
) -> None:
    """In metrics.json, and back from there to the task and what tables call the score."""
    chosen = EvaluationSet("vqa", (), Path(), metrics, 1, part=part)
    table = {score_key(chosen, name): {"metric": get_metric(name).label, "value": k} for k, name in enumerate(metrics)}
    assert list(table) == list(keys)
    found = scores_by_task(table)
    assert [(task, name) for task, own in found.items() for name in own] == list(keys.values())


def answer(training: str, chosen: EvaluationSet, number: int, record: Record) -> dict[str, Any]:
    """What a model leaves for a record, by the tables above; on validation more data gives more right answers."""
    row = {"id": record.id, "image": record.images[0], "question": "?", "references": record.answers}
    if chosen.teacher_forced:
        return row | {"loss_sum": (number + 1) * LOSSES[training][chosen.part], "tokens": number + 1}
    right, longer = ANSWERS[training][chosen.part] if chosen.part else (1, 0)
    if not chosen.part and training.startswith("plus-"):
        right = 3 if training.endswith(chosen.name) else 2
    texts = [record.answers[0]] * right + [f"{record.answers[0]} perhaps"] * longer
    return row | {"prediction": texts[number] if number < len(texts) else "no"}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Path, list[str]]]:
    """Runs the pipeline; returns the run directory, and the trainings and evaluations that were done."""
    done: list[str] = []

    def train(spec_path: Path, *_: Any) -> None:
        spec = TrainingSpec.model_validate_json(spec_path.read_text())
        (spec.output_dir / "model").mkdir()
        (spec.output_dir / "log.jsonl").write_text(json.dumps({"step": 1, "steps": 1, "tasks": {}}))
        done.append(f"train-{spec.name}")

    def score(spec: EvaluationSpec, *_: Any) -> None:
        training = spec.model_path.parent.name.partition("@")[0]
        write_json(spec.output_dir / "manifest.json", {})
        for own in spec.sets:
            write_jsonl(spec.predictions(own), [answer(training, own, *item) for item in enumerate(own.load())])
        finish(spec)
        done.append(f"{spec.output_dir.name}-{training}")

    monkeypatch.setattr(machine, "run_training", train)
    monkeypatch.setattr(machine, "evaluate", score)

    def go(data: dict[str, Any], overwrite: bool = False) -> tuple[Path, list[str]]:
        done.clear()
        Pipeline(parse_config(data, "test"), Quiet()).run(overwrite)
        return Path(data["output_dir"]), list(done)

    return go


def by_hand(training: str) -> dict[str, dict[str, float]]:
    """Scores of a model: F1 of "red perhaps" for "red" is 2 * 1 / (2 + 1); perplexity is e to the loss per token."""
    found: dict[str, dict[str, float]] = {}
    for part, (right, longer) in ANSWERS.get(training, {}).items():
        size = {"testA+": 4, "testB": 3}[part]
        found.setdefault("colour", {})[f"{part} F1"] = 100 * (right + longer * 2 / 3) / size
        found["colour"][f"{part} EM"] = 100 * right / size
    for part, loss in LOSSES.get(training, {}).items():
        found.setdefault("box", {})[f"{part} perplexity"] = float(np.exp(loss))
    return found


def test_eq_12_averages_over_test_sets_and_metrics(data: dict[str, Any], run: Callable[..., Any]) -> None:
    run_dir, _ = run(data)
    results = json.loads((run_dir / "results.json").read_text())
    assert results["tasks"] == {
        "colour": {f"{part} {label}": "higher" for part in ("testA+", "testB") for label in ("F1", "EM")},
        "box": {"near perplexity": "lower", "far perplexity": "lower"},
    }
    single = by_hand("stl-colour") | by_hand("stl-box")
    tables = {"EW": by_hand("ew"), "CoTBal": by_hand("cotbal")}
    for name, table in tables.items():
        assert results["methods"][name] == {task: pytest.approx(own) for task, own in table.items()}
    assert results["baseline"] == {task: pytest.approx(own) for task, own in single.items()}

    found = compare(results)
    for name, table in tables.items():  # Eq. 12-14
        improvement = []
        for task, sign in (("colour", 1), ("box", -1)):
            scores = list(single[task])
            method, base = (np.array([values[task][score] for score in scores]) for values in (table, single))
            improvement.append(np.mean(sign * (method - base) / base))
        assert found[name].delta_i == pytest.approx(100 * np.mean(improvement))
        assert found[name].delta_e == pytest.approx(100 * np.mean(-np.minimum(0, improvement)))
        assert list(found[name].per_task.values()) == pytest.approx(100 * np.array(improvement))

        # A token costs the same in all records of "box", so its perplexities have no error. F1 and EM of a set are of
        # the same records.
        variance = 0.0
        for part, size in (("testA+", 4), ("testB", 3)):
            moved = np.zeros(size)
            for partial in (200 / 3, 0.0):  # what F1 and EM give for a word too many
                ours, base = (
                    np.array([100.0] * right + [partial] * longer + [0.0] * (size - right - longer))
                    for right, longer in (ANSWERS[name.lower()][part], ANSWERS["stl-colour"][part])
                )
                moved += ours / base.mean() - ours.mean() / base.mean() ** 2 * base
            variance += (moved / 4).var(ddof=1) / size
        errors = results["sampling_errors"][name]
        assert errors["per_task"] == {"colour": pytest.approx(100 * variance**0.5), "box": pytest.approx(0, abs=1e-9)}
        assert errors["delta_i"] == pytest.approx(50 * variance**0.5)

    # "red" is the majority answer of the training records: 1 of 4 and 2 of 3. A constant has no perplexity.
    majority = {"testA+ F1": 25.0, "testA+ EM": 25.0, "testB F1": 200 / 3, "testB EM": 200 / 3}
    assert results["baselines"]["majority"] == {"colour": pytest.approx(majority)}
    # V_j is the task's metric on validation.
    scores = json.loads((run_dir / "scores.json").read_text())
    assert scores["mini"] == {"colour": 25.0, "box": 25.0}
    assert scores["full"]["colour"] == {"colour": 75.0, "box": 50.0}

    folder = run_dir / "evaluations" / "cotbal" / "test"
    assert {path.name for path in folder.iterdir()} == {
        "manifest.json", "metrics.json", "colour@testA+.jsonl", "colour@testB.jsonl", "box@near.jsonl", "box@far.jsonl",
    }  # fmt: skip
    metrics = json.loads((folder / "metrics.json").read_text())
    assert list(metrics) == [f"{task} {score}" for task, own in results["tasks"].items() for score in own]
    assert [(metrics[f"colour {part} EM"]["metric"], metrics[f"colour {part} EM"]["samples"])
            for part in ("testA+", "testB")] == [("EM", 4), ("EM", 3)]  # fmt: skip
    first = [row["score"] for row in rows_of(folder / "colour@testA+.jsonl")]
    assert first == pytest.approx([100, 100, 100, 200 / 3])  # of the first metric, F1

    page = Page((run_dir / "report.html").read_text())
    table = page.tables["test-scores"]
    assert [row[0] for row in table[1:]] == [
        "colourtestA+ F1, 4 samples", "colourtestA+ EM, 4 samples", "colourtestB F1, 3 samples",
        "colourtestB EM, 3 samples", "boxnear perplexity, 4 samples", "boxfar perplexity, 4 samples",
    ]  # fmt: skip
    (em,) = [row for row in table if row[0].startswith("colourtestB EM")]
    assert [cell.split(" ± ")[0] for cell in em[1:]] == ["66.7", "66.7", "33.3", "66.7", "33.3"]
    assert page.row("deltas", "CoTBal")[1] == f"{found['CoTBal'].delta_i:+.2f} ± {errors['delta_i']:.2f}"
    assert "colour testA+, F1 91.7, 4 of 4 answers" in page.words
    assert page.row("tasks", "colour")[-2] == "7"

    (run_dir / "results.json").unlink()  # a report on the way shows the same scores under the same names
    build_report(run_dir)
    partial = Page((run_dir / "report.html").read_text()).tables["test-scores"]
    assert {row[0]: row[1:] for row in partial[1:]} == {
        row[0]: [cell.replace("at chance", "") for cell in row[3:]] for row in table[1:]
    }


def test_an_infinite_perplexity_is_null(
    data: dict[str, Any], run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """JSON has no infinity: another program would refuse the file. e^1000 is past the largest float."""

    def strict(path: Path) -> Any:
        return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{path} has {name}"))

    monkeypatch.setitem(LOSSES, "ew", {"near": 1.25, "far": 1000.0})
    run_dir, _ = run(data | {"seeds": 2})
    metrics = strict(run_dir / "evaluations/ew/test/metrics.json")
    assert (metrics["box far perplexity"]["value"], metrics["box far perplexity"]["standard_error"]) == (None, None)
    assert metrics["box near perplexity"]["value"] == pytest.approx(np.exp(1.25))
    for line in (run_dir / "evaluations/ew/test/box@far.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=pytest.fail)["score"] is None
    results = strict(run_dir / "results.json")
    assert results["methods"]["EW"]["box"] == {"near perplexity": pytest.approx(np.exp(1.25)), "far perplexity": None}
    assert [table["box"]["far perplexity"] for table in results["seeds"]["EW"]] == [None, None]
    page = Page((run_dir / "report.html").read_text())
    (far,) = [row for row in page.tables["test-scores"] if row[0].startswith("boxfar")]
    assert [cell.partition(" ")[0] for cell in far[3:]] == ["7.389", "–", "9.488"]  # e^2, none, e^2.25


def test_an_infinite_perplexity_has_no_weights(data: dict[str, Any], tmp_path: Path) -> None:
    scores = {"box": {"metric": "perplexity", "value": None}}
    write_json(tmp_path / "evaluations/mini/validation/metrics.json", scores)
    with pytest.raises(UserError, match="task 'box': the perplexity of 'mini' on validation records is infinite"):
        score_table(tmp_path, parse_config(data, "x"), precise=False)


def test_another_file_of_a_set_scores_again_what_is_scored_on_it(
    data: dict[str, Any], run: Callable[..., Any], tmp_path: Path
) -> None:
    run(data)
    assert run(data)[1] == []
    path = tmp_path / "b.jsonl"
    path.write_text(path.read_text().replace('"colour-train-4"', '"other"'))
    with pytest.raises(UserError, match=r"\(records\.colour\.test\.testB \w+ -> \w+\): test-cotbal"):
        run(data)
    again = {"test-cotbal", "test-ew", "test-stl-colour"}
    assert set(run(data, overwrite=True)[1]) == again
    data["tasks"][0]["test_metrics"] = ["span_f1"]
    assert set(run(data, overwrite=True)[1]) == again


def test_interrupted_it_goes_on_where_it_was(tiny_tasks: list[TaskConfig], pixel_model: Path, tmp_path: Path) -> None:
    """Killed after the first of three batches; the same files as without that."""
    own = tiny_tasks[0]
    task = TaskConfig(**own.model_dump() | {"test": {"testA+": own.test, "far": own.validation}, "max_new_tokens": 3,
                                            "test_metrics": ["bleu", "exact_match"]})  # fmt: skip
    spec = EvaluationSpec(
        model_path=pixel_model, sets=tuple(evaluation_sets(task, "test")), output_dir=tmp_path / "a", batch_size=3,
        precision="fp32", devices=("cpu",), threads=1, by_task=True,
    )  # fmt: skip

    def stop(meter: Meter) -> None:
        if meter.samples:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(spec, report=stop)
    assert len((tmp_path / "a/parts/rank-0.jsonl").read_text().splitlines()) == 1
    seen: list[int] = []
    first = evaluate(spec, report=lambda meter: seen.append(meter.done))
    assert seen[0] == 3
    second = evaluate(replace(spec, output_dir=tmp_path / "b"))
    assert list(first) == [f"colour {part} {label}" for part in ("testA+", "far") for label in ("BLEU", "EM")]
    for metrics in (first, second):
        assert all(entry.pop("throughput")["samples"] == 4 for entry in metrics.values())
    assert first == second
    for name in ("colour@testA+.jsonl", "colour@far.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_finished_runs_of_plain_files_are_still_finished(run_config: RunConfig) -> None:
    """What identifies their scores is what it was before sets had names."""
    assert not isinstance(run_config.tasks, str)
    pipeline = Pipeline(run_config)
    (training,) = [own for own in pipeline.trainings if own.name == "cotbal"]
    found = pipeline.identity.scoring(training, "test")
    assert [(row["name"], row["metric"]) for row in found["tasks"]] == [
        ("colour", "exact_match"),
        ("box", "accuracy_iou"),
    ]
    for row, task in zip(found["records"], run_config.tasks, strict=False):
        assert isinstance(task.test, Path)
        assert row["test"] == hashlib.sha256(task.test.read_bytes()).hexdigest()[:16]
    assert pipeline.identity.results()["metrics"] == {"colour": "exact_match", "box": "accuracy_iou", "chat": None}
