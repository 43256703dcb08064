"""The stage runner: what is skipped, what is repeated, what is kept and what is deleted."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import UserError
from trainer.files import write_json
from trainer.pipeline.progress import Progress
from trainer.pipeline.stages import Cancelled, Stage, StageContext, StageRunner, fingerprints


class Silent(Progress):
    """No output, and a record of what was said to have finished."""

    def __init__(self) -> None:
        super().__init__()
        self.finished: list[str] = []

    def say(self, text: str) -> None: ...

    def finish(self, name: str, seconds: float) -> None:
        self.finished.append(name)


class Work:
    """Stages that note when they run. By default a stage writes its name into ``<name>.txt``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ran: list[str] = []

    def stage(
        self,
        name: str,
        inputs: Any = None,
        needs: tuple[str, ...] = (),
        run: Callable[[StageContext], None] | None = None,
        output: str | None = None,
        **options: Any,
    ) -> Stage:
        path = self.folder / (output or f"{name}.txt")

        def body(context: StageContext) -> None:
            self.ran.append(name)
            if run:
                run(context)
            else:
                path.write_text(name)

        return Stage(name, inputs, needs, (path,), body, **options)

    def runner(self, *stages: Stage, parallel: int = 1) -> StageRunner:
        return StageRunner(self.folder / "stages", stages, parallel, Silent())

    def run(self, *stages: Stage, parallel: int = 1, overwrite: bool = False) -> list[str]:
        """Runs the graph and returns the names of the stages that ran."""
        self.ran.clear()
        self.runner(*stages, parallel=parallel).run(overwrite)
        return list(self.ran)

    def manifest(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / "stages" / f"{name}.json").read_text())


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(tmp_path)


def diamond(work: Work, **inputs: Any) -> list[Stage]:
    """a before b and c, both before d; e on its own."""
    needs = {"a": (), "b": ("a",), "c": ("a",), "d": ("b", "c"), "e": ()}
    return [work.stage(name, inputs.get(name), need) for name, need in needs.items()]


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


