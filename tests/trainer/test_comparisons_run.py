"""A whole run with comparisons, an ablation and seeds: stages, weights, results and report. Trainings are replaced by
what they leave behind, evaluations by scores that follow from the training's name; everything between is real."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_run import Page

import trainer.nodes.machine as machine
from trainer.balancing.cotbal import cotbal_weights
from trainer.balancing.resampling import Influences, resampled
from trainer.balancing.scores import Scores
from trainer.comparison import compare
from trainer.config import RunConfig, parse_config
from trainer.data.records import write_jsonl
from trainer.errors import UserError
from trainer.evaluation.spec import EvaluationSpec
from trainer.files import write_json
from trainer.launching import TrainingFailedError
from trainer.pipeline.algorithm1 import Pipeline
from trainer.pipeline.progress import Progress
from trainer.report.run_directory import RunDirectory
from trainer.training import TrainingSpec

BALANCED = ["colour", "box"]


def score(training: str, task: str) -> float:
    """A score in percent that is another one for every training and task, with more data scoring higher."""
    data = 20.0 if training in ("mini", f"alone-{task}") else 50.0
    return data + sum(ord(letter) * (k + 1) for k, letter in enumerate(training + task)) % 97 / 10


def answers(training: str, task: str) -> list[bool]:
    """Which of four answers are right: other ones for every training and task, whatever the score above."""
    number = sum(map(ord, training + task))
    return [bool(number >> place & 1) for place in range(4)]


def score_error(training: str, task: str) -> float:
    """Of the four answers; all alike, that of Wilson's interval."""
    right = [100.0 * own for own in answers(training, task)]
    return statistics.stdev(right) / 2 or 100 * 2 / (4 + 4)


class Quiet(Progress):
    def say(self, text: str) -> None: ...


class Runs:
    """Counts trainings, and fails on demand."""

    def __init__(self) -> None:
        self.trained: list[str] = []
        self.fail_at: str | None = None
        self.samples = 4
        self.gains = True  # else every model scores as the mini one

    def train(self, spec_path: Path, *_: Any) -> None:
        spec = TrainingSpec.model_validate_json(spec_path.read_text())
        if spec.name == self.fail_at:
            raise TrainingFailedError(spec.name)
        self.trained.append(spec.name)
        (spec.output_dir / "model").mkdir()
        names = [*BALANCED, "chat"]
        with (spec.output_dir / "weights.csv").open("w") as file:
            file.write(",".join(["step", *names]) + "\n")
            for step in range(1, 5):
                moved = 0.1 * step if spec.method == "coba" else 0.0
                file.write(f"{step},{1 + moved},{1 - moved},1.0\n")
        entry = {name: {"loss": 1.0, "tokens": 5, "weight": 1.0} for name in names}
        lines = [json.dumps({"step": step, "steps": 4, "tasks": entry}) for step in range(1, 5)]
        (spec.output_dir / "log.jsonl").write_text("\n".join(lines))

    def evaluate(self, spec: EvaluationSpec, *_: Any) -> None:
        training = spec.model_path.parent.name
        metrics = {
            own.name: {
                "metric": "EM",
                "value": score(training if self.gains else "mini", own.name),
                "standard_error": 1.0,  # of another kind, as an older version may have left it
                "samples": self.samples,
            }
            for own in spec.sets
        }
        for own in spec.sets:
            predictions = ["a" if right else "b" for right in answers(training, own.name)[: self.samples]]
            write_jsonl(spec.predictions(own), [{"references": ["a"], "prediction": text} for text in predictions])
        write_json(spec.output_dir / "metrics.json", metrics)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    runs = Runs()
    monkeypatch.setattr(machine, "run_training", runs.train)
    monkeypatch.setattr(machine, "evaluate", runs.evaluate)
    return runs


@pytest.fixture
def run(run_data: dict[str, Any], runs: Runs) -> Callable[..., Path]:
    """Runs the pipeline with changes to the configuration; returns the run directory."""

    def go(overwrite: bool = False, **changes: Any) -> Path:
        run_data["tasks"][1]["metric"] = "exact_match"
        data = run_data | changes
        Pipeline(parse_config(data, "test"), Quiet()).run(overwrite)
        return Path(data["output_dir"])

    return go


def read(path: Path) -> Any:
    return json.loads(path.read_text())


COMPARED = ["stl", "ew", "coba", "cotbal_precise", {"name": "hot", "method": "cotbal", "options": {"temperature": 5.0}}]


