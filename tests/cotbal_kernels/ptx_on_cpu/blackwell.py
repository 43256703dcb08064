"""What sm_100 adds: tensor memory, products that one thread begins and whose result stays there, pairs of float32.

Products happen when somebody waits at the barrier that hears of them. PTX ISA, "TensorCore 5th Generation Family".
"""

from collections import deque
from collections.abc import Callable

import numpy as np

from .arithmetic import widened
from .block import WARP, Action, Block, Mask, decodes
from .hopper import barriers, bulk, matrix_operand, require_same
from .text import Operation
from .warps import whole_warps

LANES, COLUMNS = 128, 512


def _memory(block: Block) -> np.ndarray:
    """[lanes, columns] of 32 bits: NaN until written."""
    if "tensor memory" not in block.asynchronous:
        block.asynchronous["tensor memory"] = np.full((LANES, COLUMNS), 0xFFFFFFFF, dtype=np.uint32)
    return block.asynchronous["tensor memory"]


def _require_allocated(block: Block, first: int, last: int) -> None:
    if first < COLUMNS - block.asynchronous.get("allocated", 0) or last >= COLUMNS:
        raise AssertionError("access outside of the tensor memory that was allocated")


def _finish_stores(block: Block) -> None:
    """Stores happen when they are waited for."""
    for lane, columns, values in block.asynchronous.pop("tensor stores", []):
        _memory(block)[lane, columns] = values


def _begun(block: Block) -> deque[Callable[[int], None]]:
    """Products that no barrier has been told of yet."""
    return block.asynchronous.setdefault("tensor products", deque())


@decodes("tcgen05")
def _tensor(block: Block, operation: Operation) -> Action:
    action = operation.modifiers[0]
    if action == "wait::st":
        return lambda mask: _finish_stores(block)
    if action in ("wait::ld", "relinquish_alloc_permit"):
        return lambda mask: None
    return {
        "alloc": _allocate,
        "dealloc": _free,
        "ld": _transfer,
        "st": _transfer,
        "mma": _multiply,
        "commit": _commit,
    }[action](block, operation)


def _allocate(block: Block, operation: Operation) -> Action:
    address, columns = block.address(operation.operands[0]), int(operation.operands[1], 0)

    def allocate(mask: Mask) -> None:
        if block.asynchronous.get("allocated"):
            raise NotImplementedError("a second allocation of tensor memory")
        assert 32 <= columns <= COLUMNS
        block.asynchronous["allocated"] = columns
        where = np.array([block.uniform(address(), mask)], dtype=np.uint64)
        # The last columns: as if another block had the first.
        block.shared.store(where, [np.array([COLUMNS - columns], dtype=np.uint32)], 4, block.who(mask)[:1])

    return allocate


def _free(block: Block, operation: Operation) -> Action:
    columns = int(operation.operands[1], 0)

    def free(mask: Mask) -> None:
        if block.asynchronous.pop("allocated", None) != columns:
            raise AssertionError("frees tensor memory that it does not have")

    return free


