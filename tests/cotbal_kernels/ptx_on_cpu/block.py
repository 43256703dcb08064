"""One block (CTA) of threads: registers, program counters and the operations they step through.

All threads that stand at the same operation take it together, as numpy arrays with one element a thread. Where they
part, those furthest back go first, so they meet again where the branches do. That another order would give the same is
for ``races`` to say. An operation is decoded once for all blocks into a function of the threads that take it.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from .memory import GlobalMemory, Memory, SharedMemory
from .races import Races, Seen
from .text import Entry, Operation

WARP = 32
Mask = np.ndarray | bool  # which threads take an operation; True for all of them
Action = Callable[[Mask], None]
POISONS = (0xFF, 0x7E)  # bytes of what nobody has written: NaN; large numbers
_STEP, _BRANCH, _END, _BARRIER = range(4)

FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
SIGNED = {"s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64}
UNSIGNED = {f"{kind}{bits}": np.dtype(f"u{bits // 8}").type for kind in "bu" for bits in (8, 16, 32, 64)}
TYPES: dict[str, type] = FLOATS | SIGNED | UNSIGNED | {"pred": np.bool_}

_DECODERS: dict[str, Callable[["Block", Operation], Action]] = {}


def decodes(*names: str) -> Callable[[Any], Any]:
    """Register what decodes the operations whose opcode begins with one of ``names``."""

    def register(decoder: Any) -> Any:
        _DECODERS.update(dict.fromkeys(names, decoder))
        return decoder

    return register


@dataclass(frozen=True)
class Launch:
    """What the blocks of one launch are given."""

    memory: GlobalMemory
    parameters: bytes
    descriptors: Mapping[int, Any]  # of tensors, by offset in the parameters
    grid: tuple[int, int, int]


class Block:
    """A block of threads of one kernel; the same object runs as one after the other, of one launch after the other."""

    launch: Launch
    races: Races

    def __init__(self, entry: Entry, shared_bytes: int) -> None:
        self.entry = entry
        self.threads = entry.threads
        self.warps = self.threads // WARP
        self.lanes = np.arange(self.threads) % WARP
        self._everywhere = np.ones(self.threads, dtype=bool)
        self._all = np.arange(self.threads)
        self.shared = SharedMemory(entry.shared_bytes + shared_bytes)
        kinds = {kind: [n for n, k in entry.registers.items() if k is kind] for kind in set(entry.registers.values())}
        self._files = {kind: np.empty((len(names), self.threads), dtype=kind) for kind, names in kinds.items()}
        self.registers = {
            name: row for kind, names in kinds.items() for name, row in zip(names, self._files[kind], strict=True)
        }
        self.special = {
            name: np.zeros(self.threads, dtype=np.uint32)
            for name in ("%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z")
        }
        zero = np.zeros(self.threads, dtype=np.uint32)
        self.special |= {"%tid.x": np.arange(self.threads, dtype=np.uint32), "%tid.y": zero, "%tid.z": zero}
        self.special |= {"%ntid.x": zero + np.uint32(self.threads), "%laneid": self.lanes.astype(np.uint32)}
        self._poison = POISONS[-1]
        self.issued = 0  # operations times the warps that took them, of all runs
        self.asynchronous: dict[str, Any] = {}  # what copies and products are under way, by kind
        self.actions = [self._decode(operation) for operation in entry.operations]
        branches = {"bra": _BRANCH, "ret": _END, "exit": _END, "bar": _BARRIER, "barrier": _BARRIER}
        self.kinds = [branches.get(operation.name, _STEP) for operation in entry.operations]

    # --- operands -----------------------------------------------------------------------------------------------

    def read(self, text: str, kind: str) -> np.ndarray:
        """[threads] (or a scalar) as ``kind``; a register shows what is in it when the operation runs."""
        dtype = TYPES[kind]
        if text in self.registers or text in self.special:
            row = self.registers[text] if text in self.registers else self.special[text]
            if row.dtype.itemsize == np.dtype(dtype).itemsize:
                return row.view(dtype)
            if row.dtype.itemsize > np.dtype(dtype).itemsize:  # the low bits
                return row.view(dtype)[:: row.dtype.itemsize // np.dtype(dtype).itemsize]
            raise NotImplementedError(f"{text} read as {kind}")
        return self._constant(text, dtype)

    def _constant(self, text: str, dtype: type) -> np.ndarray:
        if text in self.entry.shared:
            return np.array(self.entry.shared[text], dtype=dtype)
        if text in self.entry.parameters:
            return np.array(self.entry.parameters[text], dtype=dtype)
        if text[:2] in ("0f", "0F"):
            bits = np.array(int(text[2:], 16), dtype=np.uint32)
        elif text[:2] in ("0d", "0D"):
            bits = np.array(int(text[2:], 16), dtype=np.uint64)
        else:
            value = int(text.rstrip("U"), 0)
            if dtype is np.bool_:
                return np.array(value != 0)
            size = np.dtype(dtype).itemsize
            return np.array(value % 2 ** (8 * size), dtype=f"u{size}").view(dtype)
        return bits.view(dtype)

    def write(self, text: str, kind: str) -> np.ndarray | None:
        """The register as ``kind``, to store to; None for ``_``."""
        return None if text == "_" else self.registers[text].view(TYPES[kind])

    def vector(self, text: str) -> list[str]:
        return text[1:-1].split(",") if text.startswith("{") else [text]

    def address(self, text: str) -> Callable[[], np.ndarray]:
        """[threads] uint64 from ``[register + offset]``."""
        base, _, offset = text.strip("[]").partition("+")
        value = self.read(base, "u64" if self._is_wide(base) else "u32")
        shift = int(offset or 0)

        def addresses() -> np.ndarray:
            wide = value.astype(np.uint64) if value.ndim else np.full(self.threads, value, dtype=np.uint64)
            return wide + np.uint64(shift % 2**64) if shift else wide

        return addresses

    def space(self, modifiers: tuple[str, ...]) -> Callable[[], Memory]:
        """The memory that an operation with these modifiers reads or writes."""
        if "global" in modifiers:
            return lambda: self.launch.memory
        if {"shared", "shared::cta"} & set(modifiers):
            return lambda: self.shared
        raise NotImplementedError("memory of an unknown kind")

    def _is_wide(self, name: str) -> bool:
        return name in self.registers and self.registers[name].dtype.itemsize == 8

    def everywhere(self, mask: Mask) -> np.ndarray:
        """``mask`` with one element a thread."""
        return self._everywhere if mask is True else mask

    def who(self, mask: Mask) -> np.ndarray:
        """The numbers of the threads of ``mask``."""
        return self._all if mask is True else np.flatnonzero(mask)

    def uniform(self, value: np.ndarray, mask: Mask = True) -> int:
        """The one value that all threads of ``mask`` have."""
        found = np.unique(np.broadcast_to(value, self.threads)[self.everywhere(mask)])
        if found.size != 1:
            raise AssertionError(f"{found.size} values where all threads must have the same one")
        return int(found[0])

    def barriers(self) -> list[int]:
        """The numbers of the operations at which all threads wait."""
        return [at for at, kind in enumerate(self.kinds) if kind == _BARRIER]

    @contextmanager
    def without_barrier(self, at: int) -> Iterator[None]:
        """Nobody waits at one of them."""
        self.kinds[at] = _STEP
        try:
            yield
        finally:
            self.kinds[at] = _BARRIER

    # --- steps --------------------------------------------------------------------------------------------------

    def _decode(self, operation: Operation) -> Action:
        if operation.name in ("bar", "barrier") and operation.operands != ("0",):
            raise NotImplementedError(f"{self.entry.name}: a barrier of some of the threads: {operation}")
        if operation.name in ("ret", "exit", "bar", "barrier") and operation.guard is not None:
            raise NotImplementedError(f"{self.entry.name}: a condition of {operation}")
        if operation.name in ("bra", "ret", "exit", "bar", "barrier"):
            return lambda _: None  # control flow: see _walk
        decoder = _DECODERS.get(operation.name)
        if decoder is None:
            raise NotImplementedError(f"{self.entry.name}: nothing decodes {operation}")
        try:
            action = decoder(self, operation)
        except (KeyError, NotImplementedError, ValueError) as error:
            raise NotImplementedError(f"{self.entry.name}: {operation}: {error!r}") from error
        if operation.guard is None:
            return action
        guard, negated = self.registers[operation.guard], operation.negated

        def guarded(mask: Mask) -> None:
            taken = self._taken(guard, negated, mask)
            count = np.count_nonzero(taken)
            if count:
                action(True if count == self.threads else taken)

        return guarded

    @staticmethod
    def _taken(guard: np.ndarray, negated: bool, mask: Mask) -> np.ndarray:
        taken = ~guard if negated else guard.copy()
        return taken if mask is True else taken & mask

    def run_all(self, launch: Launch) -> None:
        """Run the blocks of a launch one after the other."""
        x, y, z = launch.grid
        self.races = self.shared.races = launch.memory.races = Races(self.threads, self.entry.operations)
        self.shared.seen = Seen(self.shared.bytes.size)
        with np.errstate(all="ignore"):  # what a GPU would not mention either
            for program, index in enumerate(np.ndindex(z, y, x)):
                launch.memory.accesses.enter(program)
                self.run(launch, index[::-1])

    def run(self, launch: Launch, program: tuple[int, int, int]) -> None:
        """Run the block with the index ``program`` from its first operation to its last."""
        self.launch = launch
        for axis, index, size in zip("xyz", program, launch.grid, strict=True):
            self.special[f"%ctaid.{axis}"][:] = index
            self.special[f"%nctaid.{axis}"][:] = size
        # What nobody has written is NaN in every format, which a maximum ignores; next time it is large.
        self._poison = POISONS[self._poison == POISONS[0]]
        for registers in self._files.values():
            registers.view(np.uint8)[:] = self._poison % 2 if registers.dtype == np.bool_ else self._poison
        self.shared.bytes[:] = self._poison
        self.asynchronous.clear()
        self.races.begin()
        alive = self.alive = self._everywhere.copy()
        groups = {0: self._everywhere.copy()}  # threads that can go on, by where they stand
        waiting: dict[int, np.ndarray] = {}  # those at the barrier, by what follows it
        while groups:
            at, *others = sorted(groups)
            mask = groups.pop(at)
            stop = others[0] if others else -1
            for place, threads, arrived in self._walk(at, mask, stop):
                if place < 0:
                    alive &= ~threads
                else:
                    to = waiting if arrived else groups
                    to[place] = to.get(place, False) | threads
            if waiting and sum(np.count_nonzero(threads) for threads in waiting.values()) == np.count_nonzero(alive):
                groups, waiting = waiting, {}
                self.races.barrier()
        left = [
            self.asynchronous.get(kind)
            for kind in ("copies", "products", "tensor products", "tensor stores", "allocated")
        ]
        if any(left) or any(self.asynchronous.get("bulk", {}).values()):
            raise AssertionError(f"{self.entry.name}: ends before all that it has begun")

    def _walk(self, at: int, mask: np.ndarray, stop: int) -> list[tuple[int, np.ndarray, bool]]:
        """Take the threads of ``mask`` on from ``at`` until they part, end, wait, or meet those at ``stop``.

        Returns the places they are at then, -1 for the end, and whether they wait there.
        """
        which: Mask = True if mask.all() else mask
        warps = np.count_nonzero(mask.reshape(self.warps, WARP).any(1))
        kinds, actions = self.kinds, self.actions
        begun = at
        try:
            while True:
                kind = kinds[at]
                self.issued += warps
                if kind == _STEP:
                    self.races.at = at
                    actions[at](which)
                    at += 1
                elif kind == _BRANCH:
                    operation = self.entry.operations[at]
                    target = self.entry.labels[operation.operands[0]]
                    if operation.guard is None:
                        at = target
                    else:
                        taken = self._taken(self.registers[operation.guard], operation.negated, mask)
                        if taken.any() and not (taken == mask).all():
                            return [(target, taken, False), (at + 1, mask & ~taken, False)]
                        at = target if taken.any() else at + 1
                elif kind == _END:
                    return [(-1, mask, False)]
                elif which is not True:
                    lanes, alive = mask.reshape(self.warps, WARP), self.alive.reshape(self.warps, WARP)
                    if (lanes != alive)[lanes.any(1)].any():
                        raise AssertionError("a part of a warp comes to a barrier")
                    return [(at + 1, mask, True)]
                else:
                    self.races.barrier()
                    at += 1
                if at >= stop >= 0 and at != begun:
                    return [(at, mask, False)]
        except AssertionError as error:
            raise type(error)(f"{self.entry.name}, {self.entry.operations[at]}: {error}") from error
