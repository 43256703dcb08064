"""Global and shared memory as a kernel sees them, every access checked."""

import ctypes
from collections.abc import Callable, Sequence

import numpy as np
from launch_accesses import Accesses

from .races import Races, Seen

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Memory:
    """What global and shared memory have in common: typed views of bytes from ``first`` on."""

    grain = 1  # bytes that are told apart in races

    def __init__(self, name: str, first: int, data: np.ndarray, bytes_seen: int) -> None:
        self.name, self.first = name, first
        self.seen = Seen(-(-bytes_seen // self.grain))
        self.races: Races | None = None
        self.views = {size: data[: data.size // size * size].view(kind) for size, kind in UNSIGNED.items()}

    def note(self, addresses: np.ndarray, size: int, kind: str) -> np.ndarray:
        """Raise if memory of ``size`` bytes cannot be accessed at each of ``addresses``; the number of each byte."""
        raise NotImplementedError

    def _at(self, addresses: np.ndarray, size: int, count: int, kind: str, who: np.ndarray | None) -> np.ndarray:
        """Index into the view of elements of ``size`` bytes of the first of ``count`` at every address."""
        if np.count_nonzero(addresses & np.uint64(size * count - 1)):
            raise AssertionError(f"{self.name} memory: misaligned access of {size * count} bytes")
        places = self.note(addresses, size * count, kind)
        if self.races is not None and who is not None:
            places = places[:: self.grain] // self.grain if size * count > 1 else places // self.grain
            if kind == "load":
                self.races.load(self.seen, places, who)
            elif kind == "store":
                self.races.store(self.seen, places, who)
            else:
                self.races.atomic(self.seen, places, who)
        return ((addresses - np.uint64(self.first)) >> np.uint64(size.bit_length() - 1)).astype(np.int64)

    def load(self, addresses: np.ndarray, size: int, count: int = 1, who: np.ndarray | None = None) -> np.ndarray:
        """[count, n] elements of ``size`` bytes from n addresses (uint64), by the threads ``who`` (see races)."""
        at = self._at(addresses, size, count, "load", who)
        return self.views[size][at[None, :] + np.arange(count)[:, None]]

    def store(
        self, addresses: np.ndarray, values: Sequence[np.ndarray], size: int, who: np.ndarray | None = None
    ) -> None:
        """Store one element after the other of ``values``, each [n], to n addresses."""
        at = self._at(addresses, size, len(values), "store", who)
        for index, value in enumerate(values):
            self.views[size][at + index] = value
            if (self.views[size][at + index] != value).any():
                raise AssertionError("several threads store different values to the same place")

    def exchange(
        self,
        addresses: np.ndarray,
        change: Callable[[np.ndarray, int], np.ndarray],
        size: int,
        kind: str,
        who: np.ndarray | None = None,
    ) -> np.ndarray:
        """Change one element after the other atomically; [n] what was there before each."""
        at = self._at(addresses, size, 1, kind, who)
        before = np.empty(at.shape, dtype=UNSIGNED[size])
        for index, place in enumerate(at):
            before[index] = self.views[size][place]
            self.views[size][place] = change(before[index], index)
        return before


class GlobalMemory(Memory):
    """The memory of this process, as far as a launch was given it; who accesses what is noted."""

    grain = 2  # no kernel stores single bytes here: half the work

    def __init__(self, accesses: Accesses) -> None:
        self.accesses = accesses
        first = int(accesses.starts[0]) // 16 * 16 if accesses.starts.size else 16
        span = int(accesses.ends[-1]) - first + 16 if accesses.starts.size else 0
        # Only addresses that were checked are ever read or written.
        data = np.ctypeslib.as_array((ctypes.c_uint8 * span).from_address(first))
        super().__init__("global", first, data, accesses.writer.size)

    def note(self, addresses: np.ndarray, size: int, kind: str) -> np.ndarray:
        if kind == "load":
            return self.accesses.load(addresses, size)
        if kind == "store":
            return self.accesses.store(addresses, size)
        return self.accesses.atomic(addresses, size, acquires="acq" in kind)


class SharedMemory(Memory):
    """The shared memory of one block."""

    def __init__(self, size: int) -> None:
        self.bytes = np.empty(-(-size // 16) * 16, dtype=np.uint8)
        super().__init__("shared", 0, self.bytes, self.bytes.size)

    def note(self, addresses: np.ndarray, size: int, kind: str) -> np.ndarray:
        if addresses.size and int(addresses.max()) + size > self.bytes.size:
            raise AssertionError("shared memory: access behind its end")
        return (addresses.astype(np.int64)[:, None] + np.arange(size)).ravel()
