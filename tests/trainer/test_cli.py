"""The console entry point: what it prints, and how it ends when something is wrong."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from raw_data import RAW, write_raw

from trainer.balancing.cotbal import cotbal_weights
from trainer.balancing.scores import Scores
from trainer.errors import UserError, writing
from trainer.pipeline.stages import locked
from trainer.single import read_weights
from trainer.training import TrainingSpec

Command = Callable[..., Any]

SCORES: dict[str, Any] = {
    "tasks": ["a", "b"],
    "mini": {"a": 0.31, "b": 0.2},
    "full": {"a": {"a": 0.6, "b": 0.25}, "b": {"a": 0.35, "b": 0.5}},
}
OPTIONS = {
    "demo": ["--output", "--small", "--methods", "--seeds", "--dry-run", "--set"],
    "run": ["config", "--methods", "--seeds", "--dry-run", "--set"],
    "train": ["config", "--output", "--method", "--weights", "--set"],
    "weights": ["scores", "--temperature", "--alpha", "--on-degenerate", "--difficulty"],
    "compare": ["results"],
    "report": ["run_dir"],
    "check": ["paths", "--set", "--image-root", "--tokenizer", "--max-length", "--batch-size", "--epochs"],
    "convert": ["name", "source", "output", "--preset", "--limit", "--set", "--workers", "--overwrite"],
    "evaluate": ["model", "--records", "--config", "--task", "--split", "--metric", "--output", "--image-root",
                 "--limit", "--batch-size", "--max-new-tokens", "--precision", "--processes", "--device",
                 "--overwrite"],
    "score": ["predictions", "--metric"],
    "doctor": [],
}  # fmt: skip


@pytest.fixture
def scores(tmp_path: Path) -> Callable[..., Path]:
    """Writes the score table, changed as told, and returns its path."""

    def write(**changes: Any) -> Path:
        path = tmp_path / "scores.json"
        path.write_text(json.dumps(SCORES | changes))
        return path

    return write


class TestHelp:
    @pytest.mark.parametrize("command", OPTIONS)
    def test_names_every_option(self, cotbal: Command, command: str) -> None:
        outcome = cotbal(command, "--help")
        assert (outcome.code, outcome.err) == (0, "")
        for option in OPTIONS[command]:
            assert option in outcome.out.lower()

    def test_lists_every_command_with_a_whole_sentence(self, cotbal: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        lines = cotbal("--help").out.splitlines()
        listed = [line.split(maxsplit=1) for line in lines[lines.index("Commands:") + 1 :] if line.strip()]
        assert [name for name, _ in listed] == list(OPTIONS)
        for _, sentence in listed:
            assert "(Eq." not in sentence  # typer ends the short help at the first stop

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["runn"], "No such command 'runn'"),
            (["demo", "--dry"], "No such option: --dry"),
            (["weights"], "Missing argument"),
            (["weights", "x.json", "--alpha", "much"], "Invalid value for '--alpha'"),
        ],
    )
    def test_usage_errors(self, cotbal: Command, arguments: list[str], message: str) -> None:
        outcome = cotbal(*arguments)
        assert outcome.code == 2
        assert message in outcome.err


class TestWeights:
    def test_prints_the_keys_of_the_design(self, cotbal: Command, scores: Callable[..., Path]) -> None:
        outcome = cotbal("weights", scores())
        assert (outcome.code, outcome.err) == (0, "")
        printed = json.loads(outcome.out)
        promised = {
            "contribution", "difficulty", "lambda_one2all", "lambda_all2one", "lambda_c", "lambda_d", "weights",
        }  # fmt: skip
        # Beyond the design's keys: the inputs that produced them, and what had to be changed.
        assert set(printed) == promised | {"tasks", "temperature", "alpha", "clipped", "warnings"}
        assert printed == cotbal_weights(Scores.from_json(SCORES)).to_json()
        assert printed["tasks"] == ["a", "b"]
        # Eq. 3-11 on two tasks by hand.
        c_ab, c_ba = (0.25 - 0.2) / (0.5 - 0.2), (0.35 - 0.31) / (0.6 - 0.31)
        d = np.array([1 - 0.31 / 0.6, 1 - 0.2 / 0.5])
        lambdas = [
            2 * np.exp(x / 0.5) / np.exp(x / 0.5).sum() for x in (np.array([c_ab, c_ba]), -np.array([c_ba, c_ab]), d)
        ]
        np.testing.assert_allclose(printed["contribution"], [[1, c_ab], [c_ba, 1]], rtol=1e-12)
        np.testing.assert_allclose(printed["weights"], ((lambdas[0] + lambdas[1]) / 2 + lambdas[2]) / 2, rtol=1e-12)

    def test_options_reach_the_library(self, cotbal: Command, scores: Callable[..., Path]) -> None:
        printed = json.loads(cotbal("weights", scores(), "--temperature", 2, "--alpha", 0.25).out)
        assert printed == cotbal_weights(Scores.from_json(SCORES), 2.0, 0.25).to_json()

    def test_a_degenerate_task_is_named(self, cotbal: Command, scores: Callable[..., Path]) -> None:
        path = scores(mini={"a": 0.31, "b": 0.55})
        outcome = cotbal("weights", path)
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err.startswith("cotbal: task 'b': V(b+mini) = 0.5 does not exceed V(mini) = 0.55")
        assert "task 'a'" not in outcome.err
        assert len(outcome.err.splitlines()) == 1
        clipped = cotbal("weights", path, "--on-degenerate", "clip")
        assert clipped.code == 0
        assert [entry["tasks"] for entry in json.loads(clipped.out)["clipped"]] == [["a", "b"], ["b"]]

    @pytest.mark.parametrize(
        ("content", "message"),
        [(None, "does not exist"), ("{", "is not valid JSON"), ("[]", "scores must be an object"), ("\xff", "")],
    )
    @pytest.mark.parametrize("command", ["weights", "compare"])
    def test_files_that_cannot_be_used(
        self, cotbal: Command, tmp_path: Path, content: str | None, message: str, command: str
    ) -> None:
        path = tmp_path / "table.json"
        if content is not None:
            path.write_text(content, encoding="latin-1")
        outcome = cotbal(command, path)
        assert (outcome.code, outcome.out) == (2, "")
        assert message.replace("scores", "results" if command == "compare" else "scores") in outcome.err
        assert outcome.err.startswith("cotbal: ")
        assert len(outcome.err.splitlines()) == 1

    def test_a_folder_is_no_table(self, cotbal: Command, tmp_path: Path) -> None:
        assert cotbal("weights", tmp_path).err == f"cotbal: {tmp_path} cannot be read: Is a directory\n"


def test_compare_prints_table_2_of_the_paper(cotbal: Command, tmp_path: Path) -> None:
    paper = json.loads((Path(__file__).parent / "paper_tables.json").read_text())

    def nested(row: list[Any]) -> dict[str, dict[str, Any]]:
        table: dict[str, dict[str, Any]] = {}
        for (task, metric), value in zip(paper["columns"], row, strict=False):
            table.setdefault(task, {})[metric] = value
        return table

    rows: dict[str, list[float]] = paper["table_2"]
    path = tmp_path / "results.json"
    table = {"tasks": nested(["higher"] * 11), "baseline": nested(paper["STL"])}
    path.write_text(json.dumps(table | {"methods": {name: nested(row) for name, row in rows.items()}}))
    printed = json.loads(cotbal("compare", path).out)
    # Printed with two decimals: half a unit of the last one, and the dust of a binary fraction.
    assert {name: set(row) for name, row in printed.items()} == {
        name: {"delta_i", "delta_e", "per_task"} for name in rows
    }
    for name, row in rows.items():
        assert printed[name]["delta_i"] == pytest.approx(row[-2], abs=0.005 + 1e-9)
        assert printed[name]["delta_e"] == pytest.approx(row[-1], abs=0.005 + 1e-9)


def test_doctor(cotbal: Command) -> None:
    outcome = cotbal("doctor")
    assert outcome.code == 0
    assert f"python {sys.version.split()[0]} on" in outcome.out
    assert f"torch {torch.__version__}" in outcome.out
    assert ("GPU 0: " in outcome.out) == torch.cuda.is_available()
    assert ("GPU: none that torch can use" in outcome.out) != torch.cuda.is_available()
    chosen, *gpu = outcome.out.splitlines()[-3:]
    assert ("'auto' is 'triton'" if torch.cuda.is_available() else "'auto' is 'portable'") in chosen
    for name, line in zip(("triton", "cuda"), gpu, strict=True):
        assert line.startswith(f"loss backend '{name}': ")
        assert line.endswith(": ready") or "CUDA" in line


class TestDryRun:
    def plan(self, outcome: Any) -> tuple[dict[str, list[str]], float, float]:
        """Rows by training, and the two sums at the end."""
        assert outcome.code == 0, outcome.err
        _, *rows = outcome.out.splitlines()
        end = next(index for index, row in enumerate(rows) if row.startswith("cost is"))  # tokens and memory follow
        rows, last = rows[:end], rows[end]
        words = last.replace(",", " ").split()
        sums = float(words[words.index("proxies") + 1]), float(words[words.index("everything") + 1])
        return {row.split()[0]: row.split()[1:] for row in rows}, *sums

    @pytest.mark.parametrize(
        ("arguments", "task", "mini", "chat", "chat_mini", "epochs"),
        [
            ([], 1000, 125, 500, 62, 4),  # a ratio of 0.125; 62.5 is rounded to even
            (["--small"], 48, 12, 24, 6, 1),
            ([], 200, 100, 100, 50, 2),
        ],
    )
    def test_demo(
        self, cotbal: Command, tmp_path: Path, arguments: list[str], task: int, mini: int, chat: int, chat_mini: int,
        epochs: int,
    ) -> None:  # fmt: skip
        """Seven tasks and half as much chat; sixteen conversations a step. In records, the mini model is 7 minis and
        chat's, each of the 7 others exchanges one mini for the whole task."""
        sizes = {"built_in.train": task, "cotbal.mini_ratio": mini / task, "training.epochs": epochs}
        for key, value in (sizes | {"training.batch_size": 16, "comparisons": "[stl, ew]"}).items():
            arguments = [*arguments, "--set", f"{key}={value}"]
        rows, proxies, everything = self.plan(cotbal("demo", "--dry-run", "--output", tmp_path / "run", *arguments))
        full, smallest = 7 * task + chat, 7 * mini + chat_mini
        plus = smallest - mini + task
        expected = {"mini": smallest, "cotbal": full, "ew": full}
        expected |= {name: plus if name.startswith("plus-") else task for name in rows if "-" in name}
        assert {name: int(row[0]) for name, row in rows.items()} == expected
        assert sum(name.startswith("plus-") for name in rows) == sum(name.startswith("stl-") for name in rows) == 7
        for name, records in expected.items():
            assert int(rows[name][1]) == -(-records // 16) * epochs, name
            assert float(rows[name][2]) == pytest.approx(records / full, abs=0.005 + 1e-9)
        assert proxies == pytest.approx((smallest + 7 * plus) / full, abs=0.005 + 1e-9)
        # The share of balanced tasks b, the ratio r: (N + 1) r + b (1 - r), but for rounding minis to whole records.
        ratio, balanced = mini / task, 7 * task / full
        assert proxies == pytest.approx(8 * ratio + balanced * (1 - ratio), abs=0.005 + 8 * 0.5 / full + 1e-9)
        assert everything == pytest.approx((smallest + 7 * plus + 2 * full + 7 * task) / full, abs=0.005 + 1e-9)
        assert not (tmp_path / "run").exists()

    def test_run_counts_the_users_records(
        self, cotbal: Command, run_data: dict[str, Any], write_config: Callable[[dict[str, Any]], Path]
    ) -> None:
        """8 records a task, minis of 2, batches of 4 in windows of 2, one and a half epochs; `box` has no test set."""
        run_data["tasks"][1]["test"] = None
        run_data["training"] |= {"gradient_accumulation_steps": 2, "epochs": 1.5}
        rows, proxies, _ = self.plan(cotbal("run", write_config(run_data), "--dry-run"))
        counted = {name: (int(row[0]), int(row[1])) for name, row in rows.items()}
        assert counted == {
            "mini": (6, 2),  # 6 records, 2 batches, 1 window: 1.5 steps, and transformers rounds up
            "plus-colour": (12, 3),
            "plus-box": (12, 3),
            "cotbal": (24, 5),  # 3 windows, 4.5 steps
            "ew": (24, 5),
            "stl-colour": (8, 2),
        }
        assert proxies == pytest.approx(30 / 24, abs=0.005 + 1e-9)

    def test_comparisons_and_seeds(
        self, cotbal: Command, run_data: dict[str, Any], write_config: Callable[[dict[str, Any]], Path]
    ) -> None:
        """Every comparison is a training of its own, every seed repeats the final ones; cotbal is there anyway, and
        the precise difficulty adds a mini model per task and validates the STL models."""
        path = write_config(run_data)
        rows, proxies, everything = self.plan(
            cotbal("run", path, "--dry-run", "--methods", "coba, cotbal,cotbal_precise", "--seeds", "2")
        )
        finals = ["cotbal", "coba", "cotbal_precise", "stl-colour", "stl-box"]
        expected = ["mini", "plus-colour", "plus-box", "alone-colour", "alone-box", *finals]
        assert list(rows) == [*expected, *(f"{name}@1" for name in finals)]
        assert {name: row[0] for name, row in rows.items() if name.startswith(("alone", "coba"))} == {
            "alone-colour": "2", "alone-box": "2", "coba": "24", "coba@1": "24",
        }  # fmt: skip
        assert rows["stl-box"][3:] == ["validation,", "test"]
        assert rows["stl-box@1"][3:] == ["test"]
        # 6 + 12 + 12 of Algorithm 1; the precise difficulty: 2 + 2 of minis and 8 + 8 of the models that STL needs too.
        assert proxies == pytest.approx((30 + 4 + 16) / 24, abs=0.005 + 1e-9)
        assert everything == pytest.approx((30 + 4 + 2 * (16 + 3 * 24)) / 24, abs=0.005 + 1e-9)

    @pytest.mark.parametrize("command", ["run", "demo"])
    def test_a_bad_method_is_named_before_anything_starts(
        self, cotbal: Command, run_data: dict[str, Any], write_config: Callable[[dict[str, Any]], Path], command: str
    ) -> None:
        config = [write_config(run_data)] if command == "run" else ["--output", run_data["output_dir"]]
        outcome = cotbal(command, *config, "--methods", "ew,gradnrm")
        assert (outcome.code, outcome.out) == (2, "")
        assert "comparisons.2: unknown method 'gradnrm' (did you mean 'gradnorm'?); valid: stl, ew, " in outcome.err
        assert not Path(run_data["output_dir"]).exists()


class TestSet:
    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ("training.epoch=2", "training.epoch: unknown key (did you mean 'epochs'?)"),
            ("training.epochs=many", "training.epochs: Input should be a valid number"),
            ("training.epochs", "--set takes KEY=VALUE, got 'training.epochs'"),
            ("training.epochs=[", "--set training.epochs=[: the value is not valid YAML"),
            ("tasks.0.name=x", "cannot set 'tasks.0.name': 'tasks' is not a group of options"),
        ],
    )
    def test_errors(self, cotbal: Command, setting: str, message: str) -> None:
        outcome = cotbal("demo", "--dry-run", "--set", setting)
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err.startswith("cotbal: ")
        assert message in outcome.err


