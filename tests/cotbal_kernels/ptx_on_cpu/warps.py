"""What the lanes of a warp do together: shuffles, reductions, matrices in fragments and their products on sm_80."""

from collections.abc import Callable

import numpy as np

from .arithmetic import widened
from .block import WARP, Action, Block, Mask, decodes
from .races import lanes_of
from .text import Operation


def require_all_lanes(block: Block, members: str) -> Callable[[Mask], None]:
    """The mask of lanes that an operation names must be all of them."""
    mask_of = block.read(members, "u32")

    def check(mask: Mask) -> None:
        whole_warps(block, mask)
        if block.uniform(mask_of, mask) != 2**32 - 1:
            raise NotImplementedError("an operation of some lanes")

    return check


def whole_warps(block: Block, mask: Mask) -> np.ndarray:
    """[warps] which take part; a warp of which only a part does is an error."""
    lanes = block.everywhere(mask).reshape(block.warps, WARP)
    if (lanes.any(1) != lanes.all(1)).any():
        raise AssertionError("needs all lanes of a warp")
    return lanes.all(1)


@decodes("shfl")
def _shuffle(block: Block, operation: Operation) -> Action:
    mode = operation.modifiers[1]
    to, source, offset, clamp, members = operation.operands
    check = require_all_lanes(block, members)
    to, _, flag = to.partition("|")
    value, out = block.read(source, "u32"), block.write(to, "u32")
    valid_out = block.write(flag, "pred") if flag else None
    shift, bound = block.read(offset, "u32"), block.read(clamp, "u32")

    def shuffle(mask: Mask) -> None:
        check(mask)
        lane, by = block.lanes, shift.astype(np.int64)
        segment, limit = bound.astype(np.int64) >> 8, bound.astype(np.int64) & 31
        last = (lane & segment) | (limit & ~segment & 31)
        if mode == "up":
            chosen = lane - by
            valid = chosen >= last
        else:
            chosen = {"down": lane + by, "bfly": lane ^ by, "idx": (lane & segment) | (by & ~segment & 31)}[mode]
            valid = chosen <= last
        chosen = np.where(valid, chosen, lane)
        warp = np.arange(block.threads) - lane
        np.copyto(out, value[warp + chosen].copy(), where=mask)
        if valid_out is not None:
            np.copyto(valid_out, valid, where=mask)

    return shuffle


@decodes("redux")
def _reduce(block: Block, operation: Operation) -> Action:
    combine = {"min": np.minimum, "max": np.maximum, "add": np.add, "and": np.bitwise_and, "or": np.bitwise_or}
    ufunc, kind = combine[operation.modifiers[1]], operation.type
    if kind == "f32":  # a number, where one of two is NaN
        ufunc = {"min": np.fmin, "max": np.fmax}[operation.modifiers[1]]
    if len(operation.modifiers) != 3:
        raise NotImplementedError(operation.opcode)
    value, out = block.read(operation.operands[1], kind), block.write(operation.operands[0], kind)

    check = require_all_lanes(block, operation.operands[2])

    def reduce(mask: Mask) -> None:
        check(mask)
        lanes = np.broadcast_to(value, block.threads).reshape(block.warps, WARP)
        np.copyto(out, np.repeat(ufunc.reduce(lanes, axis=1, dtype=out.dtype), WARP), where=mask)

    return reduce


@decodes("vote")
def _ballot(block: Block, operation: Operation) -> Action:
    if operation.opcode != "vote.sync.ballot.b32":
        raise NotImplementedError(operation.opcode)
    to, voted, members = operation.operands
    check = require_all_lanes(block, members)
    vote, out = block.read(voted, "pred"), block.write(to, "u32")

    def ballot(mask: Mask) -> None:
        check(mask)
        lanes = np.broadcast_to(vote, block.threads).reshape(block.warps, WARP)
        bits = (lanes.astype(np.uint32) << np.arange(WARP, dtype=np.uint32)).sum(1, dtype=np.uint32)
        np.copyto(out, np.repeat(bits, WARP), where=mask)

    return ballot


