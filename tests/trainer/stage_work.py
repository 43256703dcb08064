"""Stages that note when they run, for the tests of their runner."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.pipeline.progress import Progress
from trainer.pipeline.stages import Stage, StageContext, StageRunner


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


def diamond(work: Work, **inputs: Any) -> list[Stage]:
    """a before b and c, both before d; e on its own."""
    needs = {"a": (), "b": ("a",), "c": ("a",), "d": ("b", "c"), "e": ()}
    return [work.stage(name, inputs.get(name), need) for name, need in needs.items()]
