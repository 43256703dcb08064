"""Machines of one run: what is refused before anything is trained."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from followers import Followers, MakeConfig, led

import trainer.nodes.cluster as cluster_module
import trainer.nodes.following as following
import trainer.nodes.machine as machine_module
from trainer.errors import UserError
from trainer.launching import TERMINATED, TrainingFailedError
from trainer.nodes import follow
from trainer.nodes.mailbox import Mailbox


class TestWhoMayTakePart:
    def test_everything_that_differs_is_told_at_once(
        self, make_config: MakeConfig, followers: Followers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        own = make_config(nodes=3)
        other = own.model_copy(update={"seed": 9})
        (moved := other.tasks[0].model_copy(update={"train": tmp_path / "none.jsonl"}))  # type: ignore[union-attr]
        other.tasks = [moved, *other.tasks[1:]]  # type: ignore[list-item]
        other.model = own.model.model_copy(update={"path": str(tmp_path / "no-model")})
        versions = machine_module.versions()
        monkeypatch.setattr(following, "versions", lambda: versions | {"torch": "1.0"})
        older = str(own.tasks[1].train)  # type: ignore[union-attr]
        size, sizes = Path(older).stat().st_size, machine_module.record_sizes
        monkeypatch.setattr(following, "record_sizes", lambda given: sizes(given) | {older: size - 9})
        followers.start(own, 1)
        followers.start(other, 2)
        with pytest.raises(UserError) as told, led(own, followers, tmp_path / "run"):
            pytest.fail("the run has begun")
        lines = str(told.value).splitlines()
        assert [line.split(" (")[0] for line in lines] == ["node 1"] * 2 + ["node 2"] * 5
        assert f"torch is 1.0 there and {versions['torch']} here" in lines[0]
        assert f"{older} has {size - 9} bytes there and {size} here; give every machine the same records" in lines[1]
        assert f"{tmp_path / 'none.jsonl'} does not exist there" in lines[2]
        assert f"{tmp_path / 'no-model'} does not exist there" in lines[3]
        assert "torch is 1.0" in lines[4]
        assert f"{older} has" in lines[5]
        assert "the configuration differs in seed, tasks, model;" in lines[6]
        followers.join()
        for rank in (1, 2):
            assert str(followers.errors[rank]) == f"node 0 has ended the run: {told.value}"

    @pytest.mark.parametrize(
        ("problem", "told"),
        [
            ("2 processes take a GPU each and torch sees 1 here", "2 processes take a GPU each and torch sees 1 here"),
            (None, r"launch\.device is cuda there and cpu here; say which one is meant"),
        ],
    )
    def test_one_with_other_gpus(
        self, make_config: MakeConfig, followers: Followers, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch, problem: str | None, told: str,
    ) -> None:  # fmt: skip
        """Where there are too few, that is all there is to say."""

        asked = []

        def rank_devices(device: str, ranks: int) -> None:
            asked.append((device, ranks))
            if problem and device == "cuda":
                raise UserError(problem)

        monkeypatch.setattr(following, "resolve_device", lambda device: "cuda")
        for module in (cluster_module, following):
            monkeypatch.setattr(module, "rank_devices", rank_devices)
        two = make_config(nodes=2, processes=2, parallel=3)
        followers.start(two, 1)
        with (
            pytest.raises(UserError, match=rf"^node 1 \(.*\): {told}$"),
            led(two, followers, tmp_path / "run"),
        ):
            pytest.fail("the run has begun")
        assert sorted(asked) == [("cpu", 6), ("cuda", 6)]

    def test_a_folder_that_is_not_shared(
        self, make_config: MakeConfig, followers: Followers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(following, "_VISIBLE_AFTER", 0.0)
        read = Path.read_text

        def read_there(path: Path, *options: Any, **named: Any) -> str:
            return "another" if path.name == ".nodes" else read(path, *options, **named)

        monkeypatch.setattr(Path, "read_text", read_there)
        followers.start(make_config(nodes=2), 1)
        with (
            pytest.raises(UserError, match=r"node 1 .*run is not the folder of node 0; put it on a file system"),
            led(make_config(nodes=2), followers, tmp_path / "run"),
        ):
            pytest.fail("the run has begun")

    def test_a_folder_that_shows_late(
        self, make_config: MakeConfig, followers: Followers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A network file system may take a while for another machine's file. A model's name on the hub is no path."""
        read, looks = Path.read_text, []

        def read_there(path: Path, *options: Any, **named: Any) -> str:
            if path.name == ".nodes" and not looks:
                looks.append(path)
                raise FileNotFoundError(path)
            return read(path, *options, **named)

        monkeypatch.setattr(Path, "read_text", read_there)
        two = make_config(nodes=2)
        two.model = two.model.model_copy(update={"path": "llava-hf/llava-1.5-7b-hf"})
        followers.start(two, 1)
        with led(two, followers, tmp_path / "run"):
            assert looks
        followers.join()
        assert followers.errors == {}

    def test_one_that_does_not_come_and_one_that_comes_twice(
        self, make_config: MakeConfig, followers: Followers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(cluster_module, "JOINING", 3.0)
        followers.start(make_config(nodes=3), 1, 1)
        with (
            pytest.raises(UserError, match="node 2 of 3 did not come within"),
            led(make_config(nodes=3), followers, tmp_path / "run"),
        ):
            pytest.fail("the run has begun")
        followers.join()
        # The second one has gone at once, the first one with the run; both under the same key of this dictionary.
        assert followers.errors.keys() == {1}

    def test_a_second_machine_of_the_same_rank(
        self, make_config: MakeConfig, followers: Followers, tmp_path: Path
    ) -> None:
        followers.start(make_config(nodes=2), 1)
        with (
            led(make_config(nodes=2), followers, tmp_path / "run"),
            pytest.raises(UserError, match="is node 1 already"),
        ):
            follow(make_config(nodes=2), followers.node(1, make_config(nodes=2)))
        followers.join()
        assert followers.errors == {}

    def test_one_that_is_killed_while_it_looks_around_may_come_again(
        self, make_config: MakeConfig, followers: Followers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of the first one nothing is heard until the run is over for the second."""
        look, begun, over = following._other_folder, threading.Event(), threading.Event()

        def killed(mailbox: Mailbox) -> list[str]:
            monkeypatch.setattr(following, "_other_folder", look)
            begun.set()
            over.wait(60)
            return []

        monkeypatch.setattr(cluster_module, "JOINING", 5.0)
        monkeypatch.setattr(following, "_other_folder", killed)
        followers.start(make_config(nodes=2), 1)
        try:
            cluster = led(make_config(nodes=2), followers, tmp_path / "run")
            threading.Thread(target=lambda: begun.wait(60) and followers.start(make_config(nodes=2), 1)).start()
            with cluster:
                over.set()
        finally:
            over.set()
        followers.join()
        assert str(followers.errors[1]).startswith("another machine is node 1 already")

    def test_one_that_breaks_down_on_the_way(
        self, make_config: MakeConfig, followers: Followers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def versions() -> dict[str, str]:
            raise RuntimeError("no metadata of torch")

        monkeypatch.setattr(following, "versions", versions)
        followers.start(make_config(nodes=2), 1)
        with (
            pytest.raises(UserError, match="node 1 cannot take part: RuntimeError: no metadata of torch"),
            led(make_config(nodes=2), followers, tmp_path / "run"),
        ):
            pytest.fail("the run has begun")

    def test_one_that_leaves_before_all_have_come(
        self, make_config: MakeConfig, followers: Followers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def work(*_: Any) -> None:
            raise KeyboardInterrupt(TERMINATED)

        monkeypatch.setattr(following, "_work", work)
        followers.start(make_config(nodes=3), 1)
        with (
            pytest.raises(TrainingFailedError, match=r"^node 1 \(.*\) has left: ended by SIGTERM; start it again"),
            led(make_config(nodes=3), followers, tmp_path / "run"),
        ):
            pytest.fail("the run has begun")

    def test_a_port_that_is_taken(self, make_config: MakeConfig, followers: Followers, tmp_path: Path) -> None:
        held = Mailbox.open(followers.node(0, make_config(nodes=2)))
        with (
            pytest.raises(UserError, match=rf"cannot listen at 127\.0\.0\.1:{followers.port}.*free port with --master"),
            led(make_config(nodes=2), followers, tmp_path / "run"),
        ):
            pytest.fail("the run has begun")
        held.beat(0)

    def test_no_node_0(self, make_config: MakeConfig, followers: Followers) -> None:
        with pytest.raises(UserError, match=rf"node 0 does not answer at 127\.0\.0\.1:{followers.port}"):
            Mailbox.join(followers.node(1, make_config(nodes=2)), patience=0.0)
