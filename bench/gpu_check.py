"""Everything a GPU can tell about the kernels, in one command and a bounded time:

    python -m bench.gpu_check --out DIR [--minutes 9] [--only environment tests sanitizer targets tiles]

``DIR/gpu_check.json`` is written after every single result, so that nothing is lost when the time is up; the log of
the tests is beside it. A short table is printed at the end. Without a CUDA device: one sentence, exit status 2.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = ("environment", "tests", "sanitizer", "targets", "tiles")
# Largest share of the whole time that a section may take; what it leaves goes to the next ones.
SHARES = {"environment": 0.1, "tests": 0.45, "sanitizer": 0.25, "targets": 0.6, "tiles": 1.0}
_SMALL_STEP = """
import sys, torch
from cotbal_kernels import linear_task_cross_entropy
hidden = torch.randn(150, 136, device="cuda").bfloat16().requires_grad_()
weight = torch.randn(700, 136, device="cuda").bfloat16().requires_grad_()
labels, tasks = torch.arange(150, device="cuda"), torch.arange(150, device="cuda") % 3
labels[::7] = -100
for options in ({"chunk_size": 20}, {"recompute": True}, {"aggregation": "none"}):
    lam = torch.ones(3, device="cuda")
    out = linear_task_cross_entropy(hidden, weight, labels, tasks, lam, backend=sys.argv[1], **options)
    out.loss.sum().backward()
torch.cuda.synchronize()
"""


class Budget:
    """Seconds that are left, of all and of a section."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.clock, self.end = seconds, clock, clock() + seconds
        self.section_end = self.end

    def enter(self, share: float) -> None:
        """Begin a section that may take ``share`` of the whole time, at most what is left."""
        self.section_end = min(self.end, self.clock() + share * self.seconds)

    def left(self) -> float:
        """Seconds left of the section, never negative."""
        return max(0.0, self.section_end - self.clock())


