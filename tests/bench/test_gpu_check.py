"""The GPU check on a machine without one: its refusal, its pure parts, and its measurements on small CPU sizes."""

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from bench import command, gpu_check, gpu_measure, gpu_tests, gpu_tiles
from bench.cases import HEADS, Head, LinearCase
from bench.problems import Problem
from cotbal_kernels.triton_kernels.tiles import Tile

CPU = torch.device("cpu")
sys.path.append(str(Path(__file__).parent.parent / "cotbal_kernels"))  # for its interpreter


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_says_in_one_sentence_that_there_is_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--out", str(tmp_path / "new")]) == 2
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "no CUDA device" in printed
    assert not (tmp_path / "new").exists()


def test_budget_bounds_sections_and_the_whole() -> None:
    now = 100.0
    budget = gpu_check.Budget(60.0, clock=lambda: now)
    budget.enter(0.5)
    assert budget.left() == 30
    now = 125.0
    assert budget.left() == 5
    now = 140.0
    assert budget.left() == 0  # overdrawn, never negative
    budget.enter(0.5)
    assert budget.left() == 20  # what is left of the whole


def test_report_is_whole_after_every_result(tmp_path: Path) -> None:
    report = gpu_check.Report(tmp_path / "a" / "b")
    report.put("targets", "case", "triton", {"milliseconds": 1.5})
    report.put("targets", "case", "cuda", {"milliseconds": 2.5})
    assert json.loads(report.path.read_text()) == {
        "targets": {"case": {"triton": {"milliseconds": 1.5}, "cuda": {"milliseconds": 2.5}}}
    }
    assert [path.name for path in report.path.parent.iterdir()] == ["gpu_check.json"]


def test_table() -> None:
    assert gpu_check.table(("what", "ms"), [("triton", 32.71234), ("b", "-")]).splitlines() == [
        "| what   | ms   |",
        "|--------|------|",
        "| triton | 32.7 |",
        "| b      | -    |",
    ]


LOG = """\
tests/a.py::test_one[x-{'k': 1}] PASSED                [ 25%]
tests/a.py::test_two SKIPPED (cuda: no nvcc)           [ 50%]
tests/a.py::test_three[(8, 1)] FAILED                  [ 75%]
tests/a.py::test_four ERROR                            [100%]
tests/a.py::test_five """


def test_outcomes_of_a_log_that_was_cut_off_too() -> None:
    assert gpu_tests.outcomes(LOG) == {
        "tests/a.py::test_one[x-{'k': 1}]": "PASSED",
        "tests/a.py::test_two": "SKIPPED",
        "tests/a.py::test_three[(8, 1)]": "FAILED",
        "tests/a.py::test_four": "ERROR",
    }


@pytest.mark.parametrize(("last", "ends_with"), [("sleep 30", "timeout"), ("true", 0)])
def test_command_returns_what_it_printed_and_leaves_nothing_running(
    last: str, ends_with: int | str, tmp_path: Path
) -> None:
    """Whether it takes too long, or ends before what it has started."""
    log = tmp_path / "log"
    started = time.monotonic()
    # The child of the child holds the output: waiting for its end would take 30 seconds.
    status, output = command.run(["sh", "-c", f"echo begun; sleep 30 & echo $!; {last}"], 1, log)
    assert status == ends_with
    assert output == log.read_text()
    begun, child = output.split()
    assert begun == "begun"
    assert time.monotonic() - started < 15
    for _ in range(100):  # a killed process stays until somebody takes note of its end
        stat = Path(f"/proc/{child}/stat")
        if not stat.exists() or ") Z " in stat.read_text():
            break
        time.sleep(0.05)
    else:
        pytest.fail(f"process {child} still runs")
    assert command.run(["no such command"], 1)[1] == ""


