"""What a training process gets from the one that starts it, and that it does not outlive it."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import trainer.launching as launching
from trainer.data.ahead import made_ahead
from trainer.data.collator import Collator
from trainer.data.encoding import Encoded, TooLongError
from trainer.data.packing import PackedCollator
from trainer.errors import UserError
from trainer.launching import (
    PARENT,
    SAVE_FILE,
    LaunchConfig,
    Meeting,
    TrainingFailedError,
    run_training,
    threads_per_process,
)
from trainer.training import explain


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel is asked, and only Linux can be")
@pytest.mark.parametrize("parent", ["here", "gone", "not said"])
def test_a_process_whose_parent_is_gone_ends_at_once(parent: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != PARENT}
    if parent != "not said":
        # Not the parent: the process that started this one.
        environment[PARENT] = str(os.getpid() if parent == "here" else os.getppid())
    script = (
        "import os, signal; from trainer.launching import die_with_parent; die_with_parent(); "
        "os.kill(os.getpid(), signal.SIGUSR1); print('lives')"
    )
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == ((1, "") if parent == "gone" else (0, "lives\n")), found.stderr


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The command and the environment of a training, in whose place something ends at once."""
    popen, found = subprocess.Popen, dict[str, Any]()

    def start(command: list[str], *, env: dict[str, str], **options: Any) -> Any:
        found.update(command=command, env=env)
        return popen([sys.executable, "-c", ""], env=env, **options)

    monkeypatch.setattr(launching.subprocess, "Popen", start)
    return found


@pytest.mark.parametrize("early", [True, False])
def test_ctrl_c_ends_a_process_of_ours_without_a_traceback(early: bool) -> None:
    """A terminal sends it to every process; what there is to say, the one that has started them says."""
    interrupt = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
    ready = "from trainer.launching import die_with_parent; die_with_parent()"
    script = "; ".join([interrupt, ready] if early else [ready, interrupt])
    with launching.starting():
        found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (-signal.SIGINT, "")


def test_a_training_of_one_machine_does_not_hear_of_the_others(
    monkeypatch: pytest.MonkeyPatch, started: dict[str, Any], tmp_path: Path
) -> None:
    """torchrun would read how many machines there are from what has started this one."""
    for name, value in {"PET_NNODES": "4", "PET_NODE_RANK": "1", "PET_RDZV_BACKEND": "c10d"}.items():
        monkeypatch.setenv(name, value)
    run_training(tmp_path / "t" / "spec.json", LaunchConfig(processes=2, threads=3), "cpu", 0, tmp_path / "output.log")
    assert "--standalone" in started["command"]
    assert started["env"][PARENT] == str(os.getpid())
    assert started["env"]["OMP_NUM_THREADS"] == "3"
    assert not [name for name in started["env"] if name.startswith("PET_")]


@pytest.mark.parametrize(
    ("given", "expected"), [(None, "2,3"), ("4,5,6,7", "6,7"), ("GPU-a,GPU-b,GPU-c,GPU-d", "GPU-c,GPU-d")]
)
def test_trainings_at_once_share_the_gpus_that_this_process_may_use(
    monkeypatch: pytest.MonkeyPatch, started: dict[str, Any], tmp_path: Path, given: str | None, expected: str
) -> None:
    """Not the first ones of the machine, which may be another job's."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    launch = LaunchConfig(processes=2, parallel=2)
    run_training(tmp_path / "t" / "spec.json", launch, "cuda", 1, tmp_path / "output.log")
    assert started["env"]["CUDA_VISIBLE_DEVICES"] == expected


def test_a_scheduler_s_warning_asks_a_training_for_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Once for every signal, and a training that ends leaves no wish behind.

    SLURM sends it to the training's process too, which may be importing still and knows nothing of it.
    """
    popen, asked, save_now = subprocess.Popen, list[bool](), tmp_path / SAVE_FILE
    waits = "import sys\nwhile sys.stdin.read(1) == 'x': pass"

    def start(command: list[str], **options: Any) -> Any:
        process = popen([sys.executable, "-c", waits], stdin=subprocess.PIPE, **options)
        started.append(process)
        return process

    started: list[Any] = []
    monkeypatch.setattr(launching.subprocess, "Popen", start)
    monkeypatch.setattr(launching.time, "sleep", lambda seconds: None)

    def poll() -> None:
        asked.append(save_now.exists())
        if len(asked) == 2:
            save_now.unlink()  # the training has seen it
        if len(asked) in (1, 4):
            os.kill(started[0].pid, signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGUSR1)
        if len(asked) == 6:
            started[0].stdin.close()

    before = signal.getsignal(signal.SIGUSR1)
    try:
        launching.save_on_signal()
        run_training(tmp_path / "spec.json", LaunchConfig(), "cpu", 0, tmp_path / "output.log", poll)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert asked[:6] == [False, True, False, False, True, True]
    assert not save_now.exists()


