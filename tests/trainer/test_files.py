"""What a crash of the machine, or a full disk, leaves of files that are written whole; how large ones are read."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from trainer.files import put_in_place, write_json
from trainer.loop.callbacks import RunLog
from trainer.loop.checkpoints import COMPLETE, CompleteCheckpoints
from trainer.loop.weighting import TaskWeighting
from trainer.pipeline.identity import digest
from trainer.pipeline.places import last_step

SIZE, LINE = 2**23, b'\n{"step": 7, "steps": 9}\n'
FILES = {"model.safetensors": b"weights", "global_step8/zero_pp_rank_0.pt": b"states", "trainer_state.json": b"{}"}


def test_a_failed_write_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [found.name for found in path.parent.iterdir()] == ["a.json"]


def test_the_rename_is_what_makes_it_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed just before the rename, the old file is whole."""
    path = tmp_path / "a.json"
    write_json(path, [1])

    def killed(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, list(range(1000)))
    assert json.loads(path.read_text()) == [1]


class Disk:
    """What a crash would leave: everything that was forced to the disk, by the file and not by its name."""

    def __init__(self) -> None:
        self.safe: dict[int, bytes] = {}  # contents by inode; of folders, their entries

    def force(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        self.safe[path.stat().st_ino] = self._content(path)

    def has(self, path: Path) -> bool:
        return self.safe.get(path.stat().st_ino) == self._content(path)

    def _content(self, path: Path) -> bytes:
        return repr(sorted(os.listdir(path))).encode() if path.is_dir() else path.read_bytes()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    found = Disk()
    monkeypatch.setattr(os, "fsync", found.force)
    return found


def fill(folder: Path) -> list[Path]:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return [folder, *folder.rglob("*")]


def test_a_checkpoint_is_marked_when_it_is_on_the_disk(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a crash the newest marked one is taken, and those before it are gone."""
    written = fill(tmp_path / "checkpoint-8")
    touch, marked = Path.touch, []

    def look(path: Path, *options: Any) -> None:
        marked.append(path.name)
        assert all(map(disk.has, written)), [path for path in written if not disk.has(path)]
        touch(path, *options)

    monkeypatch.setattr(Path, "touch", look)
    state = TrainerState(global_step=8, is_world_process_zero=True, is_local_process_zero=True)
    CompleteCheckpoints().on_save(TrainingArguments(str(tmp_path), use_cpu=True), state, TrainerControl())
    assert marked == [COMPLETE]


def test_a_model_is_on_the_disk_before_its_checkpoints_go(disk: Disk, tmp_path: Path) -> None:
    fill(tmp_path / "model.partial")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old.safetensors").touch()
    put_in_place(tmp_path / "model.partial", tmp_path / "model")
    found = [tmp_path, tmp_path / "model", *(tmp_path / "model").rglob("*")]
    assert {path.name for path in found if path.is_file()} == {Path(name).name for name in FILES}
    assert all(map(disk.has, found)), [path for path in found if not disk.has(path)]


def test_a_manifest_is_on_the_disk_when_it_has_its_name(disk: Disk, tmp_path: Path) -> None:
    """Else a crash may leave its name without content, and a finished training that no stage has made."""
    write_json(tmp_path / "train.json", {"status": "done"})
    assert disk.has(tmp_path / "train.json")


def test_a_training_that_goes_on_without_space_keeps_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    log, table = tmp_path / "log.jsonl", tmp_path / "weights.csv"
    log.write_text('{"step": 1, "seconds": 2.0}\n{"step": 2, "seconds": 3.0}\n')
    table.write_text("step,a\n1,1.0\n2,0.5\n")
    before = log.read_text(), table.read_text()
    monkeypatch.setattr(os, "fsync", full)
    state = TrainerState(global_step=1, is_world_process_zero=True)
    with pytest.raises(OSError, match="No space"):
        RunLog(log, ["a"]).on_train_begin(TrainingArguments(str(tmp_path), use_cpu=True), state, TrainerControl())
    weighting = TaskWeighting.__new__(TaskWeighting)
    weighting._csv_path, weighting.tasks = table, type("T", (), {"names": ["a"]})()
    with pytest.raises(OSError, match="No space"):
        weighting._start_csv(1)
    assert (log.read_text(), table.read_text()) == before
    monkeypatch.undo()
    weighting._start_csv(1)
    with table.open(newline="") as file:
        assert list(csv.reader(file)) == [["step", "a"], ["1", "1.0"]]


@pytest.mark.parametrize(
    ("look", "found"),
    [
        (last_step, (7, 9)),
        (digest, hashlib.sha256(bytes(SIZE) + LINE).hexdigest()[:16]),
    ],
)
def test_large_files_are_never_in_memory_whole(look: Callable[[Path], Any], found: Any, tmp_path: Path) -> None:
    """The log of a training, which is looked at twice a second, and files of records."""
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.seek(SIZE)
        file.write(LINE)
    tracemalloc.start()
    assert look(path) == found
    assert tracemalloc.get_traced_memory()[1] < SIZE / 2
    tracemalloc.stop()
