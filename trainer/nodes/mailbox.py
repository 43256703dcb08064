"""Small messages between the machines of a run, kept by node 0.

Messages are JSON, which carries no code. As with torchrun, the port is for a network whose users are trusted.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from pydantic import BaseModel
from torch.distributed import DistError, TCPStore

from trainer.errors import UserError
from trainer.nodes.membership import Membership

Message = TypeVar("Message", bound=BaseModel)
POLL = 0.5  # seconds between looks
JOINING = 900.0  # seconds that machines wait for each other at the start
_ANSWER = timedelta(seconds=60)


class ContactLost(RuntimeError):
    """Node 0, which keeps the messages, does not answer any more."""


class Mailbox:
    """A connection to node 0's messages; safe to use from several threads.

    Attributes:
        host: of node 0, as this machine reaches it.
    """

    def __init__(self, store: TCPStore, host: str) -> None:
        self._store = store
        self.host = host

    @classmethod
    def open(cls, node: Membership) -> Mailbox:
        """Node 0's own, which the others connect to.

        Raises:
            UserError: the port cannot be used.
        """
        try:
            store = TCPStore(node.host, node.port, is_master=True, wait_for_workers=False, timeout=_ANSWER)
            return cls(store, node.host)
        except DistError as error:
            raise UserError(
                f"node 0 cannot listen at {node.address}: {_first_line(error)}; name an address of this machine and a "
                "free port with --master HOST:PORT, the same on every machine"
            ) from error

    @classmethod
    def join(cls, node: Membership, patience: float = JOINING) -> tuple[Mailbox, str]:
        """Waits until node 0 listens; returns this machine's own address on the way there, too.

        Raises:
            UserError: it does not in time.
        """
        deadline = time.monotonic() + patience
        while True:
            try:
                with socket.create_connection((node.host, node.port), timeout=5.0) as probe:
                    own = probe.getsockname()[0]
                store = TCPStore(node.host, node.port, is_master=False, timeout=_ANSWER)
                return cls(store, node.host), own
            except (OSError, DistError) as error:
                if time.monotonic() >= deadline:
                    raise UserError(
                        f"node 0 does not answer at {node.address} after {patience:.0f} s ({_first_line(error)}); is "
                        "the same command running there, and can this machine reach the port?"
                    ) from error
                time.sleep(POLL)

    def post(self, key: str, message: BaseModel) -> None:
        self._call(lambda: self._store.set(key, message.model_dump_json()))

    def read(self, key: str, kind: type[Message]) -> Message | None:
        """The message at `key`, or None while there is none."""
        if not self._call(lambda: self._store.check([key])):
            return None
        return kind.model_validate_json(self._call(lambda: self._store.get(key)))

    def claim(self, rank: int) -> bool:
        """Whether this machine is the first that comes with this rank."""
        return self._call(lambda: self._store.add(f"claim/{rank}", 1)) == 1

    def beat(self, rank: int) -> None:
        """Tells node 0 that this machine is alive."""
        self._call(lambda: self._store.add(f"beat/{rank}", 1))

    def beats(self, rank: int) -> int:
        return self._call(lambda: self._store.add(f"beat/{rank}", 0))

    def _call(self, operation: Callable[[], Any]) -> Any:
        try:
            return operation()
        except DistError as error:
            raise ContactLost(_first_line(error)) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
