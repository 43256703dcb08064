"""Machines of a run in threads of the test's process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from machines import free_port

from trainer.config import RunConfig
from trainer.nodes import Cluster, Membership, follow

MakeConfig = Callable[..., RunConfig]


class Followers:
    """Starts them, and keeps the errors that they ended with."""

    def __init__(self) -> None:
        self.port = free_port()
        self.threads: list[threading.Thread] = []
        self.errors: dict[int, BaseException] = {}

    def node(self, rank: int, config: RunConfig) -> Membership:
        return Membership(rank, config.launch.nodes, "127.0.0.1", self.port)

    def start(self, config: RunConfig, *ranks: int) -> None:
        for rank in ranks:
            self.threads.append(threading.Thread(target=self._follow, args=(config, rank), daemon=True))
            self.threads[-1].start()

    def _follow(self, config: RunConfig, rank: int) -> None:
        try:
            follow(config, self.node(rank, config))
        except BaseException as error:
            self.errors[rank] = error

    def join(self) -> None:
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()


def led(config: RunConfig, followers: Followers, folder: Path) -> Cluster:
    folder.mkdir(exist_ok=True)
    return Cluster(config, "cpu", followers.node(0, config), folder, lambda text: None)
