"""Which tile shapes are fastest on this device for the three products of the Triton backend.

Each product runs alone on the sizes it has in training, for every tile of a grid; the best come first. Tiles are
compiled by worker processes into Triton's cache on disk beforehand, since compiling takes seconds and running
milliseconds. A result that differs from that of the backend's own tile is named wrong.
"""

# Shapes: N packed rows, D hidden width, V vocabulary of one slice.

from __future__ import annotations

import itertools
import os
import signal
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, TimeoutError
from contextlib import suppress
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch

from cotbal_kernels.interface import LinearProblem, TokenLoss
from cotbal_kernels.triton_kernels.head import Head, RowResults, TileStatistics, num_blocks
from cotbal_kernels.triton_kernels.project import WRITE_PACKED
from cotbal_kernels.triton_kernels.row_scales import Scale
from cotbal_kernels.triton_kernels.tiles import Tile

from .gpu_measure import Put
from .timing import clock_for, require_device

PRODUCTS = ("project", "grad_hidden", "grad_weight")
QUIET_SECONDS = 15.0  # at the end, when nothing compiles any more: the best are measured again
SHARED_BYTES, REGISTERS = 227 * 1024, 128  # of one block; accumulators of one thread


class Shape(NamedTuple):
    N: int
    D: int
    V: int


FULL, WARM = Shape(8192, 4096, 20_480), Shape(256, 4096, 1024)


def candidates() -> Iterator[Tile]:
    """16-bit tiles that fit shared memory and registers; what the backend has now comes first, its neighbours next.

    The same with one stage more is the second of all: the shared memory of Hopper and later holds it, and a search
    that is cut short should know at least that.
    """
    now = Tile(128, 256, 64, 8, 3, 8, 2)
    grid = itertools.product((128, 256, 64), (256, 128), (64, 128, 32), (8, 4), (3, 4, 5), (8, 4, 16), (2, 1))
    tiles = [now, now._replace(stages=4), *(Tile(*values) for values in grid)]
    fitting = [tile for tile in dict.fromkeys(tiles) if fits(tile)]
    return iter(sorted(fitting, key=lambda tile: sum(a != b for a, b in zip(tile, now, strict=True))))


def fits(tile: Tile) -> bool:
    """Operands of all stages in shared memory, accumulators in half of the registers; small tiles in one part."""
    shared = tile.stages * (tile.rows + tile.cols) * tile.depth * 2
    accumulators = tile.rows * tile.cols // (32 * tile.warps)
    return shared <= SHARED_BYTES and 32 <= accumulators <= REGISTERS and (tile.parts == 1 or tile.cols == 256)


