"""Locks between processes, which the kernel lets go of when their holder ends, however that happens."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from trainer.errors import UserError

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of a file system, such as Lustre mounted without flock


@contextmanager
def holding(path: Path, busy: str, *, shared: bool = False, patience: float = 0.0) -> Iterator[None]:
    """Holds the lock of the file `path`, which is made.

    Where the file system has no locks, a file in this machine's temporary folder stands for it: processes of this
    machine still keep out of each other's way.

    Args:
        busy: what the error says.
        shared: with others that hold it so.
        patience: seconds to wait for those who hold it.

    Raises:
        UserError: they have not let go of it in time.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    deadline = time.monotonic() + patience
    with ExitStack() as opened:
        # NFS wants a file that can be read for a shared lock, and one that can be written for the other.
        file = opened.enter_context(path.open("a+"))
        while True:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno in _NO_LOCKS and file.name == str(path):
                    file = opened.enter_context(_stand_in(path).open("a+"))
                    continue
                if time.monotonic() >= deadline:
                    raise UserError(f"{busy}; wait for it or stop it") from error
                time.sleep(0.02)
        yield


def _stand_in(path: Path) -> Path:
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"cotbal-{os.getuid()}-{digest}.lock"
