"""Everything a GPU can tell about the kernels, in one command and a bounded time:

    python -m bench.gpu_check --out DIR [--minutes 9] [--only environment tests sanitizer targets tiles]

``DIR/gpu_check.json`` is written after every single result, so that nothing is lost when the time is up; logs of the
tests are beside it. A short table is printed at the end. Without a CUDA device: one sentence, exit status 2.

Half an hour with a GPU, in this order, since each leaves compiled kernels to the next:

1. ``python -m bench.gpu_check --out DIR``: 9 minutes. At most 4 for the tests, 2.3 for compute-sanitizer; the targets
   are 3 x 8.6 Tflop a step, 27 rounds of six candidates, 10 s beside compiling; the tile search takes what is left,
   which may be a minute: with time to spare ``--only tiles`` searches again, and further.
2. The peers, as bench/peers.txt says, then ``python -m bench run --preset h200 --out DIR``: 8 minutes and the case that
   is under way then. A case is 2 to 6 s of kernels at 600 Tflop/s (14 variants of 26 to 35 Tflop, checked, measured,
   and 3 to 15 rounds), 1 s of float64, and what has to be compiled for it: 2 to 4 minutes over the whole preset. A peer
   that hangs or crashes is left out of what follows; whatever happens, nothing is measured after 9 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from . import command, gpu_tests
from . import environment as provenance

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
_BACKENDS = """
import json
from cotbal_kernels import backends
print(json.dumps({name: backends.unavailable_reason(name) for name in ("triton", "cuda")}))
"""
# Tools of compute-sanitizer: their options, and what the environment has to say.
_CHECKS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    # torch's cache hands out pieces of large allocations, and the tool sees the bounds of allocations only. Calls that
    # torch makes to find out whether they fail are no errors of a kernel; those that matter raise in Python.
    "memcheck": (("--report-api-errors", "no"), {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
    "racecheck": ((), {}),
}


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
    """The JSON file, whole after every result; what it holds already stays."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path, self.values = directory / "gpu_check.json", dict[str, Any]()
        self.reload()

    def reload(self) -> None:
        """What another process, or an earlier run of other sections, has written."""
        if self.path.exists():
            self.values = json.loads(self.path.read_text())

    def put(self, *keys_and_value: Any) -> None:
        """Set ``values[key][key]... = value`` and write the file."""
        *keys, last, value = keys_and_value
        place = self.values
        for key in keys:
            place = place.setdefault(key, {})
        place[last] = value
        self.write()

    def write(self) -> None:
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


def environment(report: Report, budget: Budget) -> None:
    device = torch.cuda.get_device_properties(0)
    report.put("environment", "device", device.name)
    report.put("environment", "capability", f"{device.major}.{device.minor}")
    report.put("environment", "memory_bytes", device.total_memory)
    report.put("environment", "multiprocessors", device.multi_processor_count)
    report.put("environment", "versions", _versions())
    queried = "clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,driver_version,persistence_mode"
    _, output = command.run(["nvidia-smi", f"--query-gpu={queried}", "--format=csv,noheader"], 20)
    report.put("environment", "nvidia_smi", dict(zip(queried.split(","), output.strip().split(", "), strict=False)))
    report.put("environment", "commit", provenance.commit() or "not a git checkout")
    report.put("environment", "sources", provenance.sources())
    # Tests of a backend that is not available are skipped. This also compiles csrc/, which they would wait for.
    status, output = command.run([sys.executable, "-c", _BACKENDS], budget.left())
    *_, last = output.strip().splitlines() or [""]
    reasons = json.loads(last) if status == 0 else {"backends": f"exit status {status}: {output.strip()[-500:]}"}
    report.put("environment", "unavailable", {name: reason for name, reason in reasons.items() if reason})


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
    report.put("tests", gpu_tests.run(report.path.parent, budget.left))