def test_sections_on_the_device_run_in_processes_whose_end_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the process wrote is read back; where it ends early, each backend is measured once more by itself."""
    commands: list[list[str]] = []

    def run(arguments: list[str], seconds: float, log: Path | None = None) -> tuple[int, str]:
        commands.append(arguments)
        child = gpu_check.Report(tmp_path)
        if len(commands) == 1:
            child.put("targets", "case", "triton", {"milliseconds": 2.0})
            child.put("errors", "targets", "AcceleratorError: CUDA error: an illegal memory access")
            return 1, ""
        child.values["errors"].clear()
        if "cuda" in arguments:
            return -6, "aborted"
        child.put("targets", "case", "triton", {"milliseconds": 1.0})
        return 0, ""

    monkeypatch.setattr(command, "run", run)
    monkeypatch.setattr(gpu_check, "available", lambda: ["triton", "cuda"])
    report = gpu_check.Report(tmp_path)
    report.put("environment", "device", "a GPU")
    budget = gpu_check.Budget(60.0)
    budget.enter(1.0)
    gpu_check.targets(report, budget)
    assert [arguments[-2:] for arguments in commands] == [
        ["targets", "--here"],
        ["--backends", "triton"],
        ["--backends", "cuda"],
    ]
    assert report.values["environment"] == {"device": "a GPU"}
    assert report.values["targets"] == {"case": {"triton": {"milliseconds": 1.0}}}
    errors = report.values["errors"]["targets"]
    assert "illegal" in errors["together"]
    assert errors["triton"] == "measured"
    assert errors["cuda"].endswith("-6: aborted")
    assert json.loads(report.path.read_text()) == report.values


# A device that is lost from one test on, and a process that ends: everything behind it runs in another process.
BROKEN = """
import os, signal, pytest, torch
pytestmark = pytest.mark.gpu
@pytest.mark.parametrize("k", range(3))
def test_good(k): pass
def test_illegal(): torch.lost = True
def test_bad(): assert False
def test_crash(): os.kill(os.getpid(), signal.SIGKILL)
@pytest.mark.parametrize("k", range(3))
def test_good_too(k): pass
"""
TORCH = """
from types import SimpleNamespace
lost = False
def synchronize():
    if lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
cuda = SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
"""


def test_tests_run_in_processes_of_their_own_and_one_that_ends_its_process_costs_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "repository" / "tests" / "cotbal_kernels"
    folder.mkdir(parents=True)
    (folder / "test_a.py").write_text(BROKEN)
    (folder / "test_other.py").write_text("raise RuntimeError('has no such tests and is not collected')\n")
    (folder / "torch.py").write_text(TORCH)  # what the hooks need of it
    hooks = Path(__file__).parent.parent / "cotbal_kernels" / "gpu_device.py"
    (folder / "conftest.py").write_text(hooks.read_text())
    (tmp_path / "repository" / "pytest.ini").write_text("[pytest]\nmarkers = gpu: a\n")
    monkeypatch.setattr(command, "ROOT", tmp_path / "repository")
    monkeypatch.setattr(gpu_tests.os, "cpu_count", lambda: 4)
    report = gpu_check.Report(tmp_path / "out")
    gpu_check.tests(report, gpu_check.Budget(60))
    found = report.values["tests"]
    name = "tests/cotbal_kernels/test_a.py::test_{}".format
    assert (found["passed"], found["skipped"], found["failed"], found["not_run"]) == (6, 0, 3, [])
    assert found["failures"] == {
        name("illegal"): "FAILED",
        name("bad"): "FAILED",
        name("crash"): "ended its process: -9",
    }
    assert not gpu_tests.stopped(found)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"gpu_check.json", "gpu_tests.log"}
    assert "illegal memory access" in (tmp_path / "out" / "gpu_tests.log").read_text()


def test_no_test_at_all_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As without pytest, or where collecting crashes: nothing failed, and nothing was tested."""
    tail = "No module named pytest"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "run", lambda *_: (1, tail))
    assert gpu_check.main(["--out", str(tmp_path), "--only", "tests"]) == 1
    assert tail in capsys.readouterr().out