class Bench:
    """One product of the head, with any tile."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(size, device=device, generator=generator).to(dtype)

        self.shape, self.device = shape, device
        rows = torch.arange(shape.N, device=device)
        hidden, weight = normal(shape.N, shape.D), normal(shape.V, shape.D) / shape.D**0.5
        self.head = Head(LinearProblem(hidden, weight, None, rows % shape.V, rows, rows[-1:] + 1), TokenLoss(), 0)
        self.scale = Scale.of(torch.ones(shape.N, device=device), None, rows, rows[-1:] + 1, shape.N)
        self.results = RowResults.zeros(rows)
        self.logits = normal(shape.N, self.head.padded)
        self.grad_hidden = torch.zeros(shape.N, shape.D, device=device)
        self.grad_weight = torch.empty_like(weight)

    def run(self, product: str, tile: Tile) -> Callable[[], torch.Tensor]:
        """The launch as training makes it, returning what it wrote."""
        head, shape = self.head, self.shape
        head.tiles = head.tiles._replace(**{product: tile})
        head.block = head.tiles.project.cols // head.tiles.project.parts
        window, bounds = (0, shape.N), (0, shape.V)
        if product == "project":
            parts = TileStatistics.empty(num_blocks(shape.V, head.block), shape.N, False, self.device)
            # As at full size, where exponentials wait in 12 bits.
            out = torch.empty(shape.N, head.padded // 4 * 3, device=self.device, dtype=torch.int16)

            def launch() -> torch.Tensor:
                head.project(window, bounds, WRITE_PACKED.value, parts=parts, out=out)
                return parts.max_TN.amax(0)

        elif product == "grad_hidden":

            def launch() -> torch.Tensor:
                head.grad_hidden(window, bounds, self.logits, self.scale, self.grad_hidden.zero_())
                return self.grad_hidden

        else:

            def launch() -> torch.Tensor:
                head.grad_weight(bounds, self.logits, self.scale, self.grad_weight, False)
                return self.grad_weight

        return launch


_lost = False  # a tile has made the device unusable for this worker


def _compile(job: tuple[str, Tile, Shape, str]) -> str | None:
    """Fill the cache on disk, in a process of its own; return why a tile cannot be had."""
    global _lost
    if _lost:  # a process for this job alone: what a tile has done must not be said of the next ones
        with ProcessPoolExecutor(1, get_context("spawn")) as other:
            return other.submit(_compile, job).result()
    product, tile, shape, device = job
    try:
        Bench(shape, torch.device(device)).run(product, tile)()
        require_device()
    except Exception as error:
        try:
            require_device()
        except RuntimeError:
            _lost = True
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


def measure(
    bench: Bench, product: str, tile: Tile, expected: torch.Tensor | None
) -> tuple[dict[str, Any], torch.Tensor]:
    """Median time of a tile, and what it computes."""
    launch = bench.run(product, tile)
    found = launch().clone()
    clock = clock_for(bench.device)
    times = [clock.time(launch) for _ in range(7)][2:]
    shape = bench.shape
    row: dict[str, Any] = {
        "tile": list(tile),
        "milliseconds": 1e3 * statistics.median(times),
        "tflops": 2e-12 * shape.N * shape.D * shape.V / statistics.median(times),
    }
    # Another order of summation, and another rounding to 16 bits where the output has them.
    if expected is not None and not torch.allclose(found.float(), expected.float(), rtol=2e-2, atol=2e-2):
        row["wrong"] = float((found.float() - expected.float()).abs().max())
    return row, found


def tune(
    put: Put,
    left: Callable[[], float],
    device: torch.device,
    shape: Shape = FULL,
    warm: Shape = WARM,
    workers: int | None = None,
    tiles: list[Tile] | None = None,
) -> None:
    """Store a table per product, best first, after every batch of tiles; stop when the time is up.

    Compiling beside it disturbs what is measured, so the five best are measured once more at the end ("quiet").
    """
    bench = Bench(shape, device)
    tables: dict[str, list[dict[str, Any]]] = {product: [] for product in PRODUCTS}
    expected: dict[str, torch.Tensor] = {}
    tiles = tiles or list(candidates())
    workers = workers or max(1, min(12, (os.cpu_count() or 2) - 2))
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        step = max(1, workers // len(PRODUCTS))
        batches = [tiles[start : start + step] for start in range(0, len(tiles), step)]
        waiting = None
        for index in range(len(batches) + 1):
            # The next batch compiles while this one runs.
            following = None
            if index < len(batches) and left() > QUIET_SECONDS:
                jobs = [(product, tile, warm, device.type) for product in PRODUCTS for tile in batches[index]]
                following = (jobs, [pool.submit(_compile, job) for job in jobs])
            if waiting is not None:
                for (product, tile, _, _), compiled in zip(*waiting, strict=True):
                    if left() <= QUIET_SECONDS:
                        break
                    try:
                        problem = compiled.result(timeout=left() - QUIET_SECONDS + 1)
                        if problem is None:
                            row, found = measure(bench, product, tile, expected.get(product))
                            expected.setdefault(product, found)
                            tables[product].append(row)
                    except TimeoutError:  # still compiling, and the time is up
                        break
                    except Exception as error:
                        require_device()
                        problem = f"{type(error).__name__}: {str(error)[:200]}"
                    if problem is not None:
                        tables[product].append({"tile": list(tile), "problem": problem})
                for product, rows in tables.items():
                    put("tiles", product, sorted(rows, key=lambda row: -row.get("tflops", 0.0)))
            waiting = following
            if left() <= QUIET_SECONDS:
                break
        # A compilation that is under way would take the pool's end, and this process's, as long as it likes.
        workers_left = list(getattr(pool, "_processes", None) or {})
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers_left:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
    for product, rows in tables.items():
        rows.sort(key=lambda row: -row.get("tflops", 0.0))
        for row in rows[:5]:
            if "tflops" in row and left() > 0:
                row.update(measure(bench, product, Tile(*row["tile"]), expected[product])[0], quiet=True)
        put("tiles", product, sorted(rows, key=lambda row: (-row.get("quiet", 0), -row.get("tflops", 0.0))))