def _transfer(block: Block, operation: Operation) -> Action:
    """Between registers and tensor memory: a lane of a warp has a lane there, register i a column."""
    shape, count = operation.modifiers[3], int(operation.modifiers[4].removeprefix("x"))
    if operation.modifiers[1:3] != ("sync", "aligned") or operation.modifiers[5:] != ("b32",):
        raise NotImplementedError(operation.opcode)
    loads = operation.modifiers[0] == "ld"
    halves = shape == "16x32bx2"
    operands = list(operation.operands)
    half = int(operands.pop(2 if loads else 1), 0) if halves else 0
    registers, address = operands if loads else operands[::-1]
    rows = [block.write(name, "u32") for name in block.vector(registers)]
    where = block.address(address)
    if shape not in ("32x32b", "16x32bx2") or len(rows) != count:
        raise NotImplementedError(operation.opcode)

    def transfer(mask: Mask) -> None:
        warps = whole_warps(block, mask)
        every = where().astype(np.int64)
        for warp in np.flatnonzero(warps):
            threads = slice(WARP * warp, WARP * (warp + 1))
            (start,) = np.unique(every[threads])
            lane, column = np.arange(WARP) + (start >> 16), np.full(WARP, start & 0xFFFF)
            if halves:  # both halves of the warp have the same lanes, the second one further columns
                lane[16:] -= 16
                column[16:] += half
            if (lane // WARP != warp % 4).any():
                raise AssertionError("a warp may only access its own quarter of tensor memory")
            columns = column + np.arange(count)[:, None]
            _require_allocated(block, int(columns.min()), int(columns.max()))
            if loads:  # at once: Triton, too, uses the registers before it waits
                for row, loaded in zip(rows, _memory(block)[lane, columns], strict=True):
                    row[threads] = loaded
            else:
                values = np.stack([row[threads] for row in rows])
                block.asynchronous.setdefault("tensor stores", []).append((lane, columns, values))

    return transfer


def _multiply(block: Block, operation: Operation) -> Action:
    if operation.modifiers[:3] != ("mma", "cta_group::1", "kind::f16"):
        raise NotImplementedError(operation.opcode)
    where = block.address(operation.operands[0])
    a, b = (block.read(name, "u64") for name in operation.operands[1:3])
    kind, keeps = block.read(operation.operands[3], "u32"), block.read(operation.operands[4], "pred")

    def begin(mask: Mask) -> None:
        (thread,) = np.flatnonzero(block.everywhere(mask))
        start, left, right, how = int(where()[thread]), int(a[thread]), int(b[thread]), int(kind[thread])
        keep = bool(np.broadcast_to(keeps, block.threads)[thread])
        rows, columns = (how >> 24 & 31) << 4, (how >> 17 & 63) << 3
        formats = {0: "f16", 1: "bf16"}[how >> 7 & 7], {0: "f16", 1: "bf16"}[how >> 10 & 7]
        if how >> 4 & 3 != 1 or how & 15 or how >> 13 & 3 or rows not in (64, 128):
            raise NotImplementedError(f"instruction descriptor {how:#x}")
        # Of 64 rows a warp's quarter holds 16, in its first or second half.
        row = np.arange(rows)
        lanes = (start >> 16) + (row if rows == LANES else row // 16 * WARP + row % 16)
        first = start & 0xFFFF
        assert lanes.max() < LANES
        _require_allocated(block, first, first + columns - 1)

        def operands(who: int) -> tuple[np.ndarray, np.ndarray]:
            one = matrix_operand(block, left, rows, not how >> 15 & 1, who, blackwell=True)
            other = matrix_operand(block, right, columns, not how >> 16 & 1, who, blackwell=True)
            return widened(one, formats[0]), widened(other, formats[1])

        early = operands(int(thread))

        def multiply(phase: int) -> None:
            one, other = operands(phase)
            require_same(early, (one, other))
            memory, product = _memory(block)[:, first : first + columns].view(np.float32), one @ other.T
            memory[lanes] = product + memory[lanes] if keep else product

        _begun(block).append(multiply)

    return begin


def _commit(block: Block, operation: Operation) -> Action:
    known = ("cta_group::1", "mbarrier::arrive::one")
    if operation.modifiers[1:] not in ((*known, "shared::cluster", "b64"), (*known, "b64")):  # Triton 3.6: the second
        raise NotImplementedError(operation.opcode)
    address = block.address(operation.operands[0])

    def commit(mask: Mask) -> None:
        where = block.uniform(address(), mask)
        begun = list(_begun(block))
        _begun(block).clear()

        def finish(phase: int) -> int:
            for multiply in begun:
                multiply(phase)
            barriers(block)[where].missing -= 1
            return 0

        bulk(block).setdefault(where, deque()).append(finish)

    return commit
