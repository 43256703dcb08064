"""The side of every machine but node 0: it comes, says what it is, does what it is given, and leaves at the end."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from trainer.config import RunConfig
from trainer.errors import UserError
from trainer.launching import TrainingFailedError, rank_devices, resolve_device
from trainer.nodes.cluster import SILENCE
from trainer.nodes.machine import Machine, record_sizes, versions
from trainer.nodes.mailbox import POLL, ContactLost, Mailbox
from trainer.nodes.membership import Membership
from trainer.nodes.messages import Advance, Ended, Hello, Job, Notice, SharedFolder, TrainingJob, reason_of

_VISIBLE_AFTER = 60.0  # seconds that a network file system may take to show another machine's file


class _Stopped(Exception):
    """Node 0 has called the work off."""


def follow(config: RunConfig, node: Membership) -> None:
    """Works for node 0 until the run is over.

    Args:
        config: of the run, which must be node 0's.
        node: this machine.

    Raises:
        UserError: node 0 cannot be reached or is lost, or its run ended with an error.
    """
    _say(f"node {node.rank} of {node.count}: waiting for node 0 at {node.address}")
    mailbox, address = Mailbox.join(node)
    claimed, reason = False, "the run is over"
    try:
        try:
            hello = _introduction(config, mailbox, address)
            claimed = mailbox.claim(node.rank)  # not before: killed meanwhile, it could not come again
            if not claimed:
                raise UserError(f"another machine is node {node.rank} already; give every machine its own --node-rank")
            mailbox.post(f"hello/{node.rank}", hello)
            if hello.device == "cpu":
                os.environ["DS_ACCELERATOR"] = "cpu"  # else every process that imports DeepSpeed warns of it
            _work(Machine(config.launch, hello.device, node.rank), node.rank, mailbox)
        except BaseException as error:
            reason = reason_of(error)
            raise
        finally:
            with suppress(ContactLost):
                if claimed or mailbox.claim(node.rank):
                    mailbox.post(f"left/{node.rank}", Notice(reason=reason))
    except ContactLost as error:
        raise UserError(
            f"contact with node 0 at {node.address} is lost ({error}); start the same command on every machine to go on"
        ) from error


def _introduction(config: RunConfig, mailbox: Mailbox, address: str) -> Hello:
    problems: list[str] = []
    device = "unknown"
    try:
        device = resolve_device(config.launch.device)
        rank_devices(device, config.launch.processes * config.launch.parallel)
    except UserError as error:
        problems.append(str(error))
    sizes = record_sizes(config)
    problems += _missing_files(config, sizes)
    problems += _other_folder(mailbox)
    return Hello(
        host=socket.gethostname(),
        address=address,
        versions=versions(),
        device=device,
        config=config.model_dump(mode="json"),
        sizes=sizes,
        problems=problems,
    )


def _work(machine: Machine, rank: int, mailbox: Mailbox) -> None:
    """Takes jobs until the end."""
    posted, begun = 0, False
    running: dict[int, threading.Event] = {}  # jobs, and what calls them off
    with closing(machine), ThreadPoolExecutor(64) as pool:
        try:
            with _ending_in_silence(rank) as heard:
                while (end := mailbox.read("end", Notice)) is None:
                    mailbox.beat(rank)
                    heard()
                    if not begun and mailbox.read("start", Notice) is not None:
                        begun = True
                        _say(f"node {rank}: at work; node 0 shows how far the run is")
                    while (job := mailbox.read(f"jobs/{rank}/{posted}", Job)) is not None:
                        posted += 1
                        stop = running[job.work.number] = threading.Event()
                        pool.submit(_perform, job, machine, rank, mailbox, stop)
                    for number, stop in list(running.items()):
                        if mailbox.read(f"ended/{number}/{rank}", Ended) is not None:
                            del running[number]
                        elif mailbox.read(f"cancel/{number}", Notice) is not None:
                            stop.set()
                    time.sleep(POLL)
        finally:  # the pool waits for its threads
            for stop in running.values():
                stop.set()
    if end.failed:
        raise UserError(f"node 0 has ended the run: {end.reason}")


@contextmanager
def _ending_in_silence(rank: int) -> Iterator[Callable[[], None]]:
    """Ends this process unless what is yielded is called from time to time.

    A machine that is cut off from node 0 waits for its answer without end, while its trainings write where those of a
    new run may. They end with this process, however that does.
    """
    last, over = time.monotonic(), threading.Event()

    def heard() -> None:
        nonlocal last
        last = time.monotonic()

    def watch() -> None:
        while not over.wait(1.0):
            if time.monotonic() - last > SILENCE:
                _say(
                    f"node {rank}: node 0 has not answered for {SILENCE:.0f} s; "
                    "start the same command on every machine to go on"
                )
                os._exit(2)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield heard
    finally:
        over.set()


def _perform(job: Job, machine: Machine, rank: int, mailbox: Mailbox, stop: threading.Event) -> None:
    work = job.work

    def poll() -> None:
        if stop.is_set():
            raise _Stopped

    def report(done: int, total: int, note: str) -> None:
        poll()
        mailbox.post(f"progress/{work.number}", Advance(done=done, total=total, note=note))

    try:
        if isinstance(work, TrainingJob):
            _say(f"node {rank}: {Path(*work.spec.parent.parts[-2:])}")
            machine.train(work, poll, mailbox)
        else:
            _say(f"node {rank}: {Path(*work.spec.output_dir.parts[-3:])}")
            machine.evaluate(work.spec, work.place, report)
        ended = Ended()
    except TrainingFailedError as error:
        ended = Ended(kind="training", text=str(error))
    except UserError as error:
        ended = Ended(kind="user", text=str(error))
    except _Stopped:  # node 0 asks for the text only if it is not the one that has called the work off
        ended = Ended(kind="training", text="this machine was interrupted; start the same command on every machine")
    except BaseException:  # also what would end this thread without a word
        ended = Ended(kind="other", text=traceback.format_exc())
    with suppress(ContactLost):
        mailbox.post(f"ended/{work.number}/{rank}", ended)


def _missing_files(config: RunConfig, sizes: dict[str, int | None]) -> list[str]:
    """Record files and a model's folder that this machine does not see; images are too many to look for."""
    missing = [path for path, size in sizes.items() if size is None]
    model = Path(config.model.path)
    if model.is_absolute() and not model.is_dir():
        missing.append(str(model))
    return [f"{path} does not exist there" for path in missing]


def _other_folder(mailbox: Mailbox) -> list[str]:
    """Whether the run's folder is node 0's, by a file that node 0 has just written."""
    deadline = time.monotonic() + _VISIBLE_AFTER
    while (mark := mailbox.read("folder", SharedFolder)) is None:
        time.sleep(POLL)
    while True:
        with suppress(OSError):
            if mark.path.read_text() == mark.content:
                return []
        if time.monotonic() >= deadline:
            return [f"{mark.path.parent} is not the folder of node 0; put it on a file system that all machines share"]
        time.sleep(POLL)


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)
