"""Paths that a command cannot use: one line names the path and the reason of the system."""

from __future__ import annotations

import errno
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from raw_data import RAW, write_raw

from trainer.errors import UserError, writing

Command = Callable[..., Any]


class TestPathsThatCannotBeUsed:
    """One line that names the path and the reason of the system."""

    @pytest.mark.parametrize("command", ["run", "train", "evaluate", "convert"])
    @pytest.mark.parametrize("below", ["", "/sub"])
    def test_a_file_in_place_of_the_output_folder(
        self, cotbal: Command, run_data: dict[str, Any], write_config: Callable[[dict[str, Any]], Path], tmp_path: Path,
        command: str, below: str,
    ) -> None:  # fmt: skip
        file = tmp_path / "file"
        file.write_text("mine")
        output = f"{file}{below}"
        if command == "convert":
            raw = write_raw(tmp_path / "raw", RAW["gqa"]())
            outcome = cotbal("convert", "gqa", raw, output, "--workers", 1, "--quiet")
        elif command == "evaluate":
            records = ("--records", run_data["tasks"][0]["test"], "--image-root", run_data["tasks"][0]["image_root"])
            options = ("--metric", "exact_match", "--device", "cpu", "--quiet", "--output", output)
            outcome = cotbal("evaluate", run_data["model"]["path"], *records, *options)
        else:
            config = write_config(run_data | {"output_dir": output})
            outcome = cotbal(command, config, *(("--output", output) if command == "train" else ()))
        assert outcome.code == 2
        assert re.fullmatch(f"cotbal: {file}[^:]*: (File exists|Not a directory)\n", outcome.err)
        assert file.read_text() == "mine"

    def test_a_configuration_in_the_run_directory_is_not_replaced(
        self, cotbal: Command, run_data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One of the user's; what a run has written there itself may be run again, with other options too."""
        monkeypatch.setattr("trainer.pipeline.algorithm1.Pipeline.run", lambda *_: tmp_path / "report.html")
        (tmp_path / "run").mkdir()
        config = tmp_path / "run" / "config.yaml"
        text = "# why it is so\n" + yaml.safe_dump(run_data | {"output_dir": str(tmp_path / "run")})
        config.write_text(text)
        outcome = cotbal("run", config)
        assert outcome.code == 2
        assert outcome.err == (
            f"cotbal: {config} would be replaced by the run, which keeps its resolved configuration under this name; "
            "rename it, or choose another output_dir\n"
        )
        assert cotbal("run", config, "--set", f"output_dir={tmp_path / 'other'}").code == 0
        assert config.read_text() == text
        (tmp_path / "run" / "plan.json").write_text("[]")
        assert cotbal("run", config, "--set", "training.epochs=3").code == 0

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_a_full_disk(self, cotbal: Command, tmp_path: Path) -> None:
        raw = write_raw(tmp_path / "raw", RAW["gqa"]())
        output = tmp_path / "out"
        output.mkdir()
        (output / "train.jsonl.partial").symlink_to("/dev/full")
        outcome = cotbal("convert", "gqa", raw, output, "--workers", 1, "--quiet")
        assert (outcome.code, outcome.err) == (2, f"cotbal: {output}: No space left on device\n")

    @pytest.mark.parametrize("command", ["run", "train"])
    def test_a_disk_that_fills_up_during_a_run(
        self, cotbal: Command, run_data: dict[str, Any], write_config: Callable[[dict[str, Any]], Path], command: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("trainer.pipeline.algorithm1.Pipeline.run", full)
        monkeypatch.setattr("trainer.nodes.machine.run_training", full)
        output = run_data["output_dir"]
        outcome = cotbal(command, write_config(run_data), *(("--output", output) if command == "train" else ()))
        assert outcome.code == 2
        assert outcome.err.splitlines()[-1] == f"cotbal: {output}: No space left on device"

    def test_a_broken_database(self, tmp_path: Path) -> None:
        folder = tmp_path / "folder"
        folder.mkdir()
        with pytest.raises(UserError, match=f"^{folder}: unable to open database file$"), writing(folder):
            sqlite3.connect(folder).execute("SELECT 1")

    def test_weights_that_are_no_text_file(
        self, cotbal: Command, run_data: dict[str, Any], write_config: Callable[[dict[str, Any]], Path], tmp_path: Path
    ) -> None:
        config = write_config(run_data)
        latin = tmp_path / "latin.json"
        latin.write_bytes(b'{"colour": 1, "\xe9": 2}')
        outcome = cotbal("train", config, "--output", tmp_path / "one", "--weights", tmp_path)
        assert outcome.code == 2
        assert outcome.err.startswith(f"cotbal: weights file {tmp_path} cannot be read: [Errno 21] Is a directory")
        outcome = cotbal("train", config, "--output", tmp_path / "one", "--weights", latin)
        assert outcome.code == 2
        assert outcome.err.startswith(f"cotbal: weights file {latin} cannot be read: 'utf-8' codec can't decode byte")
        assert len(outcome.err.splitlines()) == 1

    def test_an_error_without_a_path_keeps_its_traceback(
        self, cotbal: Command, scores: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*_: Any, **__: Any) -> None:
            raise OSError("a defect")

        monkeypatch.setattr("trainer.balancing.cotbal.cotbal_weights", broken)
        with pytest.raises(OSError, match="a defect"):
            cotbal("weights", scores())