def test_rows_of_every_method_with_means_over_seeds(run: Callable[..., Path], runs: Runs) -> None:
    run_dir = run(comparisons=COMPARED, seeds=3)
    finals = ["cotbal", "ew", "coba", "cotbal_precise", "hot", "stl-colour", "stl-box"]
    expected = ["mini", "plus-colour", "plus-box", "alone-colour", "alone-box"]
    expected += finals + [f"{name}@{number}" for name in finals for number in (1, 2)]
    assert sorted(runs.trained) == sorted(expected)

    for name in expected:
        spec = TrainingSpec.model_validate_json((run_dir / "trainings" / name / "spec.json").read_text())
        assert spec.seed == int(name.partition("@")[2] or 0)

    results = read(run_dir / "results.json")
    labels = {"CoTBal": "cotbal", "EW": "ew", "CoBa": "coba", "CoTBal precise D": "cotbal_precise", "hot": "hot"}
    assert set(results["methods"]) == set(labels)
    for label, name in labels.items():
        each = [{task: score(f"{name}{mark}", task) for task in BALANCED} for mark in ("", "@1", "@2")]
        assert [{task: row[task]["EM"] for task in BALANCED} for row in results["seeds"][label]] == each
        for task in BALANCED:
            mean = statistics.fmean(row[task] for row in each)
            assert results["methods"][label][task]["EM"] == pytest.approx(mean)
    single = [score(f"stl-colour{mark}", "colour") for mark in ("", "@1", "@2")]
    assert results["baseline"]["colour"]["EM"] == pytest.approx(statistics.fmean(single))

    page = Page((run_dir / "report.html").read_text())
    for label in labels:
        each = [compare({**results, "methods": {"x": table}})["x"] for table in results["seeds"][label]]
        gains, errors = [seed.delta_i for seed in each], [seed.delta_e for seed in each]
        (row,) = [row for row in page.tables["deltas"] if row[0] == label]
        sampling = results["sampling_errors"][label]["delta_i"]
        assert row[1] == f"{statistics.fmean(gains):+.2f} ± {sampling:.2f}seeds ± {statistics.stdev(gains):.2f}"
        assert row[2] == f"{statistics.fmean(errors):.2f}seeds ± {statistics.stdev(errors):.2f}"
        ours = compare({**results, "methods": dict(enumerate(results["seeds"]["CoTBal"]))})
        apart = [ours[seed].delta_i - gain for seed, gain in enumerate(gains)]
        sampling = results["sampling_errors"][label].get("behind_final", 0.0)
        behind = f"{statistics.fmean(apart):+.2f} ± {sampling:.2f}seeds ± {statistics.stdev(apart):.2f}"
        assert row[3] == (behind if label != "CoTBal" else "–")
    for task in BALANCED:
        header, row = page.tables["test-scores"][0], page.row("test-scores", task)
        for label, name in (labels | {"STL": f"stl-{task}"}).items():
            each_seed = [score(f"{name}{mark}", task) for mark in ("", "@1", "@2")]
            mean, deviation = statistics.fmean(each_seed), statistics.stdev(each_seed)
            cell = row[header.index(label)].removesuffix("at chance")
            error = statistics.fmean(score_error(f"{name}{mark}", task) for mark in ("", "@1", "@2"))
            assert cell == f"{mean:.1f} ± {error:.1f}seeds ± {deviation:.1f}", label
    assert "those about one image together, and the standard deviation over 3 seeds; the best" in page.words
    assert "3 seeds." in page.words
    assert "from seed to seed it is" in page.words
    assert page.row("moving-weights", "CoBa")[1:] == ["1.25 (1.10–1.40)", "0.75 (0.60–0.90)"]
    assert [row[0] for row in page.tables["moving-weights"][1:]] == ["CoBa"]


def test_seeds_without_single_task_models(run: Callable[..., Path]) -> None:
    """Scores have their spread although there is no Delta I."""
    page = Page((run(comparisons=["ew"], seeds=2) / "report.html").read_text())
    first, second = score("ew", "colour"), score("ew@1", "colour")
    cell = page.row("test-scores", "colour")[page.tables["test-scores"][0].index("EW")].removesuffix("at chance")
    error = (score_error("ew", "colour") + score_error("ew@1", "colour")) / 2
    assert cell == f"{(first + second) / 2:.1f} ± {error:.1f}seeds ± {abs(first - second) / 2**0.5:.1f}"
    assert "2 seeds." in page.words


