"""``cotbal train``: its weights files, what the training process is told, and a folder that is used again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.balancing.cotbal import cotbal_weights
from trainer.balancing.scores import Scores
from trainer.errors import UserError
from trainer.pipeline.stages import locked
from trainer.single import read_weights
from trainer.training import TrainingSpec

Command = Callable[..., Any]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": 1.0, "c": 2.0}, "unknown task in .*w.json 'c'"),
        ({"a": -1.0}, "weight of 'a' must be a finite number of at least 0, got -1.0"),
        ({"a": 10**400}, "weight of 'a' must be a finite number of at least 0, got 1000"),
        ({"a": "1"}, "weight of 'a' must be a finite number"),
        ({"a": True}, "weight of 'a' must be a finite number"),
        ({"a": 3.0}, "w.json has no weight for b; give every balanced task one"),
        ({"a": 0, "b": 0.0}, "every weight is 0"),
        ([1.0], "must be an object"),
        ({"tasks": ["a", "b"], "weights": [1.0]}, "must be lists of the same length"),
        ({"tasks": "ab", "weights": 3}, "must be lists of the same length"),
    ],
)
def test_bad_weights(tmp_path: Path, content: Any, message: str) -> None:
    (tmp_path / "w.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_weights(tmp_path / "w.json", ["a", "b"])


def test_weights_of_any_origin(cotbal: Command, tmp_path: Path, scores: Callable[..., Path]) -> None:
    path = tmp_path / "w.json"
    path.write_text(cotbal("weights", scores()).out)
    found = read_weights(path, ["b", "a"])
    assert found == cotbal_weights(Scores.from_json(json.loads(scores().read_text()))).by_strategy()
    path.write_text(json.dumps({"a": 2, "b": 0}))
    assert read_weights(path, ["a", "b"]) == {"a": 2.0, "b": 0.0}
    path.write_text(json.dumps({"tasks": ["b", "a"], "weights": [1, 1], "applied": [0.5, 1.5]}))
    assert read_weights(path, ["a", "b"]) == {"b": 0.5, "a": 1.5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "cotbl"], "unknown method 'cotbl' (did you mean 'cotbal'?); valid: stl, ew, tla, uniform, "),
        (["--set", "balancing.method=cobaa"], "balancing.method: unknown method 'cobaa' (did you mean 'coba'?)"),
        (["--method", "cotbal_precise"], "method 'cotbal_precise' needs --weights"),
        (
            ["--method", "coba", "--weights", "w.json"],
            "method 'coba' finds its weights by itself; --weights is for",
        ),
        (["--method", "cotbal"], "method 'cotbal' needs --weights"),
        (["--weights", "none.json"], "weights file none.json cannot be read"),
        (
            ["--set", "launch.nodes=2"],
            "nothing to do for some of the 2 machines; let it span all of them with launch.nodes_per",
        ),
    ],
)
def test_errors(
    cotbal: Command, run_data: dict[str, Any], write_config: Callable[[dict[str, Any]], Path], tmp_path: Path,
    options: list[str], message: str,
) -> None:  # fmt: skip
    outcome = cotbal("train", write_config(run_data), "--output", tmp_path / "one", *options)
    assert outcome.code == 2
    assert message in outcome.err
    assert not (tmp_path / "one").exists()


def test_a_method_of_the_file_or_of_the_command_line(
    cotbal: Command, run_data: dict[str, Any], write_config: Callable[[dict[str, Any]], Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What the training process is told; STL is one training per balanced task, each of which continues alone."""
    ran: list[TrainingSpec] = []

    def run_training(spec: Path, *_: Any) -> None:
        ran.append(TrainingSpec.model_validate_json(spec.read_text()))
        last = "1.5,0.5" if ran[-1].method == "dwa" else "1.0,1.0"
        (ran[-1].output_dir / "weights.csv").write_text(f"step,colour,box,chat\n1,1.0,1.0,1.0\n2,{last},1.0\n")

    monkeypatch.setattr("trainer.nodes.machine.run_training", run_training)
    run_data["balancing"] = {"method": "coba", "options": {"coba": {"warmup": 3}, "dwa": {"window": 4}}}
    config = write_config(run_data)
    outcome = cotbal("train", config, "--output", tmp_path / "a")
    assert (outcome.code, "note: CoBa kept the same weights for the whole training" in outcome.err) == (0, True)
    # 24 samples in batches of 4; update 4, after step 4, is the first behind the warm-up. DWA has its windows after 8.
    assert "warning: weights that stay equal" not in outcome.err
    outcome = cotbal("train", config, "--output", tmp_path / "b", "--method", "dwa")
    assert (outcome.code, "note" in outcome.err) == (0, False)
    assert "warning: weights that stay equal for the whole training: dwa (the first 8 steps of 6)" in outcome.err
    assert [(spec.method, spec.options, spec.mixture) for spec in ran] == [
        ("coba", {"warmup": 3}, "all"), ("dwa", {"window": 4}, "all"),
    ]  # fmt: skip
    (tmp_path / "w.json").write_text(json.dumps({"colour": 1.5, "box": 0.5}))
    assert cotbal("train", config, "--output", tmp_path / "c", "--weights", tmp_path / "w.json").code == 0
    assert (ran[2].method, ran[2].task_weights) == ("cotbal", {"colour": 1.5, "box": 0.5})
    outcome = cotbal("train", config, "--output", tmp_path / "s", "--method", "stl")
    assert "note" not in outcome.err
    assert outcome.out == f"model: {tmp_path / 's/colour/model'}\nmodel: {tmp_path / 's/box/model'}\n"
    single = [("ew", "single", "colour"), ("ew", "single", "box")]
    assert [(spec.method, spec.mixture, spec.mixture_task) for spec in ran[3:]] == single


