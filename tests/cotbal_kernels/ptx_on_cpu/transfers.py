"""Loads, stores, atomic additions, and copies that arrive later."""

from collections import deque

import numpy as np

from .block import SIGNED, TYPES, Action, Block, Mask, decodes
from .memory import SharedMemory
from .text import Operation


@decodes("ld")
def _load(block: Block, operation: Operation) -> Action:
    to, source = operation.operands
    if "param" in operation.modifiers:
        return _load_parameter(block, operation)
    memory, address = block.space(operation.modifiers), block.address(source)
    kind = TYPES[operation.type]
    size = np.dtype(kind).itemsize
    kind = kind if operation.type in SIGNED else f"u{size}"  # bits, whatever they stand for
    names = block.vector(to)
    outs = [_extended(block, name, operation.type) for name in names]

    def load(mask: Mask) -> None:
        where = slice(None) if mask is True else mask
        values = memory().load(address()[where], size, len(outs), block.who(mask))
        for out, value in zip(outs, values, strict=True):
            if out is not None:
                out[where] = value.view(kind)

    return load


def _extended(block: Block, name: str, kind: str) -> np.ndarray | None:
    """The whole register: what is narrower is extended."""
    if name == "_":
        return None
    bits = 8 * block.registers[name].dtype.itemsize
    return block.write(name, ("s" if kind in SIGNED else "u") + str(bits))


def _load_parameter(block: Block, operation: Operation) -> Action:
    to, source = operation.operands
    name, _, offset = source.strip("[]").partition("+")
    start, dtype = block.entry.parameters[name] + int(offset or 0), np.dtype(TYPES[operation.type])
    dtype = np.dtype(f"u{dtype.itemsize}") if dtype.kind == "f" else dtype
    out = _extended(block, to, operation.type)

    def load(mask: Mask) -> None:
        (value,) = np.frombuffer(block.launch.parameters, dtype, 1, start)
        np.copyto(out, value.astype(out.dtype), where=mask)

    return load


@decodes("st")
def _store(block: Block, operation: Operation) -> Action:
    target, source = operation.operands
    memory, address = block.space(operation.modifiers), block.address(target)
    size = np.dtype(TYPES[operation.type]).itemsize
    values = [block.read(name, f"u{8 * size}") for name in block.vector(source)]

    def store(mask: Mask) -> None:
        where = block.everywhere(mask)
        chosen = [np.broadcast_to(value, where.shape)[where] for value in values]
        memory().store(address()[where], chosen, size, block.who(mask))

    return store


@decodes("red", "atom")
def _atomic(block: Block, operation: Operation) -> Action:
    *how, action, kind = operation.modifiers
    if action not in ("add", "min", "max") or set(how) - {"global", "gpu", "relaxed", "acq_rel"}:
        raise NotImplementedError(operation.opcode)
    target, source = operation.operands[-2:]
    out = block.write(operation.operands[0], kind) if operation.name == "atom" else None
    dtype = np.dtype(TYPES[kind])
    memory, address, value = block.space(operation.modifiers), block.address(target), block.read(source, kind)
    combine = {"add": np.add, "min": np.minimum, "max": np.maximum}[action]
    order = "atomic acq_rel" if "acq_rel" in how else "atomic"

    def atomic(mask: Mask) -> None:
        where = block.everywhere(mask)
        values = np.broadcast_to(value, where.shape)[where]

        def change(before: np.ndarray, index: int) -> np.ndarray:
            return combine(before.view(dtype), values[index]).view(before.dtype)

        before = memory().exchange(address()[where], change, dtype.itemsize, order, block.who(mask))
        if out is not None:
            out[where] = before.view(dtype)

    return atomic


class Copies:
    """Copies from global to shared memory that are under way, in groups.

    They read and write as late as they may, and until then their target is poisoned: what does not wait for them is
    found out.
    """

    def __init__(self) -> None:
        self.open: list[tuple[np.ndarray, np.ndarray, np.ndarray, int, np.ndarray]] = []
        self.groups: deque[list[tuple[np.ndarray, np.ndarray, np.ndarray, int, np.ndarray]]] = deque()

    def __bool__(self) -> bool:
        return bool(self.open) or any(self.groups)

    @classmethod
    def of(cls, block: Block) -> "Copies":
        return block.asynchronous.setdefault("copies", cls())

    def finish(self, block: Block, left: int) -> None:
        while len(self.groups) > left:
            for target, source, live, size, who in self.groups.popleft():
                data = np.zeros((size // 4, target.size), dtype=np.uint32)
                if live.any():
                    data[:, live] = block.launch.memory.load(source[live], 4, size // 4, who[live])
                block.shared.store(target, list(data), 4, who)


def poison(shared: SharedMemory, addresses: np.ndarray, size: int, who: np.ndarray) -> None:
    shared.store(addresses, [np.full(addresses.shape, 2**32 - 1, dtype=np.uint32)] * (size // 4), 4, who)


@decodes("cp")
def _copy(block: Block, operation: Operation) -> Action:
    from . import hopper

    if "bulk" in operation.modifiers:
        return hopper.copy_tensor(block, operation)
    if operation.modifiers == ("async", "commit_group"):

        def commit(mask: Mask) -> None:
            copies = Copies.of(block)
            assert mask is True
            copies.groups.append(copies.open)
            copies.open = []

        return commit
    if operation.modifiers == ("async", "wait_group"):
        left = int(operation.operands[0])
        return lambda mask: Copies.of(block).finish(block, left)
    if operation.modifiers[:2] not in (("async", "cg"), ("async", "ca")) or operation.modifiers[-2:] != (
        "shared",
        "global",
    ):
        raise NotImplementedError(operation.opcode)
    target, source, size_text, *given = operation.operands
    to, start, size = block.address(target), block.address(source), int(size_text, 0)
    length = block.read(given[0], "u32") if given else np.array(size)

    def copy(mask: Mask) -> None:
        where = block.everywhere(mask)
        live = np.broadcast_to(length, where.shape)[where]
        if not np.isin(live, (0, size)).all():
            raise NotImplementedError("a copy of a part")
        who = block.who(mask)
        poison(block.shared, to()[where], size, who)
        Copies.of(block).open.append((to()[where].copy(), start()[where].copy(), live == size, size, who))

    return copy
