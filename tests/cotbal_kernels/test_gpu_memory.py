"""What keeps large GPU tests apart, without a GPU: the lock between processes, and what is given back behind it."""

import sys
import time
import weakref
from pathlib import Path
from threading import Thread

import pytest
import torch
from gpu_memory import alone, require_memory


def _hold(lock: Path, log: Path) -> None:
    with alone(lock):
        for what in ("begins", "ends"):
            with log.open("a") as file:
                file.write(f"{what}\n")
            time.sleep(0.2)


def test_turns_are_taken(tmp_path: Path) -> None:
    """Each writes when it begins and when it ends: together they would write both beginnings first.

    Threads that open the lock by themselves: the kernel treats them as it treats processes.
    """
    lock, log = tmp_path / "lock", tmp_path / "log"
    threads = [Thread(target=_hold, args=(lock, log), daemon=True) for _ in range(2)]
    with alone(lock):
        for thread in threads:
            thread.start()
        time.sleep(0.2)
        assert not log.exists()
    for thread in threads:
        thread.join(60)
    assert log.read_text().split() == ["begins", "ends"] * 2


def test_memory_goes_back_before_the_next_one_begins_after_a_failure_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Large: ...

    held: list[weakref.ref[Large]] = []
    emptied: list[bool] = []  # whether the tensors of the failed test were gone by then

    def test() -> None:
        large = Large()
        held.append(weakref.ref(large))
        raise RuntimeError("fails")

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(bool(held) and held[0]() is None))
    monkeypatch.setattr(sys, "last_traceback", None, raising=False)
    with alone(tmp_path / "lock"):
        try:
            test()
        except RuntimeError as error:
            sys.last_traceback = error.__traceback__  # as pytest does
    assert emptied == [False, True]


def test_too_little_free_memory_is_a_skip_that_says_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (39 * 2**30, 80 * 2**30))
    require_memory(39)
    with pytest.raises(pytest.skip.Exception, match=r"needs 40 GiB of free GPU memory, 39.0 GiB are free"):
        require_memory(40)