@decodes("elect")
def _elect(block: Block, operation: Operation) -> Action:
    to, _, flag = operation.operands[0].partition("|")
    check = require_all_lanes(block, operation.operands[1])
    out, leads = block.write(to, "u32"), block.write(flag, "pred")

    def elect(mask: Mask) -> None:
        check(mask)
        np.copyto(leads, block.lanes == 0, where=mask)
        if out is not None:
            np.copyto(out, 0, where=mask)

    return elect


def _matrix_rows(block: Block, operation: Operation) -> tuple[int, bool]:
    count = next(int(m[1:]) for m in operation.modifiers if m in ("x1", "x2", "x4"))
    if "b16" not in operation.modifiers or "m8n8" not in operation.modifiers:
        raise NotImplementedError(operation.opcode)
    return count, "trans" in operation.modifiers


@decodes("ldmatrix")
def _load_matrix(block: Block, operation: Operation) -> Action:
    count, transposed = _matrix_rows(block, operation)
    outs = [block.write(name, "u32") for name in block.vector(operation.operands[0])]
    address = block.address(operation.operands[1])

    def load(mask: Mask) -> None:
        warps = whole_warps(block, mask)
        rows = address().reshape(block.warps, WARP)[warps, : 8 * count]
        who = np.repeat(lanes_of(np.flatnonzero(warps)), rows.shape[1])
        words = block.shared.load(rows.ravel(), 4, 4, who)  # 8 elements of 16 bits a row
        matrices = np.ascontiguousarray(words.T).view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.transpose(0, 1, 3, 2)
        fragments = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, count, WARP)
        for index, out in enumerate(outs):
            out.reshape(block.warps, WARP)[warps] = fragments[:, index]

    return load


@decodes("stmatrix")
def _store_matrix(block: Block, operation: Operation) -> Action:
    count, transposed = _matrix_rows(block, operation)
    address = block.address(operation.operands[0])
    values = [block.read(name, "u32") for name in block.vector(operation.operands[1])]

    def store(mask: Mask) -> None:
        warps = whole_warps(block, mask)
        fragments = np.stack([value.reshape(block.warps, WARP)[warps] for value in values], 1)
        matrices = np.ascontiguousarray(fragments).view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.transpose(0, 1, 3, 2)
        words = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, 4)
        rows = address().reshape(block.warps, WARP)[warps, : 8 * count]
        who = np.repeat(lanes_of(np.flatnonzero(warps)), rows.shape[1])
        block.shared.store(rows.ravel(), list(words.T), 4, who)

    return store


def fragment_a(block: Block, registers: list[np.ndarray], kind: str) -> np.ndarray:
    """[warps, 16, 16] from the four registers of every lane; rows first."""
    # k half, row half, warp, row, k, k
    packed = np.stack(registers).view(np.uint16).reshape(2, 2, block.warps, 8, 4, 2)
    return widened(packed.transpose(2, 1, 3, 0, 4, 5).reshape(block.warps, 16, 16), kind)


@decodes("mma")
def _multiply(block: Block, operation: Operation) -> Action:
    if operation.modifiers[:5] != ("sync", "aligned", "m16n8k16", "row", "col") or operation.modifiers[6] not in (
        "bf16",
        "f16",
    ):
        raise NotImplementedError(operation.opcode)
    kind = operation.modifiers[6]
    to, a_text, b_text, c_text = operation.operands
    outs = [block.write(name, "f32") for name in block.vector(to)]
    a, b = ([block.read(name, "u32") for name in block.vector(text)] for text in (a_text, b_text))
    c = [block.read(name, "f32") for name in block.vector(c_text)]

    def multiply(mask: Mask) -> None:
        whole_warps(block, mask)
        left = fragment_a(block, a, kind)
        packed = np.stack(b).view(np.uint16).reshape(2, block.warps, 8, 4, 2)  # k half, warp, column, k, k
        right = widened(packed.transpose(1, 0, 3, 4, 2).reshape(block.warps, 16, 8), kind)
        product = np.matmul(left, right).reshape(block.warps, 2, 8, 4, 2)  # warp, row half, row, column, column
        parts = (product[:, index // 2, :, :, index % 2].reshape(block.threads) for index in range(4))
        sums = [part + before for part, before in zip(parts, c, strict=True)]
        for out, total in zip(outs, sums, strict=True):
            np.copyto(out, total, where=mask)

    return multiply
