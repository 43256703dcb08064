"""Metrics of predictions, with or without the model that made them at hand."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.evaluation.spec import EvaluationSet
from trainer.files import known
from trainer.metrics import Bleu, Cider, MetricResult, get_metric, perplexity, takes_losses
from trainer.parsing import number

Row = dict[str, Any]


def compute(metric: str, rows: Sequence[Row]) -> MetricResult:
    """A metric of predictions: of ``prediction`` and ``references``, or of ``loss_sum`` and ``tokens``.

    Blanks at the ends of predictions and references, such as the indentation of code, count in no metric.
    """
    if takes_losses(metric):
        return perplexity([row["loss_sum"] for row in rows], [row["tokens"] for row in rows])
    predictions = [row["prediction"].strip() for row in rows]
    references = [[answer.strip() for answer in row["references"]] for row in rows]
    return get_metric(metric).compute(predictions, references)


def images_of(rows: Sequence[Row]) -> list[str | None]:
    """The image that each prediction is about, whose samples are not independent of each other; None without one."""
    return [image if isinstance(image := row.get("image"), str) and image else None for row in rows]


def entry(metric: str, result: MetricResult, images: Sequence[str | None]) -> dict[str, Any]:
    """A metric's value as a JSON object; null for an infinite perplexity, and for the standard error of one sample, or
    of samples that are all of one of the `images`."""
    return {
        "metric": get_metric(metric).label,
        "value": known(result.value),
        "standard_error": known(result.of_groups(images).standard_error),
        "samples": len(result.per_sample),
    }


def check_references(metrics: Sequence[str], references: Mapping[str, Sequence[str]], title: str) -> list[str]:
    """Looks for correct answers that a metric cannot count, before a model answers anything.

    Not for CIDEr and BLEU, which are of a whole set, and perplexity, which takes no answers.

    Args:
        references: the correct answers by sample, under the name that errors call it.
        title: what errors start with.

    Returns:
        A sentence for each sample in which nothing can be right: its correct answers score 0 themselves.

    Raises:
        UserError: a metric refuses a sample's answers, or nothing can be right in any sample.
    """
    lost: list[str] = []
    for name in metrics:
        metric = get_metric(name)
        if takes_losses(name) or isinstance(metric, (Bleu, Cider)):
            continue
        own: list[str] = []
        for sample, answers in references.items():
            try:
                right = any(metric.compute([answer], [answers]).value > 0 for answer in answers)
            except UserError as error:
                raise UserError(f"{title}: {sample}: {error}") from error
            if not right:
                own.append(f"{title}: {sample}: its correct answer {answers[0]!r} itself scores 0 under {name}")
        if own and len(own) == len(references):
            raise UserError(f"{own[0]}, and so do all others; docs/data.md says what {name} takes")
        lost += own
    return lost


def score_name(part: str, metric: str) -> str:
    """What tables call a score: the metric's label, with the test set's name before it where the set has one."""
    label = get_metric(metric).label
    return f"{part} {label}" if part else label


def score_key(chosen: EvaluationSet, metric: str) -> str:
    """The key of a score in ``metrics.json``: ``TASK``, or ``TASK SCORE`` where a task has several scores or sets."""
    alone = not chosen.part and len(chosen.metrics) == 1
    return chosen.name if alone else f"{chosen.name} {score_name(chosen.part, metric)}"


def scores_by_task(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """``metrics.json`` of tasks as ``{task: {score: entry}}``."""
    found: dict[str, dict[str, Any]] = {}
    for key, score in metrics.items():
        task, _, name = key.partition(" ")  # the name of a task has no space
        found.setdefault(task, {})[name or str(score.get("metric"))] = score
    return found


def score_file(path: Path, metrics: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``{metric: entry}`` for a file of predictions from anywhere.

    Raises:
        UserError: an unknown metric, or a line that it cannot be computed from, named by its number.
    """
    losses = {name: takes_losses(name) for name in metrics}
    rows = read_predictions(path, answers=not all(losses.values()), losses=any(losses.values()))
    if not all(losses.values()):
        answers = {f"prediction {number}": row["references"] for number, row in enumerate(rows, 1)}
        check_references(metrics, answers, str(path))
    images = images_of(rows)
    return {name: entry(name, compute(name, rows), images) for name in losses}


def read_predictions(path: Path, answers: bool = True, losses: bool = False) -> list[Row]:
    """Rows of a JSONL file of predictions; fields that are not asked for are not looked at.

    Args:
        answers: rows need ``prediction``, a string, and ``references``, a list of at least one string.
        losses: rows need ``loss_sum``, a number of at least 0 (nats), and ``tokens``, an integer of at least 1.

    Raises:
        UserError: the file is missing or empty, or a line is malformed or repeats an ``id``.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"predictions {path} cannot be read: {error.strerror}") from error
    rows: list[Row] = []
    seen: dict[str, int] = {}
    for place, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {place}"
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected an object, got {type(row).__name__}")
        _check(row, where, answers, losses)
        if "id" in row:
            first = seen.setdefault(str(row["id"]), place)
            if first != place:
                raise UserError(f"{where}: id '{row['id']}' is already on line {first}; it would count twice")
        rows.append(row)
    if not rows:
        raise UserError(f"predictions {path} has no lines to score")
    return rows


def _check(row: Row, where: str, answers: bool, losses: bool) -> None:
    if answers:
        _need(row, "prediction", isinstance(row.get("prediction"), str), "a string", where)
        references = row.get("references")
        texts = isinstance(references, list) and references and all(isinstance(text, str) for text in references)
        _need(row, "references", bool(texts), "a list of at least one string", where)
    if losses:
        total, tokens = row.get("loss_sum"), row.get("tokens")
        known_sum = total if total == math.inf else number(total)
        _need(
            row,
            "loss_sum",
            known_sum is not None and known_sum >= 0,
            "the sum of -ln p over the answer's tokens, at least 0",
            where,
        )
        right = isinstance(tokens, int) and number(tokens) is not None and tokens >= 1
        _need(row, "tokens", right, "how many tokens that sum has, at least 1", where)


def _need(row: Row, key: str, right: bool, wanted: str, where: str) -> None:
    if key not in row:
        found = ", ".join(map(str, row)) or "nothing"
        raise UserError(f"{where}: there is no '{key}' ({wanted}); the line has {found}")
    if not right:
        raise UserError(f"{where}: '{key}' must be {wanted}, got {row[key]!r}")