def test_an_unknown_standard_error_is_null(run: Callable[..., Path], runs: Runs) -> None:
    """Of one test record, say. JSON has no NaN."""
    runs.samples = 1
    text = (run(comparisons=["ew"]) / "results.json").read_text()
    results = json.loads(text, parse_constant=pytest.fail)
    assert results["standard_errors"]["EW"] == {task: {"EM": None} for task in BALANCED}


def test_a_method_that_never_moved_its_weights_is_named(run: Callable[..., Path]) -> None:
    """The stand-in for a training moves those of CoBa only."""
    page = Page((run(comparisons=["ew", "igbv1", "coba"]) / "report.html").read_text())
    assert "IGBv1 kept the same weights for the whole training" in page.words
    assert [row[0] for row in page.tables["moving-weights"][1:]] == ["CoBa"]


def moved(task: str, precise: bool) -> Influences:
    """By the answers of the models that Eq. 3-9 compare on a task."""
    models = ["mini", *(f"plus-{name}" for name in BALANCED), *([f"alone-{task}", f"stl-{task}"] if precise else [])]
    right = [100.0 * np.array(answers(training, task)) for training in models]
    n = len(right[0])
    unseen = [100 * 2 / (n + 4) if row.mean() in (0, 100) else 0.0 for row in right]
    return Influences(np.array([row - row.mean() for row in right]), np.array(unseen))


def test_ablations_have_weights_of_their_own(run: Callable[..., Path]) -> None:
    run_dir = run(comparisons=COMPARED)
    table = read(run_dir / "scores.json")
    assert table["mini"] == {task: score("mini", task) for task in BALANCED}
    precise = {
        "mini": {task: score(f"alone-{task}", task) for task in BALANCED},
        "full": {task: score(f"stl-{task}", task) for task in BALANCED},
    }
    tables = {"reused": Scores.from_json(table), "precise": Scores.from_json(table | {"alone": precise})}
    expected = {
        "cotbal": cotbal_weights(tables["reused"]),
        "hot": cotbal_weights(tables["reused"], temperature=5.0),
        "cotbal_precise": cotbal_weights(tables["precise"], difficulty="precise"),
    }
    for name, weights in expected.items():
        file = run_dir / ("weights.json" if name == "cotbal" else f"weights/{name}.json")
        assert read(file)["applied"] == weights.weights.tolist()
        kind = "precise" if "precise" in name else "reused"
        options = {"temperature": weights.temperature, "difficulty": kind}
        errors = resampled(tables[kind], [moved(task, kind == "precise") for task in BALANCED], **options)
        assert read(file)["sampling_errors"] == errors
        spec = TrainingSpec.model_validate_json((run_dir / "trainings" / name / "spec.json").read_text())
        assert spec.task_weights == dict(zip(BALANCED, weights.weights.tolist(), strict=True))
    page = Page((run_dir / "report.html").read_text())
    assert len(page.tables["variants"]) == 3
    for label, name, temperature in (("hot", "hot", "5.0"), ("CoTBal precise D", "cotbal_precise", "0.5")):
        each = zip(expected[name].weights, expected[name].difficulty, strict=True)
        cells = [f"{weight:.3f}D {difficulty:.3f}" for weight, difficulty in each]
        assert page.row("variants", label) == [label, temperature, "0.5", "cotbal", *cells]
    # Eq. 9 by hand.
    d = [1 - precise["mini"][task] / precise["full"][task] for task in BALANCED]
    assert read(run_dir / "weights" / "cotbal_precise.json")["difficulty"] == pytest.approx(d)


def test_a_degenerate_run_goes_on_as_its_error_says(run: Callable[..., Path], runs: Runs) -> None:
    runs.gains = False
    with pytest.raises(
        UserError, match=r"task 'colour'.*; task 'box'.*bounded: the same command with --set "
    ) as caught:
        run(comparisons=["ew"])
    assert set(runs.trained) == PROXIES
    key, value = str(caught.value).partition("--set cotbal.")[2].partition(",")[0].split("=")
    run_dir = run(comparisons=["ew"], cotbal={"mini_ratio": 0.25, key: value})
    assert sorted(runs.trained) == sorted([*PROXIES, "cotbal", "ew"])
    assert read(run_dir / "weights.json")["clipped"]


