"""Whether threads of a block may access the same byte at the same time, as compute-sanitizer's racecheck asks it.

Every byte remembers who stored last and who has loaded since, and how many barriers of the block they had passed. Two
accesses, at least one a store, are ordered by a barrier between them, or because one thread makes both; what a tensor
copy stores, or a product loads, is ordered before whoever has waited for it. Atomics may meet each other. Shuffles,
votes and the lanes of a warp, which need not be in lock-step, order nothing. So a race is found in whatever order the
threads happen to run here.
"""

from collections.abc import Sequence
from typing import NoReturn

import numpy as np

WARP = 32
# One word of 64 bits: barriers passed, phases of the barrier in memory, number of the operation, atomic or not, who.
_PASSED, _PHASE, _AT, _ATOMIC, _WHO = 44, 30, 14, 1 << 13, (1 << 13) - 1
_MOST = (1 << _PASSED - _PHASE) - 1
# Beside threads: all lanes of a warp, several warps, and what is waited for at one of the barriers in memory.
_LANES, EVERYBODY, _COPIES = 1024, 2047, 2048


def lanes_of(warps: np.ndarray) -> np.ndarray:
    """Who does what the lanes of each of ``warps`` do together."""
    return _LANES + warps


class Seen:
    """The last store of every byte of a memory, and the last load since."""

    def __init__(self, size: int) -> None:
        self.stores, self.loads = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)


class Races:
    """The order of what the threads of a block do; ``at`` is the number of the operation under way."""

    def __init__(self, threads: int, operations: Sequence[object]) -> None:
        self.threads, self.operations, self.at, self._floor = threads, operations, 0, 0
        self.begin()

    def begin(self) -> None:
        """Another block: nothing is waited for."""
        self._barriers: list[int] = []  # addresses; copies are known by the place of theirs
        self._ended: list[int] = []  # phases of each
        self._waited: list[np.ndarray] = []  # of those, how many each thread has seen the end of
        self.barrier()

    def barrier(self) -> None:
        """All threads have met."""
        self._floor += 1 << _PASSED

    def end_phase(self, barrier: int) -> int:
        """A phase of the barrier at this address is over: who copied, or multiplied, for it."""
        if barrier not in self._barriers:
            self._barriers.append(barrier)
            self._ended.append(0)
            self._waited.append(np.zeros(self.threads, dtype=np.int64))
        index = self._barriers.index(barrier)
        self._ended[index] += 1
        return _COPIES + index

    def wait(self, barrier: int, threads: np.ndarray) -> None:
        """``threads`` have seen the end of all phases until now."""
        if barrier in self._barriers:
            index = self._barriers.index(barrier)
            self._waited[index][threads] = self._ended[index]

    # --- accesses: places of bytes, and for each or for as many of them who makes it ------------------------------

    def load(self, seen: Seen, places: np.ndarray, who: np.ndarray) -> None:
        if self._copied(seen.loads, places, who):
            return
        own = self._own(places, who)
        self._require_order("load", own, "store", seen.stores[places])
        self._join(seen.loads, places, own)

    def store(self, seen: Seen, places: np.ndarray, who: np.ndarray) -> None:
        if self._copied(seen.stores, places, who):
            return
        own = self._own(places, who)
        self._require_order("store", own, "store", seen.stores[places])
        self._require_order("store", own, "load", seen.loads[places])
        self._put(seen.stores, places, own)

    def atomic(self, seen: Seen, places: np.ndarray, who: np.ndarray) -> None:
        own = self._own(places, who) | _ATOMIC
        stores = seen.stores[places]
        self._require_order("atomic operation", own, "store", np.where(stores & _ATOMIC, 0, stores))
        self._require_order("atomic operation", own, "load", seen.loads[places])
        self._join(seen.stores, places, own)

    def _own(self, places: np.ndarray, who: np.ndarray) -> np.ndarray:
        return np.repeat((self._floor | self.at << _AT) + who, places.size // max(1, who.size))

    def _copied(self, known: np.ndarray, places: np.ndarray, who: np.ndarray) -> bool:
        """Whether it is a copy or a product that has ended: that it may was asked when it began."""
        if not who.size or who[0] < _COPIES:
            return False
        known[places] = self._own(places, who) | self._ended[who[0] - _COPIES] << _PHASE
        return True

    def _ordered(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Of pairs of accesses since the last barrier of the block."""
        first, then = before & _WHO, after & _WHO
        found = (first == then) & (first < _LANES)
        for index in np.flatnonzero(first >= _COPIES):
            waited, by = self._waited[first[index] - _COPIES], int(then[index])
            if by < _LANES:
                waited = waited[by : by + 1]
            elif by < EVERYBODY:
                waited = waited[WARP * (by - _LANES) : WARP * (by - _LANES + 1)]
            found[index] = waited.min() >= (before[index] >> _PHASE & _MOST)
        return found

    def _require_order(self, kind: str, own: np.ndarray, what: str, seen: np.ndarray) -> None:
        if seen.size and seen.max() >= self._floor:
            now = np.flatnonzero(seen >= self._floor)
            apart = now[~self._ordered(seen[now], own[now])]
            if apart.size:
                self._raise(kind, int(own[apart[0]]), what, int(seen[apart[0]]))

    def _join(self, known: np.ndarray, places: np.ndarray, own: np.ndarray) -> None:
        """Whoever comes later must be ordered behind what is known and behind ``own``."""
        before = known[places]
        if before.size and before.max() >= self._floor:
            apart = before >= self._floor
            apart[apart] = ~self._ordered(before[apart], own[apart])
            own = np.where(apart, own | EVERYBODY, own)
        self._put(known, places, own)

    @staticmethod
    def _put(known: np.ndarray, places: np.ndarray, own: np.ndarray) -> None:
        known[places] = own
        several = known[places] != own
        if several.any():
            known[places[several]] = own[several] | EVERYBODY

    def _raise(self, kind: str, own: int, what: str, seen: int) -> NoReturn:
        other = self.operations[seen >> _AT & (1 << _PHASE - _AT) - 1]
        raise AssertionError(
            f"no barrier between {kind} by {_name(own & _WHO)} and {what} by {_name(seen & _WHO)}, {other}"
        )


def _name(who: int) -> str:
    if who < _LANES:
        return f"thread {who}"
    if who < EVERYBODY:
        return f"warp {who - _LANES}"
    return "several threads" if who == EVERYBODY else "a copy"
