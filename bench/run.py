"""Runs the cases of a preset one after the other and keeps what is there after each."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench import balancer, environment, linear, model, turns
from bench.cases import BalancerCase, Case, LinearCase, LogitsCase, ModelCase, Preset
from bench.peers import OURS, all_peers
from bench.peers.base import Peer
from bench.results import FAILED, STOPS, Row, Run
from bench.timing import describe, require_device
from bench.turns import Turn


def measure(case: Case, preset: Preset, device: torch.device, peers: list[Peer]) -> Row:
    """One row of any suite."""
    if isinstance(case, BalancerCase):
        return balancer.measure(case, preset, device)
    if isinstance(case, ModelCase):
        return model.measure(case, preset, device, peers)
    if isinstance(case, LogitsCase):
        # Peers that only fuse the head have nothing to do with logits that exist.
        peers = [peer for peer in peers if type(peer).loss_of_logits is not Peer.loss_of_logits]
    return linear.measure(case, preset, device, peers)


class LostDeviceError(RuntimeError):
    """An illegal access: this process cannot use the device any more. Whose turn it is did it, since every peer is
    waited for before the next one begins, and no other begins when the device is lost."""


def left_out(peer: Peer, reason: str) -> Peer:
    """The peer, not to be asked; it is listed with the reason."""
    peer.unavailable = lambda device: f"left out: {reason}"  # type: ignore[method-assign]
    return peer


def run_preset(
    preset: Preset,
    device: torch.device,
    command: str,
    path: Path | None = None,
    say: Callable[[str], Any] = print,
    only: str = "",
    without: Sequence[str] = (),
    resume: bool = False,
) -> Run:
    """Every case of the preset whose label contains ``only``; written to ``path`` after each, so nothing gets lost.

    ``resume`` goes on with what ``path`` holds, and its time counts; peers that stopped it stay out. ``without`` names
    other peers to leave out.

    Raises:
        LostDeviceError: a process of its own has to go on, without the culprit; the case's row is not written.
    """
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    run = Run(preset.name, command, now, environment.describe(device))
    if resume and path is not None and path.exists():
        run = Run.read(path)
    done = {row.label for row in run.rows}
    started = time.monotonic() - 60 * run.environment.get("minutes", 0.0)
    stops: dict[str, dict[str, str]] = run.environment.get(STOPS, {})
    reasons = {name: f"{stop['error']} ({stop['case']})" for name, stop in stops.items()}
    reasons |= dict.fromkeys(without, "as asked")
    peers = [left_out(peer, reasons[peer.name]) if peer.name in reasons else peer for peer in all_peers()]
    if path is not None:
        run.write(path)  # what stops the first case is noted there too
    for case in preset.cases:
        if only not in case.label or case.label in done:
            continue
        minutes = (time.monotonic() - started) / 60
        if minutes > preset.minutes:
            row = _skipped(case, f"out of time: the preset starts no case after {preset.minutes:g} minutes")
        else:
            turns.begin(path, case.label, started)
            try:
                row = measure(case, preset, device, peers)
            except Exception as error:  # out of memory, a missing package: the other cases still count
                row = _skipped(case, describe(error))
        if not _usable():
            raise LostDeviceError(row.skipped or "the device was lost behind the case")
        for entry in row.entries:
            if entry.name in stops and stops[entry.name]["case"] == case.label:
                entry.status, entry.error = FAILED, stops[entry.name]["error"]
        run.rows.append(row)
        report_progress(row, say)
        if path is not None:
            run.environment["minutes"] = round((time.monotonic() - started) / 60, 2)
            run.environment["clocks after"] = environment.clocks(device)
            run.write(path)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    turns.end()
    return run


def note_stop(path: Path, preset: Preset, turn: Turn, peer: str | None, error: str) -> str:
    """Write down what stopped a run, so that one that resumes it gets further; returns it as a sentence.

    The peer is left out from then on. Where it is none, or ours, without which there is no ratio, the case is.
    """
    run = Run.read(path)
    run.environment["minutes"] = round((time.monotonic() - turn.started) / 60, 2)
    stops = run.environment.setdefault(STOPS, {})
    if peer in {known.name for known in all_peers()} - {OURS, *stops}:
        stops[peer] = {"case": turn.case, "error": error}
        said = f"{peer}: {error}; left out from here on"
    else:
        case = next(case for case in preset.cases if case.label == turn.case)
        run.rows.append(_skipped(case, f"{peer}: {error}" if peer else error))
        said = f"not run, {run.rows[-1].skipped}"
    run.write(path)
    return said


def _usable() -> bool:
    try:
        require_device()
    except RuntimeError:
        return False
    return True


def _skipped(case: Case, reason: str) -> Row:
    extra = {"V": case.V, "D": case.D, "N": case.N} if isinstance(case, LinearCase) else {}
    return Row(case.suite, case.label, asdict(case) | extra, [], skipped=reason)


def report_progress(row: Row, say: Callable[[str], Any]) -> None:
    """One line per entry."""
    say(row.label + (f": not run, {row.skipped}" if row.skipped else ""))
    for entry in row.entries:
        if entry.seconds is None:
            say(f"    {entry.name:38} {entry.status}: {entry.error}")
            continue
        ratio = f"{entry.ratio[1]:6.2f} x ours" if entry.ratio else ""
        floor = f"{entry.seconds[1] / row.floor:6.2f} x floor" if row.floor else ""
        used = f"{entry.memory / 2**20:8.0f} MiB" if entry.memory is not None else ""
        rate = f"{entry.tokens_per_second:9.0f} tokens/s" if entry.tokens_per_second else ""
        say(f"    {entry.name:38} {1e3 * entry.seconds[1]:10.3f} ms  {ratio:14} {floor:15} {used} {rate}")
