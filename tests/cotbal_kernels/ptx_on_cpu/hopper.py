"""What sm_90 adds: barriers in shared memory, tensor copies by descriptor, products of a warpgroup.

Copies and products happen as late as they may: a copy when somebody waits at its barrier, a product when it is waited
for. A result that is used before reads what was there.
"""

import functools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .arithmetic import widened
from .block import WARP, Action, Block, Mask, decodes
from .races import EVERYBODY
from .text import Operation
from .transfers import poison
from .warps import fragment_a, whole_warps

GROUP = 4 * WARP


@dataclass(frozen=True)
class TensorMap:
    """A matrix in global memory, copied box by box to shared memory with its 16-byte pieces permuted."""

    address: int
    shape: tuple[int, int]
    row_bytes: int  # from one row to the next
    element: int  # bytes
    box: tuple[int, int]  # rows, columns
    span: int  # bytes of the swizzle: 32, 64, 128, or 16 for none


def swizzled(addresses: np.ndarray, span: int) -> np.ndarray:
    """Where the bytes go: of the address bits 4 to 6, those within ``span`` change with the bits 7 to 9."""
    bits = np.uint64(span // 16 - 1)
    return addresses ^ (((addresses >> np.uint64(7)) & bits) << np.uint64(4))


@dataclass
class Barrier:
    """One barrier object: arrivals and bytes that its phase still waits for."""

    count: int
    missing: int
    bytes: int = 0
    parity: int = 0  # of the phase under way

    def settle(self) -> None:
        if self.missing == 0 and self.bytes == 0:
            self.parity ^= 1
            self.missing = self.count


def barriers(block: Block) -> dict[int, Barrier]:
    return block.asynchronous.setdefault("barriers", {})


def bulk(block: Block) -> dict[int, deque[Callable[[int], int]]]:
    """What is under way by the barrier that hears of it: called with who it is done by (see races)."""
    return block.asynchronous.setdefault("bulk", {})


def _touch(block: Block, where: int, mask: Mask, begins_or_ends: bool = False) -> None:
    """Its users may meet at a barrier, but not who makes it or ends it."""
    note, who = block.races.store if begins_or_ends else block.races.atomic, block.who(mask)
    note(block.shared.seen, np.tile(np.arange(where, where + 8), who.size), who)


@decodes("mbarrier")
def _barrier(block: Block, operation: Operation) -> Action:
    action = operation.modifiers[0]
    at = next(text for text in operation.operands if text.startswith("["))
    address = block.address(at)
    if action == "init":
        count = int(operation.operands[1], 0)

        def init(mask: Mask) -> None:
            where = block.uniform(address(), mask)
            _touch(block, where, mask, begins_or_ends=True)
            if where in barriers(block):
                raise AssertionError("a barrier begins where another one is")
            barriers(block)[where] = Barrier(count, count)

        return init
    if action == "inval":

        def invalidate(mask: Mask) -> None:
            where = block.uniform(address(), mask)
            _touch(block, where, mask, begins_or_ends=True)
            if bulk(block).get(where):
                raise AssertionError("a barrier ends before the copies that it waits for")
            del barriers(block)[where]

        return invalidate
    if action == "arrive":
        if len(operation.operands) != 2 + ("expect_tx" in operation.modifiers):
            raise NotImplementedError(operation.opcode)
        added = block.read(operation.operands[-1], "u32") if "expect_tx" in operation.modifiers else np.array(0)

        def arrive(mask: Mask) -> None:
            where = block.uniform(address(), mask)
            _touch(block, where, mask)
            barrier = barriers(block)[where]
            barrier.bytes += int(np.broadcast_to(added, block.threads)[block.everywhere(mask)].sum())
            barrier.missing -= int(block.everywhere(mask).sum())
            if barrier.missing < 0:
                raise AssertionError("more threads arrive at a barrier than it was told of")
            barrier.settle()

        return arrive
    if action == "try_wait" and "parity" in operation.modifiers:
        done, parity = block.write(operation.operands[0], "pred"), block.read(operation.operands[2], "u32")

        def wait(mask: Mask) -> None:
            where = block.uniform(address(), mask)
            _touch(block, where, mask)
            barrier, wanted = barriers(block)[where], block.uniform(parity, mask)
            copies = bulk(block).get(where, deque())
            if barrier.parity == wanted:
                phase = block.races.end_phase(where)
                while barrier.parity == wanted and copies:
                    barrier.bytes -= copies.popleft()(phase)
                    barrier.settle()
                if barrier.parity == wanted:
                    raise AssertionError("waits at a barrier for ever")
            block.races.wait(where, block.who(mask))
            np.copyto(done, True, where=mask)

        return wait
    raise NotImplementedError(operation.opcode)


def copy_tensor(block: Block, operation: Operation) -> Action:
    """``cp.async.bulk.tensor`` of two dimensions from global to shared memory."""
    # The blocks here are clusters of one: shared memory of the cluster is that of the block.
    if operation.modifiers[:4] != ("async", "bulk", "tensor", "2d") or operation.modifiers[4:6] not in (
        ("shared::cta", "global"),
        ("shared::cluster", "global"),
    ):
        raise NotImplementedError(operation.opcode)
    target, source, barrier = operation.operands
    to, hears = block.address(target), block.address(barrier)
    map_text, _, coordinates = source[1:-1].partition(",")
    which = block.read(map_text, "u64")
    column, row = (block.read(text, "s32") for text in block.vector(coordinates))

    def copy(mask: Mask) -> None:
        for thread in np.flatnonzero(block.everywhere(mask)):
            tensor = block.launch.descriptors[int(which[thread])]
            start = int(to()[thread])
            if start % 128:
                raise AssertionError("a tensor copy to an address that is no multiple of 128")
            every = np.uint64(start) + np.arange(0, _box_bytes(tensor), 16, dtype=np.uint64)
            poison(block.shared, every, 16, np.full(every.shape, thread))
            first = (int(row[thread]), int(column[thread]))
            arrives = bulk(block).setdefault(int(hears()[thread]), deque())
            arrives.append(functools.partial(_arrive, block, start, tensor, first))

    return copy


def _box_bytes(tensor: TensorMap) -> int:
    return tensor.box[0] * tensor.box[1] * tensor.element


def _arrive(block: Block, start: int, tensor: TensorMap, first: tuple[int, int], phase: int) -> int:
    """Copy one box, zeros where it reaches over the edge; bytes written."""
    rows, columns = (np.arange(size) + begin for size, begin in zip(tensor.box, first, strict=True))
    inside = ((rows >= 0) & (rows < tensor.shape[0]))[:, None] & ((columns >= 0) & (columns < tensor.shape[1]))
    source = np.uint64(tensor.address) + (rows[:, None] * tensor.row_bytes + columns * tensor.element).astype(np.uint64)
    data = np.zeros(tensor.box, dtype=f"u{tensor.element}")
    data[inside] = block.launch.memory.load(source[inside], tensor.element)[0]
    target = swizzled(start + np.arange(data.size, dtype=np.uint64) * np.uint64(tensor.element), tensor.span)
    block.shared.store(target, [data.ravel()], tensor.element, np.array([phase]))
    return _box_bytes(tensor)


class Products:
    """Products of warpgroups that have begun, in groups."""

    def __init__(self) -> None:
        self.open: list[Callable[[], None]] = []
        self.groups: deque[list[Callable[[], None]]] = deque()

    def __bool__(self) -> bool:
        return bool(self.open) or any(self.groups)

    @classmethod
    def of(cls, block: Block) -> "Products":
        return block.asynchronous.setdefault("products", cls())


_SPANS = {0: 16, 1: 128, 2: 64, 3: 32}  # of a descriptor's swizzle mode
_BLACKWELL_SPANS = {0: 16, 2: 128, 4: 64, 6: 32}


def matrix_operand(
    block: Block, descriptor: int, rows: int, by_rows: bool, who: int, blackwell: bool = False
) -> np.ndarray:
    """[rows, 16] 16-bit patterns that a matrix descriptor points at; ``by_rows`` where k runs along the memory.

    PTX ISA, "Matrix-Descriptor Format" and "Strides": pieces of 8 rows and one swizzle span of bytes.
    """
    start = (descriptor & 0x3FFF) << 4
    leading, stride = ((descriptor >> 16) & 0x3FFF) << 4, ((descriptor >> 32) & 0x3FFF) << 4
    span = _BLACKWELL_SPANS[descriptor >> 61] if blackwell else _SPANS[descriptor >> 62]
    if (descriptor >> 49) & 7:
        raise NotImplementedError("a matrix descriptor with a base offset")
    if span == 16 and not by_rows:
        raise NotImplementedError("a matrix descriptor without a swizzle whose rows run along the memory")
    row, k = np.arange(rows)[:, None], np.arange(16)[None, :]
    if by_rows:
        if span == 16:
            offset = (row % 8) * 16 + (row // 8) * stride + (k % 8) * 2 + (k // 8) * leading
        else:
            offset = (row % 8) * span + (row // 8) * stride + k * 2
    else:
        width = span // 2
        offset = (row % width) * 2 + (row // width) * leading + (k % 8) * span + (k // 8) * stride
    addresses = swizzled(np.uint64(start) + offset.astype(np.uint64), span)
    return block.shared.load(addresses.ravel(), 2, who=np.array([who]))[0].reshape(rows, 16)


def require_same(early: tuple[np.ndarray, ...], late: tuple[np.ndarray, ...]) -> None:
    """Products read their operands at any time: they must be there when it begins and stay until it is waited for."""
    if any(a.tobytes() != b.tobytes() for a, b in zip(early, late, strict=True)):
        raise AssertionError("an operand of a product changes while it is under way")


@decodes("wgmma")
def _warpgroup(block: Block, operation: Operation) -> Action:
    action = operation.modifiers[0]
    if action == "fence":
        return lambda mask: None
    if action == "commit_group":

        def commit(mask: Mask) -> None:
            products = Products.of(block)
            products.groups.append(products.open)
            products.open = []

        return commit
    if action == "wait_group":
        left = int(operation.operands[0])

        def wait(mask: Mask) -> None:
            groups = Products.of(block).groups
            while len(groups) > left:
                for product in groups.popleft():
                    product()

        return wait
    if operation.modifiers[:3] != ("mma_async", "sync", "aligned") or operation.modifiers[4] != "f32":
        raise NotImplementedError(operation.opcode)
    columns, kind = int(operation.modifiers[3].removeprefix("m64n").removesuffix("k16")), operation.modifiers[5]
    to, a_text, b_text, keeps_text, *rest = operation.operands
    registers = a_text.startswith("{")
    if rest[:2] != ["1", "1"] or kind not in ("bf16", "f16"):
        raise NotImplementedError(operation.opcode)
    a_by_rows, b_by_rows = (True, rest[2] == "0") if registers else (rest[2] == "0", rest[3] == "0")
    outs = [block.write(name, "f32") for name in block.vector(to)]
    a = [block.read(name, "u32") for name in block.vector(a_text)] if registers else block.read(a_text, "u64")
    b, keeps = block.read(b_text, "u64"), block.read(keeps_text, "pred")
    group_count = block.threads // GROUP

    def begin(mask: Mask) -> None:
        assert whole_warps(block, mask).all()
        parts = [slice(GROUP * group, GROUP * (group + 1)) for group in range(group_count)]
        left = None if registers else [int(np.unique(a[part]).item()) for part in parts]
        right = [int(np.unique(b[part]).item()) for part in parts]
        keep = bool(block.uniform(keeps))

        def operands() -> list[tuple[np.ndarray, np.ndarray]]:
            if registers:
                wholes = fragment_a(block, a, kind).reshape(group_count, 64, 16)
            return [
                (
                    wholes[group]
                    if registers
                    else widened(matrix_operand(block, left[group], 64, a_by_rows, EVERYBODY), kind),
                    widened(matrix_operand(block, right[group], columns, b_by_rows, EVERYBODY), kind),
                )
                for group in range(group_count)
            ]

        early = operands()

        def multiply() -> None:
            for (one, other), before, part in zip(operands(), early, parts, strict=True):
                require_same(before, (one, other))
                # warp, row half, row, piece of eight columns, column, column
                product = (one @ other.T).reshape(4, 2, 8, columns // 8, 4, 2)
                for index, out in enumerate(outs):
                    piece, half, odd = index // 4, index // 2 % 2, index % 2
                    value = product[:, half, :, piece, :, odd].reshape(GROUP)
                    out[part] = out[part] + value if keep else value

        Products.of(block).open.append(multiply)

    return begin