def test_sanitizer_is_found_where_a_toolkit_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "compute-sanitizer" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.touch(mode=0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gpu_check.find_sanitizer() == str(tool)


def test_memcheck_sees_the_bounds_of_every_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the tool says how it was called: without torch's cache, whose segments hide most bounds."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "cache off: ${PYTORCH_NO_CUDA_MEMORY_CACHING:-no}" "$@" | head -1\n')
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_check, "find_sanitizer", lambda: str(tool))
    monkeypatch.setattr(gpu_check, "available", lambda: ["triton"])
    monkeypatch.setattr(gpu_check, "_SMALL_STEP", "pass")
    monkeypatch.delenv("PYTORCH_NO_CUDA_MEMORY_CACHING", raising=False)
    report = gpu_check.Report(tmp_path / "out")
    gpu_check.sanitizer(report, gpu_check.Budget(60))
    told = {check: result["tail"] for check, result in report.values["sanitizer"].items()}
    exit_code = f"--error-exitcode 9 {sys.executable} -c pass triton\n"
    assert told == {
        "triton memcheck": f"cache off: 1 --tool memcheck --report-api-errors no {exit_code}",
        "triton racecheck": f"cache off: no --tool racecheck {exit_code}",
    }


def test_a_section_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no such clock")

    def tested(report: gpu_check.Report, budget: gpu_check.Budget) -> None:
        counts = {"passed": 1, "skipped": 1, "failed": 1, "not_run": ["d"], "exit_statuses": ["timeout"], "tail": ""}
        report.put("tests", {**counts, "failures": {"c": "FAILED"}})

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "environment", broken)
    monkeypatch.setattr(gpu_check, "tests", tested)
    assert gpu_check.main(["--out", str(tmp_path), "--only", "environment", "tests"]) == 1
    printed = capsys.readouterr().out
    assert "environment stopped: RuntimeError: no such clock" in printed
    assert "tests: 1 passed, 1 failed, 1 skipped, 1 not run" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is missing where there is no GPU")
def test_a_backend_whose_tests_are_skipped_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(gpu_check._BACKENDS, {})
    printed = capsys.readouterr().out
    properties = SimpleNamespace(name="a GPU", major=9, minor=0, total_memory=1, multi_processor_count=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    report = gpu_check.Report(tmp_path)
    for outcome, wanted in (
        ((0, "compiling, once\n" + printed), ["triton: it needs a CUDA device", "cuda: "]),
        ((0, 'a line\n{"triton": null, "cuda": null}\n'), []),
        (("timeout", "compiling, once"), ["backends: exit status timeout: compiling, once"]),
    ):
        monkeypatch.setattr(command, "run", lambda arguments, *_, found=outcome: found)
        gpu_check.environment(report, gpu_check.Budget(60))
        lines = gpu_check.summary(report.values).splitlines()
        assert len(lines) == len(wanted)
        assert all(line.startswith(start) for line, start in zip(lines, wanted, strict=True))


def test_interleaved_runs_in_turns_and_survives_a_failure() -> None:
    order: list[str] = []

    def fail() -> None:
        order.append("c")
        raise ValueError("out of memory")

    candidates = {"a": lambda: order.append("a"), "c": fail, "b": lambda: order.append("b")}
    found = gpu_measure.interleaved(candidates, lambda: 1.0, CPU, warmup=1, rounds=3)
    assert order == ["b", "a", "c", "a", "b", "b", "a", "a", "b"]  # each round begins with another one
    assert found["c"] == {"error": "ValueError: out of memory"}
    assert found["a"]["rounds"] == found["b"]["rounds"] == 3
    late = gpu_measure.interleaved({"a": lambda: None}, lambda: 0.0, CPU, warmup=1, rounds=9)
    assert late["a"]["rounds"] == 3  # enough for a median, then no more


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> tuple[LinearCase, LinearCase]:
    """The two cases, at the size of a head for a CPU."""
    monkeypatch.setitem(HEADS, "small", Head("small", V=100, D=16))
    return LinearCase("small", 32, tasks=4, dtype="float32"), LinearCase("small", 64, 0.3, 4, dtype="float32")


def test_targets_are_measured_and_derived(tmp_path: Path, small: tuple[LinearCase, LinearCase]) -> None:
    """The same code on a CPU, small: every case, every candidate, ratios that are what they say."""
    report = gpu_check.Report(tmp_path)
    full, sparse = small
    gpu_measure.measure_targets(report.put, lambda: 9.0, ["portable"], CPU, full, sparse)
    cases = report.values["targets"]
    assert [*cases] == [full.label, replace(full, mode="loss").label, sparse.label]
    for found in cases.values():
        assert all("error" not in result for result in found.values()), found
        base, ours = (found[name] for name in (next(iter(found)), "portable"))
        assert base["of_products"] == 1
        assert ours["of_products"] == pytest.approx(ours["milliseconds"] / base["milliseconds"])
    dense = cases[full.label]
    assert [*dense] == ["three products", "portable", "portable, recompute", "portable, all logits"]
    products = dense["three products"]
    assert products["tflops"] == pytest.approx(6 * 32 * 16 * 100 / products["milliseconds"] / 1e9)
    assert "dense PyTorch" in cases[sparse.label]
    assert f"| {full.label}" in gpu_check.summary(report.values)


def test_a_candidate_that_never_ends_takes_no_figures_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: tuple[LinearCase, LinearCase]
) -> None:
    """The process is killed then; its stand-in is an exception that nobody catches."""

    def loss_of(peer: Any, problem: Problem) -> torch.Tensor:
        if peer.name == "cuda":
            raise SystemExit
        return problem.scores.sum() + problem.weight_VD.sum()  # type: ignore[union-attr]

    monkeypatch.setattr(gpu_measure, "loss_of", loss_of)
    report = gpu_check.Report(tmp_path)
    with pytest.raises(SystemExit):
        gpu_measure.measure_targets(report.put, lambda: 9.0, ["triton", "cuda"], CPU, *small)
    (found,) = json.loads(report.path.read_text())["targets"].values()
    assert {name: result["rounds"] for name, result in found.items()} == {"three products": 3, "triton": 3}
    assert found["triton"]["of_products"] > 0