def test_a_used_folder(
    cotbal: Command, run_data: dict[str, Any], write_config: Callable[[dict[str, Any]], Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Finished: nothing to do. Cut off: goes on. Of other options: started anew, or refused if it was finished."""
    ran: list[tuple[str, list[str]]] = []
    fails = {"colour"}

    def run_training(spec: Path, *_: Any) -> None:
        training = TrainingSpec.model_validate_json(spec.read_text())
        folder = training.output_dir
        ran.append((folder.name, sorted(path.name for path in folder.iterdir() if path.name != "spec.json")))
        for name in ("log.jsonl", "wandb_run_id.txt"):
            (folder / name).write_text('{"step": 1, "steps": 2}')
        if folder.name in fails:
            raise KeyboardInterrupt
        (folder / "model").mkdir(exist_ok=True)

    monkeypatch.setattr("trainer.nodes.machine.run_training", run_training)
    options = ["train", write_config(run_data), "--output", tmp_path / "s", "--method", "stl"]
    cotbal(*options)
    mark = tmp_path / "s" / "colour" / "checkpoints" / "checkpoint-8" / "COMPLETE"
    mark.parent.mkdir(parents=True)
    mark.touch()
    outcome = cotbal(*options, "--set", "launch.processes=3")
    assert (outcome.code, mark.exists()) == (2, True)
    assert "(processes of a training 1 -> 3): train-colour; --overwrite deletes it" in outcome.err
    fails.clear()
    assert cotbal(*options).code == 0
    assert cotbal(*options).out.count("model: ") == 2
    left = ["checkpoints", "log.jsonl", "wandb_run_id.txt"]
    assert ran == [("colour", []), ("colour", left), ("box", [])]

    ran.clear()
    options += ["--set", "training.learning_rate=0.5"]
    outcome = cotbal(*options)
    assert (outcome.code, ran) == (2, [])
    assert "train-colour, train-box; --overwrite deletes it" in outcome.err
    with locked(tmp_path / "s"):
        assert "another process is working on" in cotbal(*options, "--overwrite").err
    assert cotbal(*options, "--overwrite").code == 0
    assert ran == [("colour", []), ("box", [])]

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "plan.json").write_text("[]")
    assert "run is the run directory of a `cotbal run`" in cotbal("train", options[1], "--output", tmp_path / "run").err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["plan.json"]

    (tmp_path / "mine" / "model").mkdir(parents=True)
    assert cotbal("train", options[1], "--output", tmp_path / "mine").code == 2
    assert (tmp_path / "mine" / "model").is_dir()


def test_another_method_in_the_folder_of_one_that_was_cut_off(
    cotbal: Command, run_data: dict[str, Any], write_config: Callable[[dict[str, Any]], Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """It starts anew, and so does the first one afterwards: nobody goes on with another's checkpoints."""
    ran: list[tuple[str, bool]] = []

    def run_training(spec: Path, *_: Any) -> None:
        training = TrainingSpec.model_validate_json(spec.read_text())
        checkpoints = training.output_dir / "checkpoints"
        ran.append((training.method, checkpoints.exists()))
        checkpoints.mkdir(exist_ok=True)
        raise KeyboardInterrupt

    monkeypatch.setattr("trainer.nodes.machine.run_training", run_training)
    for method in ("ew", "ew", "tla", "ew"):
        cotbal("train", write_config(run_data), "--output", tmp_path / "t", "--method", method)
    assert ran == [("ew", False), ("ew", True), ("tla", False), ("ew", False)]
    # The records are checked; what is said of the method is said of this one too.
    outcome = cotbal("train", write_config(run_data), "--output", tmp_path / "t", "--method", "dwa")
    assert "warning: weights that stay equal for the whole training: dwa (the first 50 steps of 6)" in outcome.err