def test_what_is_done_stays_done_when_methods_and_seeds_are_added(run: Callable[..., Path], runs: Runs) -> None:
    run(comparisons=["stl", "ew"])
    first = list(runs.trained)
    runs.trained.clear()
    runs.fail_at = "rlw"
    with pytest.raises(TrainingFailedError):
        run(comparisons=["stl", "ew", "rlw", "coba"], seeds=2)
    assert not set(first) & set(runs.trained)
    before = list(runs.trained)
    runs.fail_at = None
    runs.trained.clear()
    run(comparisons=["stl", "ew", "rlw", "coba"], seeds=2)
    assert not set(first + before) & set(runs.trained)
    finals = ["cotbal", "ew", "stl-colour", "stl-box", "rlw", "coba"]
    assert set(before + runs.trained) == {"rlw", "coba", *(f"{name}@1" for name in finals)}


def test_options_of_a_method_are_its_training_s_inputs(run: Callable[..., Path], runs: Runs) -> None:
    run(comparisons=["rlw", "lbtw_star"])
    runs.trained.clear()
    run_dir = run(
        overwrite=True,
        comparisons=["rlw", "lbtw_star"],
        balancing={"options": {"rlw": {"distribution": "dirichlet"}}, "validation": {"interval": 3}},
    )
    assert sorted(runs.trained) == ["lbtw_star", "rlw"]
    spec = TrainingSpec.model_validate_json((run_dir / "trainings" / "rlw" / "spec.json").read_text())
    assert (spec.method, spec.options) == ("rlw", {"distribution": "dirichlet"})


def test_validation_records_are_checked_before_a_method_takes_losses_of_them(
    run: Callable[..., Path], runs: Runs, run_data: dict[str, Any], tmp_path: Path
) -> None:
    lines = Path(run_data["tasks"][0]["validation"]).read_text().splitlines()
    record = json.loads(lines[1])
    record["conversations"][0]["value"] = "<image>\n" + "very " * 500 + "long"
    (tmp_path / "long.jsonl").write_text("\n".join([lines[0], json.dumps(record)]))
    run_data["tasks"][0]["validation"] = str(tmp_path / "long.jsonl")
    with pytest.raises(ValueError, match=r"task 'colour'.*colour-validation-1"):
        run(comparisons=["coba"])
    assert "coba" not in runs.trained


PROXIES = {"mini", "plus-colour", "plus-box"}
EVERY = PROXIES | {"cotbal", "ew", "stl-colour", "stl-box"}


def edited(path: str, folder: Path) -> str:
    """A copy of a file of records with another id."""
    copy = folder / Path(path).name
    copy.write_text(Path(path).read_text().replace('"id": "', '"id": "x', 1))
    return str(copy)


@pytest.mark.parametrize(
    ("group", "key", "again", "told"),
    [
        ("task", "description", set(), ""),
        ("task", "test", set(), r"records\.colour\.test \w+ -> \w+"),
        ("task", "validation", {"coba"}, r"records\.colour\.validation \w+ -> \w+"),
        ("task", "max_new_tokens", set(), r"tasks\.colour\.max_new_tokens 12 -> 7"),
        ("task", "train", EVERY - {"stl-box"}, r"records\.colour\.train \w+ -> \w+"),
        ("training", "dataloader_workers", set(), ""),
        ("training", "gradient_checkpointing", set(), ""),
        ("training", "save_steps", set(), ""),
        ("training", "smaller micro-batches", set(), ""),
        ("training", "gradient_accumulation_steps", EVERY, "training.batch_size x gradient_accumulation_steps 4 -> 8"),
        ("training", "learning_rate", EVERY, r"training\.learning_rate 2e-05 -> 0\.5"),
        ("cotbal", "mini_ratio", PROXIES, r"cotbal\.mini_ratio 0\.25 -> 0\.3"),
        ("evaluation", "batch_size", set(), ""),
        ("model", "copy", set(), ""),
        ("model", "weights", EVERY, r"model\.files \w+ -> \w+"),
    ],
)
def test_a_change_trains_again_what_depends_on_it_and_nothing_else(
    group: str,
    key: str,
    again: set[str],
    told: str,
    run: Callable[..., Path],
    runs: Runs,
    run_data: dict[str, Any],
    tmp_path: Path,
) -> None:
    compared = ["stl", "ew", *(["coba"] if key == "validation" else [])]  # which takes losses of these records
    run(comparisons=compared)
    runs.trained.clear()
    values = {
        "description": "x", "max_new_tokens": 7, "dataloader_workers": 2, "gradient_checkpointing": True,
        "save_steps": 3, "learning_rate": 0.5, "mini_ratio": 0.3, "batch_size": 7,
        "gradient_accumulation_steps": 2,
    }  # fmt: skip
    if group == "task":
        task = run_data["tasks"][0]
        task[key] = values[key] if key in values else edited(task[key], tmp_path)
    elif group == "model":
        copy = tmp_path / "copy"
        shutil.copytree(run_data["model"]["path"], copy)
        run_data["model"] = run_data["model"] | {"path": str(copy)}
        if key == "weights":
            file = copy / "model.safetensors"
            file.write_bytes(file.read_bytes()[:-1] + b"!")
    elif key == "smaller micro-batches":
        run_data["training"] |= {"batch_size": 2, "gradient_accumulation_steps": 2}  # of 4 samples
    else:
        run_data[group] = run_data.get(group, {}) | {key: values[key]}
    if told:
        with pytest.raises(UserError, match=rf"already done does not fit .* \({told}\): .*; --overwrite deletes it"):
            run(comparisons=compared)
        assert runs.trained == []
    scored_again = key in ("validation", "max_new_tokens")
    run(overwrite=bool(told), comparisons=compared)
    # CoTBal's weights depend on the proxies, and on their scores.
    assert set(runs.trained) - {"cotbal"} == again - {"cotbal"}
    assert ("cotbal" in runs.trained) == (bool(again & PROXIES) or scored_again)