def test_all_logits_and_the_replay_are_measured_beside_the_step(
    monkeypatch: pytest.MonkeyPatch, small: tuple[LinearCase, LinearCase]
) -> None:
    """The steps that are asked for; the replay is of the plain one, and a device that can replay has one."""
    asked: list[dict[str, Any]] = []
    candidates: dict[str, Any] = {}

    def loss_of(peer: Any, problem: Problem) -> torch.Tensor:
        asked.append(peer.options)
        return problem.scores.sum() + problem.weight_VD.sum()  # type: ignore[union-attr]

    def interleaved(given: dict[str, Any], *_: Any, **__: Any) -> dict[str, Any]:
        if "one product" not in given:
            candidates.update(given)
        return {name: {} for name in given}

    monkeypatch.setattr(gpu_measure, "loss_of", loss_of)
    monkeypatch.setattr(gpu_measure, "interleaved", interleaved)
    monkeypatch.setattr(gpu_measure, "replay_of", lambda run: run)
    monkeypatch.setattr(gpu_measure, "extra_mib", lambda *_: None)
    monkeypatch.setattr(gpu_measure, "host_waits", lambda *_: None)
    # Tensors stay on the CPU: only what is asked of the device's type is that of a GPU.
    for name in ("make", "product_floor"):
        real = getattr(gpu_measure, name)
        monkeypatch.setattr(gpu_measure, name, lambda case, _, real=real: real(case, CPU))
    gpu_measure.measure_targets(lambda *_: None, lambda: 9.0, ["triton", "cuda"], torch.device("cuda"), *small)
    for name in ("triton, all logits", "triton, graph replay", "cuda, max_tokens"):
        candidates[name]()
    most, plain, bounded = asked
    assert most.pop("chunk_size") >= 8192
    assert most == plain == {"backend": "triton"}
    assert bounded == {"backend": "cuda", "max_tokens": small[1].N}


