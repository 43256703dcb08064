"""A run with comparisons started again: what is kept, what is trained again and what is refused, with stand-ins for
trainings and evaluations."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stand_ins import Runs, read

from trainer.config import RunConfig
from trainer.errors import UserError
from trainer.files import write_json
from trainer.launching import TrainingFailedError
from trainer.pipeline.algorithm1 import Pipeline
from trainer.report.run_directory import RunDirectory
from trainer.training import TrainingSpec


def test_a_degenerate_run_goes_on_as_its_error_says(run_stand_ins: Callable[..., Path], runs: Runs) -> None:
    runs.gains = False
    with pytest.raises(
        UserError, match=r"task 'colour'.*; task 'box'.*bounded: the same command with --set "
    ) as caught:
        run_stand_ins(comparisons=["ew"])
    assert set(runs.trained) == PROXIES
    key, value = str(caught.value).partition("--set cotbal.")[2].partition(",")[0].split("=")
    run_dir = run_stand_ins(comparisons=["ew"], cotbal={"mini_ratio": 0.25, key: value})
    assert sorted(runs.trained) == sorted([*PROXIES, "cotbal", "ew"])
    assert read(run_dir / "weights.json")["clipped"]


def test_what_is_done_stays_done_when_methods_and_seeds_are_added(
    run_stand_ins: Callable[..., Path], runs: Runs
) -> None:
    run_stand_ins(comparisons=["stl", "ew"])
    first = list(runs.trained)
    runs.trained.clear()
    runs.fail_at = "rlw"
    with pytest.raises(TrainingFailedError):
        run_stand_ins(comparisons=["stl", "ew", "rlw", "coba"], seeds=2)
    assert not set(first) & set(runs.trained)
    before = list(runs.trained)
    runs.fail_at = None
    runs.trained.clear()
    run_stand_ins(comparisons=["stl", "ew", "rlw", "coba"], seeds=2)
    assert not set(first + before) & set(runs.trained)
    finals = ["cotbal", "ew", "stl-colour", "stl-box", "rlw", "coba"]
    assert set(before + runs.trained) == {"rlw", "coba", *(f"{name}@1" for name in finals)}


def test_options_of_a_method_are_its_training_s_inputs(run_stand_ins: Callable[..., Path], runs: Runs) -> None:
    run_stand_ins(comparisons=["rlw", "lbtw_star"])
    runs.trained.clear()
    run_dir = run_stand_ins(
        overwrite=True,
        comparisons=["rlw", "lbtw_star"],
        balancing={"options": {"rlw": {"distribution": "dirichlet"}}, "validation": {"interval": 3}},
    )
    assert sorted(runs.trained) == ["lbtw_star", "rlw"]
    spec = TrainingSpec.model_validate_json((run_dir / "trainings" / "rlw" / "spec.json").read_text())
    assert (spec.method, spec.options) == ("rlw", {"distribution": "dirichlet"})


def test_validation_records_are_checked_before_a_method_takes_losses_of_them(
    run_stand_ins: Callable[..., Path], runs: Runs, run_data: dict[str, Any], tmp_path: Path
) -> None:
    lines = Path(run_data["tasks"][0]["validation"]).read_text().splitlines()
    record = json.loads(lines[1])
    record["conversations"][0]["value"] = "<image>\n" + "very " * 500 + "long"
    (tmp_path / "long.jsonl").write_text("\n".join([lines[0], json.dumps(record)]))
    run_data["tasks"][0]["validation"] = str(tmp_path / "long.jsonl")
    with pytest.raises(ValueError, match=r"task 'colour'.*colour-validation-1"):
        run_stand_ins(comparisons=["coba"])
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
    run_stand_ins: Callable[..., Path],
    runs: Runs,
    run_data: dict[str, Any],
    tmp_path: Path,
) -> None:
    compared = ["stl", "ew", *(["coba"] if key == "validation" else [])]  # which takes losses of these records
    run_stand_ins(comparisons=compared)
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
            run_stand_ins(comparisons=compared)
        assert runs.trained == []
    scored_again = key in ("validation", "max_new_tokens")
    run_stand_ins(overwrite=bool(told), comparisons=compared)
    # CoTBal's weights depend on the proxies, and on their scores.
    assert set(runs.trained) - {"cotbal"} == again - {"cotbal"}
    assert ("cotbal" in runs.trained) == (bool(again & PROXIES) or scored_again)


def test_results_of_other_settings_are_gone_before_anything_runs(
    run_stand_ins: Callable[..., Path], runs: Runs, run_data: dict[str, Any]
) -> None:
    """Interrupted after a change, a run reports nothing that belongs to what was before it."""
    run_dir = run_stand_ins(comparisons=["stl", "ew", "coba"])
    assert read(run_dir / "results.json")["methods"].keys() == {"CoTBal", "EW", "CoBa"}
    runs.fail_at = "cotbal"
    run_data["cotbal"]["temperature"] = 0.05
    with pytest.raises(TrainingFailedError):
        run_stand_ins(overwrite=True, comparisons=["stl", "ew"])
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
        run_stand_ins(comparisons=["stl", "ew"])
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
    run_stand_ins: Callable[..., Path], runs: Runs, run_data: dict[str, Any]
) -> None:
    """A missing file is another file to a fingerprint: it is named before anything is deleted."""
    run_dir = run_stand_ins(comparisons=["stl", "ew"])
    run_data["tasks"][0]["train"] += "x"
    with pytest.raises(UserError, match=f"{run_data['tasks'][0]['train']}.*does not exist"):
        run_stand_ins(overwrite=True, comparisons=["stl", "ew"])
    assert all((run_dir / "trainings" / name / "model").is_dir() for name in EVERY)
    assert (run_dir / "results.json").exists()
