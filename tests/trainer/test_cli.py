"""The console entry point: what it prints, and how it ends when something is wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cotbal_kernels import backends
from trainer.balancing.cotbal import cotbal_weights
from trainer.balancing.scores import Scores

Command = Callable[..., Any]

OPTIONS = {
    "demo": ["--output", "--small", "--methods", "--seeds", "--dry-run", "--overwrite", "--set"],
    "run": ["config", "--methods", "--seeds", "--dry-run", "--overwrite", "--set"],
    "train": ["config", "--output", "--method", "--weights", "--overwrite", "--set"],
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


class TestHelp:
    @pytest.mark.parametrize("command", OPTIONS)
    def test_names_every_option(self, cotbal: Command, command: str) -> None:
        outcome = cotbal(command, "--help")
        assert (outcome.code, outcome.err) == (0, "")
        for option in OPTIONS[command]:
            assert option in outcome.out.lower()

    def test_lists_every_command_with_a_whole_sentence(self, cotbal: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        out = cotbal("--help").out
        assert max(map(len, out.splitlines())) <= 80
        listed = out.partition("Commands:\n")[2]
        assert re.findall(r"^  (\w+)  ", listed, re.MULTILINE) == list(OPTIONS)
        assert "..." not in listed
        for command in OPTIONS:
            words = " ".join(cotbal(command, "--help").out.split())  # whose own help is nowhere cut
            (sentence,) = re.findall(rf"^  {command}  (.+(?:\n {{4,}}.+)*)", listed, re.MULTILINE)
            assert f"{' '.join(sentence.split())}." in words

    def test_what_needs_no_model_does_not_wait_for_torch(self) -> None:
        """Importing torch and transformers takes seconds: help, and arithmetic on tables, come without them."""
        modules = (
            "trainer.cli, trainer.config, trainer.balancing.cotbal, trainer.comparison, trainer.evaluation.scoring"
        )
        code = f"import sys, {modules}; print(sorted({{'torch', 'transformers', 'deepspeed'}} & set(sys.modules)))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["runn"], "No such command 'runn'"),
            (["demo", "--dry"], "No such option: --dry"),
            (["weights"], "Missing argument"),
            (["weights", "x.json", "--alpha", "much"], "Invalid value for '--alpha'"),
            (["check", "x.json", "--epochs", "inf"], "Invalid value for '--epochs'"),
            (["check", "x.json", "--epochs", "nan"], "Invalid value for '--epochs'"),
            (["check", "x.json", "--epochs", "1e308"], "Invalid value for '--epochs'"),
            (["check", "x.yaml", "--epochs", "2", "--tokenizer", "m"], "--tokenizer, --epochs: of record files only"),
            (["check", "x.json", "--set", "seed=1"], "--set overrides a key of CONFIG.yaml; record files have none"),
            (["run", "x.yaml", "--tflops", "inf"], "Invalid value for '--tflops'"),
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
        assert printed == cotbal_weights(Scores.from_json(json.loads(scores().read_text()))).to_json()
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
        assert printed == cotbal_weights(Scores.from_json(json.loads(scores().read_text())), 2.0, 0.25).to_json()

    def test_a_degenerate_task_is_named(self, cotbal: Command, scores: Callable[..., Path]) -> None:
        path = scores(mini={"a": 0.31, "b": 0.55})
        outcome = cotbal("weights", path)
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err.startswith("cotbal: task 'b': V(b+mini) = 0.5 does not exceed V(mini) = 0.55")
        assert "task 'a'" not in outcome.err
        assert len(outcome.err.splitlines()) == 1
        assert outcome.err.endswith(", or have the values bounded: --on-degenerate clip\n")
        clipped = cotbal("weights", path, "--on-degenerate", "clip")
        assert clipped.code == 0
        assert [entry["tasks"] for entry in json.loads(clipped.out)["clipped"]] == [["a", "b"], ["b"]]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "does not exist"),
            ("{", "is not valid JSON"),
            ("[]", "scores must be an object"),
            ("\xff", ""),
            ('{"tasks": ["a"], "x": {"a": 1, "a": 2}}', "is not valid JSON: the key 'a' is there twice in one object"),
        ],
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


def test_doctor(cotbal: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = cotbal("doctor")
    assert outcome.code == 0
    assert f"python {sys.version.split()[0]} on" in outcome.out
    assert f"cotbal {version('cotbal')}" in outcome.out
    assert f"torch {torch.__version__}" in outcome.out
    assert ("GPU 0: " in outcome.out) == torch.cuda.is_available()
    assert ("GPU: none that torch can use" in outcome.out) != torch.cuda.is_available()
    chosen, *gpu = outcome.out.splitlines()[-3:]
    assert ("'auto' is 'triton'" if torch.cuda.is_available() else "'auto' is 'portable'") in chosen
    for name, line in zip(("triton", "cuda"), gpu, strict=True):
        assert line.startswith(f"loss backend '{name}': ")
        assert line.endswith(": ready") or "CUDA" in line
    monkeypatch.setattr(backends, "DEFAULT", "magic")  # COTBAL_BACKEND
    outcome = cotbal("doctor")
    assert outcome.code == 0
    assert "'auto' is none, backend='magic' does not exist" in outcome.out.splitlines()[-3]


def test_doctor_names_what_is_too_old_or_missing(cotbal: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what the commands need, and not of the packages for developing this one."""
    assert "needed: " not in cotbal("doctor").out

    def other(package: str) -> str:
        if package in ("peft", "hypothesis"):
            raise PackageNotFoundError(package)
        return "2.5.1+cu124" if package == "torch" else version(package)

    monkeypatch.setattr("trainer.doctor.version", other)
    lines = [line for line in cotbal("doctor").out.splitlines() if line.startswith("needed: ")]
    assert lines == [
        "needed: torch>=2.11, and 2.5.1+cu124 is installed", "needed: peft>=0.21, which is not installed",
    ]  # fmt: skip


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
        outcome = cotbal("run", write_config(run_data), "--dry-run")
        rows, proxies, _ = self.plan(outcome)
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
        assert (
            "\nwarning: fewer than 10 optimizer steps, which teach little: mini 2, stl-colour 2, plus-colour 3, "
            "plus-box 3, cotbal 5, ew 5; lower training.batch_size or training.gradient_accumulation_steps, or raise "
            "training.epochs or, for mini, plus-* and alone-*, cotbal.mini_ratio\n"
        ) in outcome.out
        found = Path(run_data["output_dir"]) / "trainings" / "mini"  # which the run will refuse to delete
        found.mkdir(parents=True)
        outcome = cotbal("run", write_config(run_data), "--dry-run", "--set", "training.epochs=10")
        assert "warning" not in outcome.out  # mini has its 10 steps
        assert outcome.out.endswith(f"not made by this run, and deleted by a run with --overwrite: {found}\n")

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

    def test_methods_that_would_not_come_to_move_their_weights(
        self, cotbal: Command, run_data: dict[str, Any], write_config: Callable[[dict[str, Any]], Path], tmp_path: Path
    ) -> None:
        """24 samples in batches of 4 are 6 steps. CoBa's warm-up is the 4 validation batches of the larger set; its
        update behind that comes 5 intervals after the start."""
        fewer = tmp_path / "fewer.jsonl"
        rows = Path(run_data["tasks"][1]["validation"]).read_text().splitlines(keepends=True)
        fewer.write_text("".join(rows[:2]))
        run_data["tasks"][1]["validation"] = str(fewer)

        def warned(**balancing: Any) -> list[str]:
            config = write_config(run_data | {"balancing": balancing})
            outcome = cotbal("run", config, "--dry-run", "--methods", "coba,dwa,igbv1,rlw", "--seeds", "2")
            return re.findall("\nwarning: weights that stay equal for the whole training: (.*); shorten", outcome.out)

        others = "dwa (the first 50 steps of 6), igbv1 (the first 200 steps of 6)"
        assert warned() == [others]
        assert warned(validation={"interval": 2}) == [f"coba (the first 10 steps of 6), {others}"]
        assert warned(validation={"samples_per_task": 2, "interval": 2}) == [f"coba (the first 6 steps of 6), {others}"]
        options = {"dwa": {"form": "epoch"}, "igbv1": {"base_start": 2, "base_steps": 4}}
        assert warned(options=options) == ["igbv1 (the first 6 steps of 6)"]
        assert warned(options=options | {"igbv1": {"base_start": 2, "base_steps": 3}}) == []

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