def test_cores_are_those_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """More threads than a scheduler gives cores would wait for each other."""
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6, 18)), raising=False)
    found = [threads_per_process(LaunchConfig(processes=processes, parallel=2)) for processes in (1, 2, 12)]
    assert found == [6, 3, 1]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_process_that_the_kernel_has_killed_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, processes: int
) -> None:
    """It leaves no word itself, and what another rank says of it is that a connection was closed."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "reason = Path(sys.argv[1]).with_name('error.txt')\n"
        f"if os.environ['RANK'] != '{processes - 1}':\n"
        "    reason.write_text('Connection closed by peer')\n"
        "    time.sleep(60)\n"
        f"while {processes} > 1 and not (reason.exists() and reason.read_text()):\n"
        "    time.sleep(0.01)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    popen = subprocess.Popen

    def start(command: list[str], **options: Any) -> Any:
        assert command[-3:-1] == ["-m", "trainer.training"]
        return popen([*command[:-3], str(script), command[-1]], **options)

    monkeypatch.setattr(launching.subprocess, "Popen", start)
    with pytest.raises(TrainingFailedError) as caught:
        run_training(tmp_path / "spec.json", LaunchConfig(processes=processes), "cpu", 0, tmp_path / "output.log")
    said = str(caught.value).splitlines()
    name = "rank 1" if processes > 1 else "process "
    assert said[-1].strip().startswith(name), said
    assert " was ended by signal 9 (Killed); out of memory?" in said[-1]
    assert ("Connection closed by peer" in str(caught.value)) == (processes > 1)


def test_one_that_hangs_was_not_killed_for_memory(tmp_path: Path) -> None:
    """What torchrun cannot end otherwise it kills."""
    reason = tmp_path / launching.ERROR_FILE
    reason.write_text(f"{launching.HANGS}, or its machine does")
    launching._note_killed(reason, {"rank 1": -signal.SIGKILL})
    assert reason.read_text().endswith("was ended by signal 9 (Killed)\n")


@pytest.mark.parametrize(
    ("meeting", "told"),
    [
        (None, [f"    line {number}" for number in range(5, 25)]),  # the last ones
        (Meeting(1, 2, "127.0.0.1", 1), ["    what another machine has said"]),  # by now
    ],
)
def test_the_reason_is_of_this_attempt(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, meeting: Meeting | None, told: list[str]
) -> None:
    """One that a full disk left empty is looked for in the output."""
    popen, reason = subprocess.Popen, tmp_path / "t" / launching.ERROR_FILE

    def start(command: list[str], **options: Any) -> Any:
        return popen([sys.executable, "-c", "for i in range(25): print('line', i)\nexit(3)"], **options)

    monkeypatch.setattr(launching.subprocess, "Popen", start)
    monkeypatch.setattr(launching.time, "sleep", lambda _: reason.touch())
    reason.parent.mkdir()
    reason.write_text("what another machine has said" if meeting else "of the attempt before")
    log = tmp_path / "output.log"
    log.write_text("of the attempt before\n")
    with pytest.raises(TrainingFailedError, match=r"^training t ended with code 3; ") as caught:
        run_training(reason.parent / "spec.json", LaunchConfig(), "cpu", 0, log, meeting=meeting)
    assert str(caught.value).splitlines()[1:] == told
    assert log.read_text().startswith("of the attempt before\nline 0\n")  # the log is of all


@pytest.mark.parametrize(
    ("given", "found", "used"), [(None, "eth1", "eth1"), ("ib0", "eth1", "ib0"), (None, None, None)]
)
def test_machines_of_a_training_meet_on_the_network_that_they_share(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: str | None, found: str | None, used: str | None
) -> None:
    """Not where a machine's own name leads, to its loopback in many a hosts file; what the user says comes first."""
    popen, seen = subprocess.Popen, list[str | None]()

    def start(command: list[str], **options: Any) -> Any:
        seen.append(options["env"].get("GLOO_SOCKET_IFNAME"))
        return popen(["true"], **options)

    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    if given:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", given)
    monkeypatch.setattr(launching.subprocess, "Popen", start)
    meeting = Meeting(1, 2, "127.0.0.1", 1, found)
    run_training(tmp_path / "spec.json", LaunchConfig(), "cpu", 0, tmp_path / "output.log", meeting=meeting)
    assert seen == [used]


