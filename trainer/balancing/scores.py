"""The score table that CoTBal's weights are computed from (``SCORES.json``), validated on the way in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError, nearest
from trainer.parsing import number


@dataclass(frozen=True)
class Scores:
    """Validation scores of the mini model and of the N proxies.

    ``mini[j]`` is V_j(mini) and ``full[i, j]`` is V_j(i+mini), both in the order of ``tasks``;
    ``higher_is_better[j]`` is the direction of task j's metric. ``alone_mini[j]`` and ``alone_full[j]`` are V_j of the
    models trained on the mini and on all data of task j and nothing else, for the precise difficulty; both or none.
    """

    tasks: tuple[str, ...]
    mini: NDArray[np.float64]
    full: NDArray[np.float64]
    higher_is_better: NDArray[np.bool_]
    alone_mini: NDArray[np.float64] | None = None
    alone_full: NDArray[np.float64] | None = None

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> Scores:
        """Read ``{"tasks": [...], "mini": {task: V}, "full": {trained_on: {task: V}}}``.

        ``"higher_is_better": {task: bool}`` is optional and true for tasks it does not name. ``"alone": {"mini": {task:
        V}, "full": {task: V}}`` is optional: models of one task alone.

        Raises:
            UserError: naming the task, pair or entry that is missing, unknown or not a finite number.
        """
        _check_keys(
            "scores", table, required=("tasks", "mini", "full"), allowed=("higher_is_better", "alone"), kind="key"
        )
        tasks = table["tasks"]
        if (
            isinstance(tasks, str | Mapping)
            or not isinstance(tasks, Iterable)
            or not (tasks := list(tasks))
            or not all(isinstance(task, str) and task for task in tasks)
        ):
            raise UserError(f"scores['tasks'] must be a non-empty list of names, got {table['tasks']!r}")
        repeated = sorted({task for task in tasks if tasks.count(task) > 1})
        if repeated:
            raise UserError(f"scores['tasks'] lists {repeated[0]!r} more than once")

        directions = table.get("higher_is_better", {})
        _check_keys("scores['higher_is_better']", directions, required=(), allowed=tasks)
        for task, value in directions.items():
            if not isinstance(value, bool):
                raise UserError(f"scores['higher_is_better'][{task!r}] must be true or false, got {value!r}")
        _check_keys("scores['full']", table["full"], required=tasks)
        alone: list[NDArray[np.float64]] = []
        if "alone" in table:
            _check_keys("scores['alone']", table["alone"], required=("mini", "full"), kind="key")
            alone = [_row(f"scores['alone'][{key!r}]", table["alone"][key], tasks) for key in ("mini", "full")]
        return cls(
            tuple(tasks),
            _row("scores['mini']", table["mini"], tasks),
            np.stack([_row(f"scores['full'][{i!r}]", table["full"][i], tasks) for i in tasks]),
            np.array([directions.get(task, True) for task in tasks], dtype=bool),
            *alone,
        )

    def to_json(self) -> dict[str, Any]:
        """The table again; ``from_json`` of it gives the same scores."""

        def row(values: NDArray[Any]) -> dict[str, Any]:
            return dict(zip(self.tasks, values.tolist(), strict=True))

        table = {
            "tasks": list(self.tasks),
            "mini": row(self.mini),
            "full": {task: row(self.full[i]) for i, task in enumerate(self.tasks)},
            "higher_is_better": row(self.higher_is_better),
        }
        if self.alone_mini is not None and self.alone_full is not None:
            table["alone"] = {"mini": row(self.alone_mini), "full": row(self.alone_full)}
        return table


def _row(where: str, values: Any, tasks: list[str]) -> NDArray[np.float64]:
    _check_keys(where, values, required=tasks)
    for task in tasks:
        if number(values[task]) is None:
            raise UserError(f"{where}[{task!r}] must be a finite number, got {values[task]!r}")
    return np.array([values[task] for task in tasks], dtype=np.float64)


def _check_keys(
    where: str, table: Any, required: Iterable[str], allowed: Iterable[str] = (), kind: str = "task"
) -> None:
    if not isinstance(table, Mapping):
        raise UserError(f"{where} must be an object, got {table!r}")
    required, known = list(required), [*required, *allowed]
    for key in required:
        if key not in table:
            raise UserError(f"{where} has no entry for {kind} {key!r}")
    for key in table:
        if key not in known:
            raise UserError(f"{where} has an unknown {kind} {key!r}{nearest(str(key), known)}")
