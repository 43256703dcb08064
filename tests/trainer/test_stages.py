"""The stage runner: what is skipped, what is repeated, and what a stage leaves when it is interrupted or fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stage_work import Work, diamond

from trainer.pipeline.stages import Cancelled, StageContext, fingerprints


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(tmp_path)


class TestSkipping:
    def test_unchanged_stages_are_skipped(self, work: Work) -> None:
        assert sorted(work.run(*diamond(work))) == ["a", "b", "c", "d", "e"]
        assert work.run(*diamond(work)) == []
        assert work.manifest("d")["status"] == "done"

    @pytest.mark.parametrize(
        ("changed", "expected"), [("a", "abcd"), ("b", "bd"), ("c", "cd"), ("d", "d"), ("e", "e"), ("none", "")]
    )
    def test_a_change_reruns_the_stage_and_what_depends_on_it(self, work: Work, changed: str, expected: str) -> None:
        work.run(*diamond(work))
        assert "".join(sorted(work.run(*diamond(work, **{changed: 1})))) == expected

    def test_order(self, work: Work) -> None:
        ran = work.run(*diamond(work), parallel=2)
        assert (
            ran.index("a") < min(ran.index("b"), ran.index("c")) <= max(ran.index("b"), ran.index("c")) < ran.index("d")
        )

    def test_a_missing_output_is_made_again(self, work: Work) -> None:
        work.run(*diamond(work))
        (work.folder / "b.txt").unlink()
        assert work.run(*diamond(work)) == ["b"]
        assert (work.folder / "b.txt").read_text() == "b"

    @pytest.mark.parametrize("damage", [None, "", "{", "\0\0"])
    def test_a_lost_or_broken_manifest_is_a_stage_not_done(self, work: Work, damage: str | None) -> None:
        work.run(*diamond(work))
        path = work.folder / "stages" / "e.json"
        path.unlink() if damage is None else path.write_text(damage)
        assert work.run(*diamond(work)) == ["e"]

    def test_going_back_to_old_inputs_runs_again(self, work: Work) -> None:
        """The outputs are the newer inputs', whatever an older manifest said."""
        work.run(*diamond(work))
        work.run(*diamond(work, e=1))
        assert work.run(*diamond(work)) == ["e"]


class TestFingerprints:
    def test_cover_name_inputs_and_everything_before(self, work: Work) -> None:
        base = fingerprints(diamond(work))
        assert len(set(base.values())) == 5
        changed = fingerprints(diamond(work, a={"x": [1]}))
        assert {name for name in base if base[name] != changed[name]} == set("abcd")

    def test_do_not_depend_on_the_order_of_keys(self, work: Work) -> None:
        one, other = ({"x": 1, "y": 2}, {"y": 2, "x": 1})
        assert fingerprints([work.stage("a", one)]) == fingerprints([work.stage("a", other)])
        assert fingerprints([work.stage("a", {"x": 1})]) != fingerprints([work.stage("a", {"x": 2})])