def test_report_without_a_run(cotbal: Command, tmp_path: Path) -> None:
    outcome = cotbal("report", tmp_path / "none")
    assert outcome.code == 2
    assert outcome.err == f"cotbal: there is no run directory {tmp_path / 'none'}\n"
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("package", ["typer", "matplotlib"])
def test_a_missing_package_is_named(tmp_path: Path, package: str) -> None:
    """One that every command imports, and one that a command imports when it needs it."""
    (tmp_path / "config.yaml").write_text("output_dir: run\n")
    code = f"import sys; sys.modules['{package}'] = None; from trainer.__main__ import main; main()"
    found = subprocess.run(
        [sys.executable, "-c", code, "report", "."], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == (
        f"cotbal: the Python package '{package}' is missing; what the commands need comes with "
        "pip install 'cotbal[trainer]'\n"
    )


def test_as_a_process(tmp_path: Path) -> None:
    """Exit code and streams of a real process, from another folder."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    found = subprocess.run(
        [sys.executable, "-m", "trainer.cli", "weights", "none.json"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == "cotbal: none.json does not exist\n"


@pytest.mark.parametrize(
    ("command", "by", "told"),
    [
        ("run", signal.SIGINT, "interrupted; the same command continues from here"),
        ("run", signal.SIGTERM, "ended by SIGTERM; the same command continues from here"),
        ("weights", signal.SIGINT, "interrupted"),
    ],
)
def test_an_interruption_says_how_to_go_on(tmp_path: Path, command: str, by: signal.Signals, told: str) -> None:
    """Where there is something to go on with. The command waits for a pipe that nobody writes to; an inherited
    "ignore" of the signal is undone."""
    pipe = tmp_path / "scores.json"
    os.mkfifo(pipe)
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from trainer.cli import main; main()"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, "-c", code, command, str(pipe)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with pipe.open("w"):  # returns when the command has opened it too
        process.send_signal(by)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (128 + by, "")
    assert err == f"cotbal: {told}\n"


def test_an_impatient_interruption_ends_what_is_still_at_work(tmp_path: Path) -> None:
    """A thread that would hold the process up, as one that waits for a training to end; no traceback of it."""
    code = (
        "import signal, threading, time; from pathlib import Path; from trainer import cli\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def compare(*_):\n"
        "    threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "    raise KeyboardInterrupt\n"
        "cli._read_json = compare\n"
        "cli.main()"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, "-c", code, "compare", "results.json"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    assert process.stderr.readline() == "cotbal: interrupted\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 130


def test_an_interruption_that_came_out_as_another_error(
    cotbal: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """transformers turns what fails amid its imports into a package that is missing."""

    def interrupted(*_: object) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ModuleNotFoundError("Could not import module 'AutoProcessor'") from error

    monkeypatch.setattr("trainer.config.load_config", interrupted)
    found = cotbal("run", tmp_path / "config.yaml")
    assert (found.code, found.err) == (130, "cotbal: interrupted; the same command continues from here\n")
