"""Ranks of a test: they fork from a process with the libraries imported, and meet in a file, not at a port.

results = run_on_ranks(work, 2, tmp_path)          # work(rank, ranks), a function of a module or a partial of one
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

multiprocessing.set_forkserver_preload(["torch", "cotbal_kernels", "transformers.trainer", "peft"])


def run_on_ranks(work: Callable[[int, int], Any], ranks: int, folder: Path) -> list[Any]:
    """What `work` returns on each rank of a gloo group, under torchrun's variables.

    `folder` is theirs alone; in it is ``RANK.log`` with what each printed.
    """
    mp.start_processes(_run, args=(work, ranks, folder), nprocs=ranks, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


def _run(rank: int, work: Callable[[int, int], Any], ranks: int, folder: Path) -> None:
    os.environ |= {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
    os.environ |= {name: str(ranks) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with (folder / f"{rank}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", store, rank=rank, world_size=ranks, timeout=timedelta(seconds=300))
    torch.save(work(rank, ranks), folder / f"{rank}.pt")
    dist.barrier()
    # Threads of native libraries can abort an ordinary exit ("terminate called without an active exception").
    os._exit(0)