def test_a_training_that_is_called_off_is_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    popen, started = subprocess.Popen, list[Any]()

    def start(command: list[str], **options: Any) -> Any:
        started.append(popen(["sleep", "60"], **options))
        return started[0]

    def poll() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(launching.subprocess, "Popen", start)
    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path / "spec.json", LaunchConfig(), "cpu", 0, tmp_path / "output.log", poll)
    assert started[0].returncode == -signal.SIGTERM


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (UserError("rename it"), "rename it"),
        (
            torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total"),
            "out of GPU memory; lower training.batch_size and raise training.gradient_accumulation_steps by as much",
        ),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "/runs/t: Disk quota exceeded; make room, and the same"),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "/runs/t: No space left on device; make room, and the same command goes on from the newest checkpoint",
        ),
        (
            RuntimeError(
                "DataLoader worker (pid(s) 7) exited unexpectedly: Bus error. It is possible that dataloader's workers "
                "are out of shared memory. Please try to raise your shared memory limit."
            ),
            "/dev/shm is full, where processes that encode samples hand them over; make it larger (docker's --shm-size",
        ),
        (
            RuntimeError("[unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation to complete"),
            f"{launching.HANGS}, or its machine or the network does: others have waited for it for too long; look for",
        ),
        (RuntimeError("a defect"), "Traceback (most recent call last):\n"),
    ],
)
def test_how_a_training_says_why_it_ended(error: Exception, told: str) -> None:
    try:
        raise error
    except Exception as raised:
        text = explain(raised, Path("/runs/t"))
    assert text.startswith(told)
    assert len(text.splitlines()) == 1 or text.endswith("RuntimeError: a defect\n")


@pytest.mark.parametrize("processes", [0, 1])
def test_a_sample_that_cannot_be_used_is_told_in_a_sentence(processes: int) -> None:
    """Wherever it was encoded."""

    def encode(index: int) -> None:
        raise TooLongError(f"record 'r{index}': raise max_length")

    with pytest.raises(TooLongError) as caught:
        list(made_ahead(encode, range(3, 4), processes))
    assert explain(caught.value, Path("/runs/t")) == "record 'r3': raise max_length"


@pytest.mark.parametrize("packed", [True, False])
def test_a_batch_that_finds_no_room_ends_the_training(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its queue hands it over, torch prints the error and the training waits for ever."""

    def full(tensor: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_7>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    sample = {"encoded": Encoded([5, 6], [-100, 6]), "task_id": 0}

    def make(_: int) -> dict[str, Any]:
        return PackedCollator(0, None)([[sample]]) if packed else Collator(0, None)([sample])

    assert next(made_ahead(make, range(1), 0))["input_ids"].tolist() == [[5, 6]]  # in this process there is no need
    with pytest.raises(UserError) as caught:
        next(made_ahead(make, range(1), 1))
    assert explain(caught.value, Path("/runs/t")).startswith("/dev/shm is full, where processes that encode samples")