class TestTrain:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"a": 1.0, "c": 2.0}, "unknown task in .*w.json 'c'"),
            ({"a": -1.0}, "weight of 'a' must be a finite number of at least 0, got -1.0"),
            ({"a": "1"}, "weight of 'a' must be a finite number"),
            ({"a": True}, "weight of 'a' must be a finite number"),
            ({"a": 3.0}, "w.json has no weight for b; give every balanced task one"),
            ({"a": 0, "b": 0.0}, "every weight is 0"),
            ([1.0], "must be an object"),
            ({"tasks": ["a", "b"], "weights": [1.0]}, "must be lists of the same length"),
            ({"tasks": "ab", "weights": 3}, "must be lists of the same length"),
        ],
    )
    def test_bad_weights(self, tmp_path: Path, content: Any, message: str) -> None:
        (tmp_path / "w.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            read_weights(tmp_path / "w.json", ["a", "b"])

    def test_weights_of_any_origin(self, cotbal: Command, tmp_path: Path, scores: Callable[..., Path]) -> None:
        path = tmp_path / "w.json"
        path.write_text(cotbal("weights", scores()).out)
        found = read_weights(path, ["b", "a"])
        assert found == cotbal_weights(Scores.from_json(SCORES)).by_strategy()
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
        ],
    )
    def test_errors(
        self, cotbal: Command, run_data: dict[str, Any], write_config: Callable[[dict[str, Any]], Path], tmp_path: Path,
        options: list[str], message: str,
    ) -> None:  # fmt: skip
        outcome = cotbal("train", write_config(run_data), "--output", tmp_path / "one", *options)
        assert outcome.code == 2
        assert message in outcome.err
        assert not (tmp_path / "one").exists()

    def test_a_method_of_the_file_or_of_the_command_line(
        self, cotbal: Command, run_data: dict[str, Any], write_config: Callable[[dict[str, Any]], Path], tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """What the training process is told; STL is one training per balanced task, each of which continues alone."""
        ran: list[TrainingSpec] = []

        def run_training(spec: Path, *_: Any) -> None:
            ran.append(TrainingSpec.model_validate_json(spec.read_text()))

        monkeypatch.setattr("trainer.single.run_training", run_training)
        run_data["balancing"] = {"method": "coba", "options": {"coba": {"warmup": 3}, "dwa": {"window": 4}}}
        config = write_config(run_data)
        assert cotbal("train", config, "--output", tmp_path / "a").code == 0
        assert cotbal("train", config, "--output", tmp_path / "b", "--method", "dwa").code == 0
        assert [(spec.method, spec.options, spec.mixture) for spec in ran] == [
            ("coba", {"warmup": 3}, "all"), ("dwa", {"window": 4}, "all"),
        ]  # fmt: skip
        (tmp_path / "w.json").write_text(json.dumps({"colour": 1.5, "box": 0.5}))
        assert cotbal("train", config, "--output", tmp_path / "c", "--weights", tmp_path / "w.json").code == 0
        assert (ran[2].method, ran[2].task_weights) == ("cotbal", {"colour": 1.5, "box": 0.5})
        outcome = cotbal("train", config, "--output", tmp_path / "s", "--method", "stl")
        assert outcome.out == f"model: {tmp_path / 's/colour/model'}\nmodel: {tmp_path / 's/box/model'}\n"
        single = [("ew", "single", "colour"), ("ew", "single", "box")]
        assert [(spec.method, spec.mixture, spec.mixture_task) for spec in ran[3:]] == single

    def test_a_used_folder(
        self, cotbal: Command, run_data: dict[str, Any], write_config: Callable[[dict[str, Any]], Path], tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """Finished: nothing to do. Cut off: goes on. Of other options: started anew, or refused if it was finished."""
        ran: list[tuple[str, list[str]]] = []
        fails = {"colour"}

        def run_training(spec: Path, *_: Any) -> None:
            training = TrainingSpec.model_validate_json(spec.read_text())
            folder = training.output_dir
            ran.append((folder.name, sorted(path.name for path in folder.iterdir() if path.name != "spec.json")))
            (folder / "log.jsonl").write_text('{"step": 1, "steps": 2}')
            if folder.name in fails:
                raise KeyboardInterrupt
            (folder / "model").mkdir(exist_ok=True)

        monkeypatch.setattr("trainer.single.run_training", run_training)
        options = ["train", write_config(run_data), "--output", tmp_path / "s", "--method", "stl"]
        cotbal(*options)
        fails.clear()
        assert cotbal(*options).code == 0
        assert cotbal(*options).out.count("model: ") == 2
        assert ran == [("colour", []), ("colour", ["log.jsonl"]), ("box", [])]

        ran.clear()
        options += ["--set", "training.learning_rate=0.5"]
        outcome = cotbal(*options)
        assert (outcome.code, ran) == (2, [])
        assert "train-stl-colour, train-stl-box; --overwrite deletes it" in outcome.err
        with locked(tmp_path / "s"):
            assert "another process is working on" in cotbal(*options, "--overwrite").err
        assert cotbal(*options, "--overwrite").code == 0
        assert ran == [("colour", []), ("box", [])]

        (tmp_path / "mine" / "model").mkdir(parents=True)
        assert cotbal("train", options[1], "--output", tmp_path / "mine").code == 2
        assert (tmp_path / "mine" / "model").is_dir()


def test_report_without_a_run(cotbal: Command, tmp_path: Path) -> None:
    outcome = cotbal("report", tmp_path / "none")
    assert outcome.code == 2
    assert outcome.err == f"cotbal: there is no run directory {tmp_path / 'none'}\n"
    assert not (tmp_path / "none").exists()


def test_as_a_process(tmp_path: Path) -> None:
    """Exit code and streams of a real process, from another folder."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    found = subprocess.run(
        [sys.executable, "-m", "trainer.cli", "weights", "none.json"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == "cotbal: none.json does not exist\n"


def test_an_interruption_says_how_to_go_on(tmp_path: Path) -> None:
    """The command waits for a pipe that nobody writes to; an inherited "ignore" of the signal is undone."""
    pipe = tmp_path / "scores.json"
    os.mkfifo(pipe)
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from trainer.cli import main; main()"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, "-c", code, "weights", str(pipe)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with pipe.open("w"):  # returns when the command has opened it too
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err == "cotbal: interrupted; the same command continues from here\n"


class TestPathsThatCannotBeUsed:
    """One line that names the path and the reason of the system."""

    @pytest.mark.parametrize("command", ["run", "train", "evaluate", "convert"])
    @pytest.mark.parametrize("below", ["", "/sub"])
    def test_a_file_in_place_of_the_output_folder(
        self, cotbal: Command, run_data: dict[str, Any], write_config: Callable[[dict[str, Any]], Path], tmp_path: Path,
        command: str, below: str,
    ) -> None:  # fmt: skip
        file = tmp_path / "file"
        file.write_text("mine")
        output = f"{file}{below}"
        if command == "convert":
            raw = write_raw(tmp_path / "raw", RAW["gqa"]())
            outcome = cotbal("convert", "gqa", raw, output, "--workers", 1, "--quiet")
        elif command == "evaluate":
            records = ("--records", run_data["tasks"][0]["test"], "--image-root", run_data["tasks"][0]["image_root"])
            options = ("--metric", "exact_match", "--device", "cpu", "--quiet", "--output", output)
            outcome = cotbal("evaluate", run_data["model"]["path"], *records, *options)
        else:
            config = write_config(run_data | {"output_dir": output})
            outcome = cotbal(command, config, *(("--output", output) if command == "train" else ()))
        assert outcome.code == 2
        assert re.fullmatch(f"cotbal: {file}[^:]*: (File exists|Not a directory)\n", outcome.err)
        assert file.read_text() == "mine"

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_a_full_disk(self, cotbal: Command, tmp_path: Path) -> None:
        raw = write_raw(tmp_path / "raw", RAW["gqa"]())
        output = tmp_path / "out"
        output.mkdir()
        (output / "train.jsonl.partial").symlink_to("/dev/full")
        outcome = cotbal("convert", "gqa", raw, output, "--workers", 1, "--quiet")
        assert (outcome.code, outcome.err) == (2, f"cotbal: {output}: No space left on device\n")

    @pytest.mark.parametrize("command", ["run", "train"])
    def test_a_disk_that_fills_up_during_a_run(
        self, cotbal: Command, run_data: dict[str, Any], write_config: Callable[[dict[str, Any]], Path], command: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("trainer.pipeline.algorithm1.Pipeline.run", full)
        monkeypatch.setattr("trainer.single.run_training", full)
        output = run_data["output_dir"]
        outcome = cotbal(command, write_config(run_data), *(("--output", output) if command == "train" else ()))
        assert outcome.code == 2
        assert outcome.err.splitlines()[-1] == f"cotbal: {output}: No space left on device"

    def test_a_broken_database(self, tmp_path: Path) -> None:
        folder = tmp_path / "folder"
        folder.mkdir()
        with pytest.raises(UserError, match=f"^{folder}: unable to open database file$"), writing(folder):
            sqlite3.connect(folder).execute("SELECT 1")

    def test_weights_that_are_no_text_file(
        self, cotbal: Command, run_data: dict[str, Any], write_config: Callable[[dict[str, Any]], Path], tmp_path: Path
    ) -> None:
        config = write_config(run_data)
        latin = tmp_path / "latin.json"
        latin.write_bytes(b'{"colour": 1, "\xe9": 2}')
        outcome = cotbal("train", config, "--output", tmp_path / "one", "--weights", tmp_path)
        assert outcome.code == 2
        assert outcome.err.startswith(f"cotbal: weights file {tmp_path} cannot be read: [Errno 21] Is a directory")
        outcome = cotbal("train", config, "--output", tmp_path / "one", "--weights", latin)
        assert outcome.code == 2
        assert outcome.err.startswith(f"cotbal: weights file {latin} cannot be read: 'utf-8' codec can't decode byte")
        assert len(outcome.err.splitlines()) == 1

    def test_an_error_without_a_path_keeps_its_traceback(
        self, cotbal: Command, scores: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*_: Any, **__: Any) -> None:
            raise OSError("a defect")

        monkeypatch.setattr("trainer.balancing.cotbal.cotbal_weights", broken)
        with pytest.raises(OSError, match="a defect"):
            cotbal("weights", scores())