def find_sanitizer() -> str | None:
    """On the path, or where a CUDA toolkit has it."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.path.realpath(nvcc).rsplit("/bin/", 1)[0] if nvcc else None]
    homes += ["/usr/local/cuda", *map(str, sorted(Path("/usr/local").glob("cuda-*"), reverse=True))]
    places = [f"{home}/{folder}" for home in homes if home for folder in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def sanitizer(report: Report, budget: Budget) -> None:
    """A small step of each backend under compute-sanitizer: out-of-bounds accesses, then races in shared memory."""
    tool = find_sanitizer()
    if tool is None:
        report.put("sanitizer", "tool", "compute-sanitizer is not installed")
        return
    backends = available()
    jobs = [(backend, check) for backend in backends for check in _CHECKS]

    def checked(job: tuple[str, str]) -> dict[str, Any]:
        backend, check = job
        options, variables = _CHECKS[check]
        step = [sys.executable, "-c", _SMALL_STEP, backend]
        arguments = [tool, "--tool", check, *options, "--error-exitcode", "9", *step]
        status, output = command.run(arguments, budget.left(), variables=variables)
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)
        return {"exit_status": status, "summary": summary[-1:], "tail": output[-600:]}

    # All at once: under the tool most of the time goes into loading PyTorch, on the host.
    with ThreadPoolExecutor(max(1, len(jobs))) as pool:
        # Compiled and cached beforehand: under the tool it would take minutes.
        steps = ([sys.executable, "-c", _SMALL_STEP, backend] for backend in backends)
        list(pool.map(lambda step: command.run(step, budget.left()), steps))
        for (backend, check), result in zip(jobs, pool.map(checked, jobs), strict=True):
            report.put("sanitizer", f"{backend} {check}", result)


def available() -> list[str]:
    """The GPU backends that run here."""
    from cotbal_kernels import backends

    return [name for name in ("triton", "cuda") if backends.unavailable_reason(name) is None]


def targets(report: Report, budget: Budget) -> None:
    """All backends side by side. Where that ends early, each once more by itself: it may have been one of them."""
    _in_process("targets", report, budget)
    ended = {"together": report.values.get("errors", {}).pop("targets", None)}
    if ended["together"] is None:
        return
    for backend in available():
        if budget.left():
            _in_process("targets", report, budget, backend)
            ended[backend] = report.values.get("errors", {}).pop("targets", "measured")
    report.put("errors", "targets", ended)


def tiles(report: Report, budget: Budget) -> None:
    _in_process("tiles", report, budget)


def _in_process(section: str, report: Report, budget: Budget, *backends: str) -> None:
    """A section that uses the device, in a process of its own: after an illegal access no process can go on with it."""
    arguments = ["--out", str(report.path.parent.resolve()), "--minutes", f"{budget.left() / 60:.3f}"]
    arguments += ["--only", section, "--here", *(["--backends", *backends] if backends else [])]
    log = report.path.parent / f"gpu_{section}.log"
    # It stops by itself; a compilation that is under way then, or a kernel that does not end, has some seconds more.
    status, output = command.run([sys.executable, "-m", "bench.gpu_check", *arguments], budget.left() + 15, log)
    report.reload()
    if status not in (0, 1):
        report.put("errors", section, f"exit status {status}: {output.strip()[-500:]}")


def targets_here(report: Report, budget: Budget, backends: list[str] | None = None) -> None:
    from .gpu_measure import measure_targets

    measure_targets(report.put, budget.left, backends or available() or ["portable"], torch.device("cuda"))


def tiles_here(report: Report, budget: Budget) -> None:
    from .gpu_tiles import tune

    tune(report.put, budget.left, torch.device("cuda"))


def summary(values: dict[str, Any]) -> str:
    """The short table of what was found."""
    lines = [f"{name}: {reason}" for name, reason in values.get("environment", {}).get("unavailable", {}).items()]
    if "tests" in values:
        found = values["tests"]
        end = f", {len(found['not_run'])} not run" if found["not_run"] else ""
        lines.append(f"tests: {found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped{end}")
        lines += [f"  {kind}: {name}" for name, kind in list(found["failures"].items())[:20]]
        if gpu_tests.stopped(found):
            lines.append(f"tests ended with {found['exit_statuses']}: {found['tail']}")
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
        for name, r in found.items()
    ]
    for case, found in values.get("targets", {}).items():
        for name, r in found.items():
            lines += [f"{case}, {name}: {r['error']}"] if "error" in r else []
            lines += [f"{case}, {name} waits: {r['host_waits']}"] if r.get("host_waits", "none") != "none" else []
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
    parser.add_argument("--backends", nargs="+", choices=("triton", "cuda"), help="of the targets; default: all")
    parser.add_argument("--here", action="store_true", help="no processes for targets and tiles")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("There is no CUDA device here, and everything that this command checks needs one.")
        return 2
    budget, report = Budget(60 * args.minutes), Report(args.out)
    run = {"environment": environment, "tests": tests, "sanitizer": sanitizer, "targets": targets, "tiles": tiles}
    if args.here:
        run |= {"targets": lambda report, budget: targets_here(report, budget, args.backends), "tiles": tiles_here}
    else:
        given = sys.argv[1:] if arguments is None else arguments
        report.put("commands", [*report.values.get("commands", []), "python -m bench.gpu_check " + shlex.join(given)])
    for section in SECTIONS:
        if section not in args.only:
            continue
        # Nothing of an earlier run into the same folder stands among what this one finds.
        report.values.get("errors", {}).pop(section, None)
        if not args.here:
            report.values.pop(section, None)
        report.write()
        budget.enter(1.0 if args.here else SHARES[section])  # here the time is that of one section
        started = time.monotonic()
        try:
            run[section](report, budget)
        except Exception as error:  # the next section may still tell something
            report.put("errors", section, f"{type(error).__name__}: {str(error)[:500]}")
        report.put("seconds", section, round(time.monotonic() - started, 1))
        if section in ("environment", "tests", "targets"):
            report.put("clocks after", section, provenance.clocks(torch.device("cuda", 0)))
    print(summary(report.values))
    print(f"\nEverything: {report.path}")
    found = report.values.get("tests")
    failed = found is not None and (found["failed"] or gpu_tests.stopped(found))
    return 1 if failed or report.values.get("errors") else 0


if __name__ == "__main__":
    sys.exit(main())
