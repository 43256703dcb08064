"""Runs of several machines, each a process of this one with the same command."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForImageTextToText

# `python -c` in place of `cotbal`: a machine that is gone is missed within seconds.
COTBAL = (
    "import trainer.nodes.cluster as cluster; import trainer.nodes.following as following; "
    "cluster.SILENCE = following.SILENCE = 5.0; import trainer.cli; trainer.cli.main()"
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Machines:
    """Starts `cotbal` as node 0, 1, ... of one run."""

    def __init__(self, count: int, port: int | None = None) -> None:
        self.port = port or free_port()
        self.count = count
        self.processes: dict[int, subprocess.Popen[str]] = {}

    def start(self, *arguments: object, ranks: range | None = None) -> None:
        for rank in ranks or range(self.count):
            own = ["--node-rank", str(rank), "--master", f"127.0.0.1:{self.port}"]
            self.processes[rank] = subprocess.Popen(
                [sys.executable, "-c", COTBAL, *map(str, arguments), *own],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

    def wait(self, timeout: float = 600) -> list[tuple[int, str]]:
        """Exit code and stderr of every machine, by rank."""
        ended = []
        try:
            for _, process in sorted(self.processes.items()):
                _, errors = process.communicate(timeout=timeout)
                ended.append((process.returncode, errors))
        finally:
            for process in self.processes.values():
                process.kill()
        return ended

    def run(self, *arguments: object) -> list[str]:
        """Runs a command on all machines to a good end; returns what each said."""
        self.start(*arguments)
        ended = self.wait()
        assert [code for code, _ in ended] == [0] * self.count, "\n".join(said[-3000:] for _, said in ended)
        return [said for _, said in ended]


def assert_equal_models(found: Path, expected: Path) -> None:
    """Parameter by parameter, bit for bit."""
    ours, theirs = (
        AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).state_dict()
        for model in (found, expected)
    )
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def survivors(run_dir: Path) -> list[str]:
    """Command lines of processes that still work on this run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(run_dir / "trainings") in line:
            found.append(line)
    return found


def write(path: Path, data: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(data))
    return path