class TestCostlyStages:
    """Finished outputs of other inputs are not deleted unasked, and neither is what no stage has made."""

    def graph(self, work: Work, **inputs: Any) -> list[Stage]:
        log = work.folder / "b.log"
        return [
            work.stage("a", inputs.get("a")),
            work.stage("b", inputs.get("b"), costly=True, leaves=(log,), after=("a",)),
            work.stage("c", inputs.get("c"), ("b",), costly=True),
            work.stage("d", inputs.get("d"), ("c",)),
        ]

    def test_order_alone_is_no_dependence(self, work: Work) -> None:
        ran = work.run(*self.graph(work))
        assert ran.index("a") < ran.index("b")
        assert work.run(*self.graph(work, a=1)) == ["a"]

    def test_refused_then_asked_for(self, work: Work) -> None:
        work.run(*self.graph(work))
        (work.folder / "b.log").write_text("old")
        changed = self.graph(work, b=1)
        runner = work.runner(*changed)
        assert runner.summary().splitlines() == [
            "1 of 4 stages are finished",
            "done for other inputs (inputs null -> 1), and deleted by a run with --overwrite: b, c",
        ]
        with pytest.raises(UserError, match=r"does not fit .* \(inputs null -> 1\): b, c; --overwrite deletes it"):
            work.run(*changed)
        assert work.ran == []
        assert (work.folder / "b.txt").exists()
        assert work.run(*changed, overwrite=True) == ["b", "c", "d"]
        assert not (work.folder / "b.log").exists()

    @pytest.mark.parametrize(
        ("old", "new", "told"),
        [
            ({"x": {"rate": 0.5, "n": 1}}, {"x": {"rate": 1.0, "n": 1}}, "x.rate 0.5 -> 1.0"),
            ({"x": {"a": 1}}, {"y": "b"}, "x.a 1 -> nothing, y nothing -> b"),
            ([{"name": "t", "file": "1"}], [{"name": "t", "file": "2"}], "t.file 1 -> 2"),
            (
                {"r": [{"name": "t"}, {"name": "u"}]},
                {"r": [{"name": "u"}, {"name": "t"}]},
                'r ["t", "u"] -> ["u", "t"]',
            ),
            ({"format": 1, "x": 1}, {"format": 2, "x": [1]}, "made by another version of the trainer"),
            ({str(n): 0 for n in range(10)}, {}, ", ".join(f"{n} 0 -> nothing" for n in range(8)) + ", 2 more"),
        ],
    )
    def test_what_has_changed_is_said(self, work: Work, old: Any, new: Any, told: str) -> None:
        """Of what is lost and of all before it, once each; nothing else's changes."""
        work.run(*self.graph(work, a=1, b=old, d=1))
        graph = self.graph(work, a=2, b=new, d=2)
        with pytest.raises(UserError) as caught:
            work.run(*graph)
        assert f"or the model ({told}): b, c; --overwrite" in str(caught.value)
        manifest = work.folder / "stages" / "b.json"
        write_json(manifest, {key: value for key, value in work.manifest("b").items() if key != "inputs"})
        with pytest.raises(UserError, match=r"\(made by another version of the trainer\): b, c; "):
            work.run(*graph)

    def test_everything_outdated_is_gone_before_the_first_stage(self, work: Work) -> None:
        work.run(*self.graph(work))
        changed = self.graph(work, b=1)

        def look(context: StageContext) -> None:
            assert not (work.folder / "c.txt").exists()
            assert not (work.folder / "d.txt").exists()
            raise Cancelled

        stages = [changed[0], work.stage("b", 1, run=look, costly=True, after=("a",)), *changed[2:]]
        with pytest.raises(Cancelled):
            work.run(*stages, overwrite=True)
        assert not (work.folder / "stages" / "c.json").exists()

    def test_what_is_half_deleted_is_not_done(self, work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
        """--overwrite, interrupted when the mistake is seen, and the old configuration again."""

        def train(context: StageContext) -> None:
            (work.folder / "s").mkdir()
            for name in ("config.json", "model.safetensors"):
                (work.folder / "s" / name).write_text(name)

        def stage(rate: int) -> Stage:
            return work.stage("s", {"rate": rate}, run=train, output="s", costly=True)

        def interrupted(folder: Path) -> None:
            (folder / "model.safetensors").unlink()
            raise KeyboardInterrupt

        work.run(stage(1))
        with monkeypatch.context() as patched:
            patched.setattr("trainer.pipeline.stages.shutil.rmtree", interrupted)
            with pytest.raises(KeyboardInterrupt):
                work.run(stage(2), overwrite=True)
        assert work.run(stage(1)) == ["s"]
        assert sorted(path.name for path in (work.folder / "s").iterdir()) == ["config.json", "model.safetensors"]
        assert work.run(stage(1)) == []

    def test_cheap_ones_and_unfinished_ones_need_no_permission(self, work: Work) -> None:
        work.run(*self.graph(work))
        assert work.run(*self.graph(work, d=1)) == ["d"]
        manifest = work.folder / "stages" / "c.json"
        manifest.write_text(manifest.read_text().replace('"done"', '"running"'))
        assert work.run(*self.graph(work, c=1, d=1)) == ["c", "d"]

    def test_an_unfinished_one_with_a_checkpoint_does(self, work: Work) -> None:
        """Hours of a training are not to go because it starts again on another number of GPUs."""
        checkpoint = work.folder / "checkpoint"

        def train(context: StageContext) -> None:
            checkpoint.write_text("step 4500")
            raise KeyboardInterrupt

        def stage(ranks: int, run: Any = None) -> Stage:
            options = {"costly": True, "leaves": (checkpoint,), "half_done": checkpoint.exists}
            return work.stage("s", {"ranks": ranks}, run=run, **options)

        with pytest.raises(KeyboardInterrupt):
            work.run(stage(8, train))
        with pytest.raises(UserError, match=r"does not fit .* \(ranks 8 -> 16\): s; --overwrite deletes it"):
            work.run(stage(16))
        assert checkpoint.exists()
        assert work.run(stage(8)) == ["s"]
        assert checkpoint.exists()
        assert work.run(stage(16), overwrite=True) == ["s"]
        assert not checkpoint.exists()

    def test_what_no_stage_has_made_is_left_alone(self, work: Work) -> None:
        (work.folder / "b.txt").write_text("somebody's")
        assert work.runner(*self.graph(work)).summary().splitlines()[1:] == [
            f"not made by this run, and deleted by a run with --overwrite: {work.folder / 'b.txt'}"
        ]
        with pytest.raises(UserError, match=r"not made by this run, and in its way: .*/b\.txt; --overwrite"):
            work.run(*self.graph(work))
        assert (work.folder / "b.txt").read_text() == "somebody's"

    def test_in_a_new_run_no_stage_deletes_what_it_finds(self, work: Work) -> None:
        """Cheap ones too: a folder ``data`` beside which somebody starts a run."""
        (work.folder / "d.txt").write_text("somebody's")
        with pytest.raises(UserError, match=r"not made by this run, and in its way: .*/d\.txt; --overwrite"):
            work.run(*self.graph(work))
        assert (work.folder / "d.txt").read_text() == "somebody's"
        assert work.run(*self.graph(work), overwrite=True)[-1] == "d"

    def test_neither_is_what_lies_where_a_stage_may_leave_something(self, work: Work) -> None:
        """Until the stage has started once; what it left itself goes when it starts anew."""
        left = work.folder / "checkpoints"
        left.mkdir()
        (left / "somebody's").touch()
        stage = work.stage("a", costly=True, leaves=(left,))
        with pytest.raises(UserError, match=r"in its way: .*/checkpoints; --overwrite deletes it"):
            work.run(stage)
        assert (left / "somebody's").exists()
        assert work.run(stage, overwrite=True) == ["a"]
        assert not left.exists()
        left.mkdir()
        (work.folder / "a.txt").unlink()  # so that it is not done
        assert work.run(stage) == ["a"]
        assert not left.exists()


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

    def test_a_failed_write_leaves_the_old_content(self, tmp_path: Path) -> None:
        path = tmp_path / "deep" / "a.json"
        write_json(path, {"old": 1})
        with pytest.raises(TypeError):
            write_json(path, {"new": object()})
        assert json.loads(path.read_text()) == {"old": 1}
        assert [found.name for found in path.parent.iterdir()] == ["a.json"]

    def test_the_rename_is_what_makes_it_visible(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Killed just before the rename, the old file is whole."""
        path = tmp_path / "a.json"
        write_json(path, [1])

        def killed(self: Path, target: Path) -> Path:
            raise KeyboardInterrupt

        monkeypatch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_json(path, list(range(1000)))
        assert json.loads(path.read_text()) == [1]