def test_results_of_other_settings_are_gone_before_anything_runs(
    run: Callable[..., Path], runs: Runs, run_data: dict[str, Any]
) -> None:
    """Interrupted after a change, a run reports nothing that belongs to what was before it."""
    run_dir = run(comparisons=["stl", "ew", "coba"])
    assert read(run_dir / "results.json")["methods"].keys() == {"CoTBal", "EW", "CoBa"}
    runs.fail_at = "cotbal"
    run_data["cotbal"]["temperature"] = 0.05
    with pytest.raises(TrainingFailedError):
        run(overwrite=True, comparisons=["stl", "ew"])
    assert not (run_dir / "results.json").exists()
    assert not (run_dir / "evaluations" / "cotbal" / "test").exists()
    found = RunDirectory(run_dir)
    assert {"ew", "mini"} < set(found.trainings)
    assert "coba" not in found.trainings  # still there, for the day when it is wanted again
    mark = run_dir / "trainings" / "cotbal" / "checkpoints" / "checkpoint-4" / "COMPLETE"
    mark.parent.mkdir(parents=True)
    mark.touch()
    run_data["cotbal"]["temperature"] = 0.06
    with pytest.raises(UserError, match=r"\(cotbal.temperature 0.05 -> 0.06\): train-cotbal; --overwrite deletes it"):
        run(comparisons=["stl", "ew"])
    assert mark.exists()
    assert "train-coba" not in {stage["stage"] for stage in found.stages}
    assert (run_dir / "trainings" / "coba").exists()


def test_an_unfinished_evaluation_is_not_deleted_unasked(run_config: RunConfig) -> None:
    run_dir = run_config.output_dir
    write_json(run_dir / "stages/test-ew.json", {"status": "running", "fingerprint": "other", "inputs": {"x": 1}})
    part = run_dir / "evaluations/ew/test/parts/rank-0.jsonl"
    part.parent.mkdir(parents=True)
    part.touch()
    assert Pipeline(run_config).runner().would_lose() == []
    part.write_text("{}\n")
    assert Pipeline(run_config).runner().would_lose() == ["test-ew"]


def test_a_mistyped_path_costs_nothing_that_is_finished(
    run: Callable[..., Path], runs: Runs, run_data: dict[str, Any]
) -> None:
    """A missing file is another file to a fingerprint: it is named before anything is deleted."""
    run_dir = run(comparisons=["stl", "ew"])
    run_data["tasks"][0]["train"] += "x"
    with pytest.raises(UserError, match=f"{run_data['tasks'][0]['train']}.*does not exist"):
        run(overwrite=True, comparisons=["stl", "ew"])
    assert all((run_dir / "trainings" / name / "model").is_dir() for name in EVERY)
    assert (run_dir / "results.json").exists()