def test_replay_captures_once_after_a_run_that_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    @contextmanager
    def entered(kind: str) -> Iterator[None]:
        log.append(f"{kind} begins")
        yield
        log.append(f"{kind} ends")

    stream = SimpleNamespace(wait_stream=lambda _: log.append("waits"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: entered("stream"))
    monkeypatch.setattr(torch.cuda, "graph", lambda _: entered("capture"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: log.append("replay")))
    replay = gpu_measure.replay_of(lambda: log.append("run"))
    assert log == []
    replay()
    warm = ["waits", "stream begins", "run", "stream ends", "waits"]
    assert log == [*warm, "capture begins", "run", "capture ends", "replay"]
    replay()
    assert log[-2:] == ["replay", "replay"]


def test_tiles_of_the_grid_fit_and_begin_with_the_backends() -> None:
    tiles = list(gpu_tiles.candidates())
    assert tiles[:2] == [Tile(128, 256, 64, 8, 3, 8, 2), Tile(128, 256, 64, 8, 4, 8, 2)]
    assert len(tiles) == len(set(tiles)) > 30
    assert all(tile.stages * (tile.rows + tile.cols) * tile.depth * 2 <= 227 * 1024 for tile in tiles)
    assert not gpu_tiles.fits(Tile(256, 256, 64, 8, 3))  # 256 accumulators a thread


def test_a_tile_that_costs_a_worker_its_device_is_the_only_one_that_is_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    submitted: list[Any] = []
    other = SimpleNamespace(submit=lambda function, job: submitted.append(job) or SimpleNamespace(result=lambda: None))
    monkeypatch.setattr(gpu_tiles, "Bench", lambda *_: SimpleNamespace(run=fail))
    monkeypatch.setattr(gpu_tiles, "ProcessPoolExecutor", lambda *_, **__: nullcontext(other))
    monkeypatch.setattr(gpu_tiles, "_lost", False)
    job = ("project", Tile(16, 64, 32, 1, 1, 2, 2), gpu_tiles.WARM, "cpu")
    assert "illegal" in str(gpu_tiles._compile(job))
    assert not gpu_tiles._lost  # a tile that cannot be compiled leaves the device as it is
    monkeypatch.setattr(gpu_tiles, "require_device", fail)
    assert "illegal" in str(gpu_tiles._compile(job))
    assert not submitted
    assert gpu_tiles._compile(job) is None
    assert submitted == [job]


def test_tuning_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles in the interpreter: the launches are right, results agree, the best comes first."""

    from interpreter import interpreted

    class Here:
        def __init__(self, *_: Any) -> None: ...
        def __enter__(self) -> "Here":
            return self

        def __exit__(self, *_: Any) -> None: ...
        def submit(self, function: Any, job: Any) -> Any:
            value = function(job)
            return SimpleNamespace(result=lambda timeout: value)

        def shutdown(self, **_: Any) -> None: ...

    monkeypatch.setattr(gpu_tiles, "ProcessPoolExecutor", Here)
    small = gpu_tiles.Shape(20, 40, 70)
    tables: dict[str, Any] = {}
    tiles = [Tile(16, 64, 32, 1, 1, 2, 2), Tile(32, 32, 16, 1, 1, 4, 1), Tile(16, 48, 32, 1, 1)]  # 48 is no power of 2
    with interpreted():
        put = lambda _, product, rows: tables.__setitem__(product, rows)  # noqa: E731
        gpu_tiles.tune(put, lambda: 99.0, CPU, small, small, 3, tiles)
    assert [*tables] == list(gpu_tiles.PRODUCTS)
    for rows in tables.values():
        assert [tuple(row["tile"]) for row in rows[-1:]] == [tuple(tiles[2])]
        assert "problem" in rows[-1]
        assert rows[0]["tflops"] >= rows[1]["tflops"] > 0
        assert not any("wrong" in row for row in rows)
        # Measured once more when nothing compiles any more.
        assert [row.get("quiet", False) for row in rows] == [True, True, False]
    assert math.isfinite(tables["project"][0]["milliseconds"])
