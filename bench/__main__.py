"""Speed and memory beside every peer.

python -m bench run --preset cpu --out DIR      measure; DIR/cpu.json holds everything, peers that hang or crash too
python -m bench report                          docs/benchmarks.md from the committed results
python -m bench report DIR --html page.html     a page with plots of any results
python -m bench guard                           counted work against bench/baselines/work.json; no GPU needed
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).parent
COMMITTED = HERE / "results"
DOCUMENT = HERE.parent / "docs" / "benchmarks.md"


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 where the guard finds more work, or 2 for a mistake of the user."""
    parser = argparse.ArgumentParser("bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure")
    run.add_argument("--preset", choices=["quick", "cpu", "h200"], default="quick")
    run.add_argument("--out", type=Path, required=True, help="folder of the JSON file")
    run.add_argument("--only", default="", metavar="TEXT", help="cases whose label contains this")
    run.add_argument("--without", action="append", default=[], metavar="PEER", help="leave this peer out")
    run.add_argument("--resume", action="store_true", help="go on with the cases that the JSON file does not hold")
    run.add_argument("--here", action="store_true", help="without the process that ends a run in which a peer hangs")
    report = commands.add_parser("report", help="tables and plots of results")
    report.add_argument("results", type=Path, nargs="*", help="folders; none: the committed ones")
    report.add_argument("--markdown", type=Path, help="default without folders: docs/benchmarks.md")
    report.add_argument("--html", type=Path, help="a page with plots")
    guard = commands.add_parser("guard", help="counted work against its baseline")
    guard.add_argument("--update", action="store_true", help="write the baseline instead: a deliberate change")
    options = parser.parse_args(arguments)
    try:
        return {"run": _run, "report": _report, "guard": _guard}[options.command](options)
    except (ValueError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    from bench.cases import PRESETS
    from bench.supervisor import supervise

    labels = [case.label for case in PRESETS[options.preset].cases]
    if not any(options.only in label for label in labels):
        listed = "\n".join(labels)
        raise ValueError(f"no case of preset {options.preset} has {options.only!r} in its label; its labels:\n{listed}")
    if options.here:
        return _run_here(options)
    path = options.out / f"{options.preset}.json"
    # Unbuffered: what was said is not to be lost with a process that is ended.
    command = [sys.executable, "-u", "-m", "bench", "run", "--here", "--preset", options.preset]
    command += ["--out", str(options.out), "--only", options.only, *(["--resume"] if options.resume else [])]
    for name in options.without:
        command += ["--without", name]
    status = supervise(command, path, PRESETS[options.preset])
    if status == 0:
        print(f"\n{path}\npython -m bench report {options.out} --html {options.out / 'report.html'}   # tables, plots")
    return status


def _run_here(options: argparse.Namespace) -> int:
    """The run itself, which ends with the device or with a peer that does."""
    import torch

    from bench import turns
    from bench.cases import PRESETS
    from bench.peers import by_name
    from bench.run import LostDeviceError, note_stop, run_preset
    from bench.supervisor import LOST_DEVICE

    preset = PRESETS[options.preset]
    if preset.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"preset {preset.name} needs a CUDA device and torch sees none; --preset cpu runs here")
    device = torch.device(preset.device, 0) if preset.device == "cuda" else torch.device("cpu")
    command = f"python -m bench run --preset {preset.name}" + (f' --only "{options.only}"' if options.only else "")
    command += "".join(f' --without "{by_name(name).name}"' for name in options.without)
    path = options.out / f"{preset.name}.json"
    try:
        run_preset(preset, device, command, path, print, options.only, options.without, options.resume)
    except LostDeviceError as error:
        turn = turns.read(path)
        assert turn is not None  # of the case that is under way
        print(f"\n{turn.case}: the device became unusable: {note_stop(path, preset, turn, turn.peer, str(error))}")
        return LOST_DEVICE
    return 0


def _report(options: argparse.Namespace) -> int:
    from bench.report import markdown, read_runs

    runs = read_runs(options.results or [COMMITTED])
    target = options.markdown or (None if options.results else DOCUMENT)
    if target is not None:
        target.write_text(markdown(runs), encoding="utf-8")
        print(target)
    if options.html is not None:
        from bench.page import page

        options.html.write_text(page(runs), encoding="utf-8")
        print(options.html)
    if target is None and options.html is None:
        print(markdown(runs))
    return 0


def _guard(options: argparse.Namespace) -> int:
    from bench import guard

    if options.update:
        print(guard.update())
        return 0
    problems, hints = guard.compare(guard.read_baseline(), guard.count_work())
    print("\n".join([*problems, *hints]) or "counted work is that of the baseline")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