class TestInterruption:
    def interrupted(self, work: Work, inputs: Any) -> None:
        """Leaves a stage cut off in the middle, its output half there."""

        def half(context: StageContext) -> None:
            (work.folder / "out").mkdir()
            (work.folder / "out" / "part").write_text("half")
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            work.run(work.stage("s", inputs, run=half, output="out"))
        assert work.manifest("s")["status"] == "running"

    def finish(self, work: Work, seen: list[bool]) -> Callable[[StageContext], None]:
        def whole(context: StageContext) -> None:
            seen.append((work.folder / "out" / "part").exists())
            (work.folder / "out").mkdir(exist_ok=True)

        return whole

    @pytest.mark.parametrize(("inputs", "kept"), [(1, True), (2, False)])
    def test_partial_outputs_are_kept_for_the_same_inputs_only(self, work: Work, inputs: int, kept: bool) -> None:
        self.interrupted(work, 1)
        seen: list[bool] = []
        work.run(work.stage("s", inputs, run=self.finish(work, seen), output="out"))
        assert seen == [kept]
        assert work.manifest("s")["status"] == "done"

    def test_outputs_without_a_manifest_belong_to_nobody(self, work: Work) -> None:
        (work.folder / "out").mkdir()
        (work.folder / "out" / "part").write_text("from elsewhere")
        seen: list[bool] = []
        work.run(work.stage("s", 1, run=self.finish(work, seen), output="out"), overwrite=True)
        assert seen == [False]

    def test_a_finished_stage_with_new_inputs_starts_clean(self, work: Work) -> None:
        seen: list[bool] = []
        work.run(work.stage("s", 1, run=self.finish(work, seen), output="out"))
        (work.folder / "out" / "part").write_text("old")
        work.run(work.stage("s", 2, run=self.finish(work, seen), output="out"))
        assert seen == [False, False]

    def test_times_survive_a_kill(self, work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing is written when a process is killed: what its stage reported before is there."""
        clock = [100.0]
        monkeypatch.setattr("trainer.pipeline.stages.time.monotonic", lambda: clock[0])
        seen: list[float] = []

        def killed(context: StageContext) -> None:
            for clock[0] in (159.0, 161.0, 162.0):
                context.report(0, 2, "step")
                seen.append(work.manifest("s")["seconds"])
            monkeypatch.setattr("trainer.pipeline.stages.write_json", lambda *_: None)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            work.run(work.stage("s", run=killed))
        monkeypatch.undo()
        assert seen == [0.0, 61.0, 61.0]  # written once a minute
        left = work.manifest("s")
        assert (left["status"], "ended" in left) == ("running", False)
        time.sleep(0.01)
        work.run(work.stage("s"))
        done = work.manifest("s")
        assert 61.0 <= done["seconds"] < 91.0
        assert done["started"] == left["started"] < done["ended"]

    def test_stages_started_in_the_same_second_are_in_order(self, work: Work) -> None:
        names = ["c", "b", "a"]
        work.run(*(work.stage(name, run=lambda _: time.sleep(0.002)) for name in names))
        starts = [work.manifest(name)["started"] for name in names]
        assert starts == sorted(set(starts))
        assert all(work.manifest(name)["ended"] > work.manifest(name)["started"] for name in names)

    def test_seconds_add_up_over_attempts(self, work: Work) -> None:
        def slow_then_killed(context: StageContext) -> None:
            time.sleep(0.05)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            work.run(work.stage("s", run=slow_then_killed))
        first = work.manifest("s")["seconds"]
        work.run(work.stage("s"))
        assert work.manifest("s")["seconds"] >= first >= 0.05


class TestParallel:
    @pytest.mark.parametrize("parallel", [1, 2, 3])
    def test_the_limit_is_reached_and_kept(self, work: Work, parallel: int) -> None:
        """`parallel` stages wait for each other, so fewer at once would never end; more would be counted."""
        together = threading.Barrier(parallel)
        lock = threading.Lock()
        running: list[int] = []
        most: list[int] = []

        def body(context: StageContext) -> None:
            with lock:
                running.append(context.slot)
                assert sorted(set(running)) == sorted(running), "two stages share a slot"
                assert set(running) <= set(range(parallel))
                most.append(len(running))
            together.wait(timeout=30)
            time.sleep(0.01)
            with lock:
                running.remove(context.slot)
            (work.folder / f"{context.name}.txt").touch()

        names = [f"s{number}" for number in range(2 * parallel)]
        assert sorted(work.run(*(work.stage(name, run=body) for name in names), parallel=parallel)) == names
        assert max(most) == parallel


class TestFailure:
    def test_the_first_failure_is_raised_and_what_is_done_stays_done(self, work: Work) -> None:
        def fail(context: StageContext) -> None:
            raise ValueError("out of luck")

        graph = [
            work.stage("before"),
            work.stage("bad", needs=("before",), run=fail),
            work.stage("after", needs=("bad",)),
        ]
        with pytest.raises(ValueError, match="out of luck"):
            work.run(*graph)
        assert work.ran == ["before", "bad"]
        assert work.manifest("bad")["status"] == "running"
        assert not (work.folder / "stages" / "after.json").exists()
        graph[1] = work.stage("bad", needs=("before",))
        assert work.run(*graph) == ["bad", "after"]

    def test_the_others_are_told_to_stop(self, work: Work) -> None:
        started = threading.Event()
        stopped: list[str] = []

        def endless(context: StageContext) -> None:
            started.set()
            try:
                for step in range(3000):
                    context.report(step, 3000, "step")
                    time.sleep(0.01)
            except Cancelled:
                stopped.append(context.name)
                raise

        def fail(context: StageContext) -> None:
            assert started.wait(30)
            raise ValueError("out of luck")

        stages = [work.stage("long", run=endless), work.stage("bad", run=fail), work.stage("never")]
        with pytest.raises(ValueError, match="out of luck"):
            work.run(*stages, parallel=2)
        assert stopped == ["long"]
        assert "never" not in work.ran
        assert work.manifest("long")["status"] == "running"


class TestManifests:
    def test_nothing_partial_is_left(self, work: Work) -> None:
        work.run(*diamond(work))
        assert sorted(path.name for path in (work.folder / "stages").iterdir()) == [f"{name}.json" for name in "abcde"]
        found = work.manifest("a")
        assert (found["stage"], found["fingerprint"]) == ("a", fingerprints(diamond(work))["a"])

    def test_running_is_written_before_the_work_starts(self, work: Work) -> None:
        seen: list[str] = []

        def look(context: StageContext) -> None:
            seen.append(work.manifest("s")["status"])
            (work.folder / "s.txt").touch()

        work.run(work.stage("s", run=look))
        assert seen == ["running"]