class Report:
    """The JSON file, whole after every result."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path, self.values = directory / "gpu_check.json", dict[str, Any]()

    def put(self, *keys_and_value: Any) -> None:
        """Set ``values[key][key]... = value`` and write the file."""
        *keys, last, value = keys_and_value
        place = self.values
        for key in keys:
            place = place.setdefault(key, {})
        place[last] = value
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.values, indent=1, default=str))
        temporary.replace(self.path)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; floats with three digits."""
    cells = [list(header), *([f"{c:.3g}" if isinstance(c, float) else str(c) for c in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def outcomes(log: str) -> dict[str, Any]:
    """Outcomes of ``pytest -v`` so far, whether it came to its end or not."""
    found = re.findall(r"^(\S+::.*?) (PASSED|FAILED|SKIPPED|ERROR)\b", log, re.MULTILINE)
    counts = {outcome: sum(1 for _, kind in found if kind == outcome.upper()) for outcome in ("passed", "skipped")}
    failed = [name for name, kind in found if kind in ("FAILED", "ERROR")]
    return {
        **counts,
        "failed": len(failed),
        "failures": failed,
        "complete": bool(re.search(r"^=+ .* in [\d.]+s", log, re.M)),
    }


def _command(arguments: list[str], seconds: float) -> tuple[int | str, str]:
    """Exit status, or "timeout", and what was printed until then."""
    try:
        done = subprocess.run(
            arguments, cwd=ROOT, timeout=max(seconds, 1), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout or b""
        return "timeout", output.decode(errors="replace") if isinstance(output, bytes) else output
    except OSError as error:
        return str(error), ""
    return done.returncode, done.stdout


def environment(report: Report, budget: Budget) -> None:
    device = torch.cuda.get_device_properties(0)
    report.put("environment", "device", device.name)
    report.put("environment", "capability", f"{device.major}.{device.minor}")
    report.put("environment", "memory_bytes", device.total_memory)
    report.put("environment", "multiprocessors", device.multi_processor_count)
    report.put("environment", "versions", _versions())
    queried = "clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,driver_version,persistence_mode"
    status, output = _command(["nvidia-smi", f"--query-gpu={queried}", "--format=csv,noheader"], 20)
    report.put("environment", "nvidia_smi", dict(zip(queried.split(","), output.strip().split(", "), strict=False)))
    status, output = _command(["git", "rev-parse", "HEAD"], 20)
    report.put("environment", "commit", output.strip() if status == 0 else "not a git checkout")


def _versions() -> dict[str, str]:
    import triton

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "triton": triton.__version__,
    }


def tests(report: Report, budget: Budget) -> None:
    """The ``gpu`` tests; where the time ends, what passed until then."""
    log = report.path.parent / "gpu_tests.log"
    arguments = [sys.executable, "-m", "pytest", "tests/cotbal_kernels", "-m", "gpu", "-v", "--tb=short"]
    arguments += ["-p", "no:cacheprovider", "-o", "addopts="]
    status, output = _command(arguments, budget.left())
    log.write_text(output)
    report.put("tests", {**outcomes(output), "exit_status": status})


def sanitizer(report: Report, budget: Budget) -> None:
    """A small step of each backend under compute-sanitizer: out-of-bounds accesses, then races in shared memory."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        report.put("sanitizer", "tool", "compute-sanitizer is not installed")
        return
    for backend in available():
        # Compiled and cached beforehand: under the tool it would take minutes.
        _command([sys.executable, "-c", _SMALL_STEP, backend], budget.left())
        for check in ("memcheck", "racecheck"):
            if budget.left() < 10:
                report.put("sanitizer", f"{backend} {check}", "no time left")
                continue
            status, output = _command(
                [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-c", _SMALL_STEP, backend],
                min(budget.left(), 90),
            )
            summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)
            report.put(
                "sanitizer",
                f"{backend} {check}",
                {"exit_status": status, "summary": summary[-1:], "tail": output[-600:]},
            )


def available() -> list[str]:
    """The GPU backends that run here."""
    from cotbal_kernels import backends

    return [name for name in ("triton", "cuda") if backends.unavailable_reason(name) is None]


def targets(report: Report, budget: Budget) -> None:
    from .gpu_measure import measure_targets

    measure_targets(report.put, budget.left, available(), torch.device("cuda"))


def tiles(report: Report, budget: Budget) -> None:
    from .gpu_tiles import tune

    tune(report.put, budget.left, torch.device("cuda"))


def summary(values: dict[str, Any]) -> str:
    """The short table of what was found."""
    lines = []
    if "tests" in values:
        found = values["tests"]
        end = "" if found["complete"] else ", cut off by the time limit"
        lines.append(f"tests: {found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped{end}")
        lines += [f"  failed: {name}" for name in found["failures"][:20]]
    for check, result in values.get("sanitizer", {}).items():
        lines.append(f"{check}: {result if isinstance(result, str) else result['summary'] or result['exit_status']}")
    rows = [
        (
            case,
            name,
            r.get("milliseconds", "-"),
            r.get("of_products", "-"),
            r.get("tflops", "-"),
            r.get("extra_mib", "-"),
        )
        for case, found in values.get("targets", {}).items()
        if isinstance(found, dict)
        for name, r in found.items()
        if isinstance(r, dict)
    ]
    if rows:
        lines.append(table(("case", "what", "ms", "x of products", "TFLOP/s", "extra MiB"), rows))
    for product, found in values.get("tiles", {}).items():
        best = [(product, row["tile"], row["tflops"]) for row in found[:3] if "tflops" in row]
        if best:
            lines.append(table(("product", "tile (rows, cols, depth, warps, stages, group, parts)", "TFLOP/s"), best))
    for section, message in values.get("errors", {}).items():
        lines.append(f"{section} stopped: {message}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything together")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("There is no CUDA device here, and everything that this command checks needs one.")
        return 2
    budget, report = Budget(60 * args.minutes), Report(args.out)
    run = {"environment": environment, "tests": tests, "sanitizer": sanitizer, "targets": targets, "tiles": tiles}
    for section in SECTIONS:
        if section not in args.only:
            continue
        budget.enter(SHARES[section])
        started = time.monotonic()
        try:
            run[section](report, budget)
        except Exception as error:  # the next section may still tell something
            report.put("errors", section, f"{type(error).__name__}: {str(error)[:500]}")
        report.put("seconds", section, round(time.monotonic() - started, 1))
    print(summary(report.values))
    print(f"\nEverything: {report.path}")
    failed = report.values.get("tests", {}).get("failed", 0)
    return 1 if failed or report.values.get("errors") else 0


if __name__ == "__main__":
    sys.exit(main())
