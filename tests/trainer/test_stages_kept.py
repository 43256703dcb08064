"""The stage runner: what is deleted only if asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from stage_work import Work

from trainer.errors import UserError
from trainer.files import write_json
from trainer.pipeline.stages import Cancelled, Stage, StageContext


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(tmp_path)


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

    @pytest.mark.parametrize("begun", [False, True])
    def test_what_no_stage_has_made_is_left_alone(self, work: Work, begun: bool) -> None:
        """Nor in a run that has come as far as another stage, with which a new comparison finds its folder taken."""
        if begun:
            work.run(self.graph(work)[0])
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
