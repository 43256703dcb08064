"""One holder at a time, among processes; also on a file system that has no locks."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import UserError
from trainer.evaluation.parts import Claims
from trainer.locks import holding

ELSEWHERE = """
import sys
from pathlib import Path
from trainer.locks import holding
with holding(Path(sys.argv[1]), "taken"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(params=["locks", "no locks"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose files can be locked, or not, as on Lustre mounted without flock."""
    own = tmp_path / "run"
    own.mkdir()
    if request.param == "no locks":
        (tmp_path / "tmp").mkdir()
        monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
        flock = fcntl.flock

        def refuse(file: Any, kind: int) -> None:
            if Path(file.name).is_relative_to(own):
                raise OSError(errno.ENOSYS, "Function not implemented")
            flock(file, kind)

        monkeypatch.setattr(fcntl, "flock", refuse)
    return own


def test_one_holder_at_a_time(folder: Path) -> None:
    with holding(folder / "a", "a is taken"):
        with (
            pytest.raises(UserError, match=r"^a is taken; wait for it or stop it$"),
            holding(folder / "a", "a is taken"),
        ):
            pass
        with holding(folder / "b", "b is taken"):
            pass
    with holding(folder / "a", "a is taken"):
        pass


def test_shared_holders_keep_a_sole_one_out(folder: Path) -> None:
    path = folder / "a"
    with (
        holding(path, "taken", shared=True),
        holding(path, "taken", shared=True),
        pytest.raises(UserError, match="taken"),
        holding(path, "taken"),
    ):
        pass


def test_it_waits_as_long_as_it_is_told_to(folder: Path) -> None:
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        with holding(folder / "a", "taken"):
            held.set()
            go.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(30)
    with pytest.raises(UserError, match="taken"), holding(folder / "a", "taken", patience=0.1):
        pass
    go.set()
    with holding(folder / "a", "taken", patience=30.0):
        pass
    thread.join()


def test_a_killed_holder_lets_go(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "a")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="taken"), holding(tmp_path / "a", "taken"):
            pass
        other.kill()
    with holding(tmp_path / "a", "taken", patience=10.0):
        pass


def test_claims_are_handed_out_once_each(folder: Path) -> None:
    """To eight ranks at once, which have the first eight positions to themselves."""
    Claims(folder).open(8)
    taken: list[int] = []

    def rank(number: int) -> None:
        claims = Claims(folder)
        taken.append(claims.take(number))
        taken.extend(claims.take() for _ in range(20))

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(8 * 21))
    Claims(folder).close()
    assert Claims(folder).take() >= 2**62


@pytest.mark.parametrize("shared", [True, False])
def test_nfs_asks_how_a_file_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
    """It makes byte-range locks of them, a shared one of a file that can be read (flock(2))."""
    flock = fcntl.flock

    def as_nfs(file: Any, kind: int) -> None:
        mode = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE
        if mode == (os.O_WRONLY if kind & fcntl.LOCK_SH else os.O_RDONLY):
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(file, kind)

    monkeypatch.setattr(fcntl, "flock", as_nfs)
    with holding(tmp_path / "a", "a is taken", shared=shared):
        pass
