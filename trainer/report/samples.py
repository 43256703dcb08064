"""Sample predictions of the report, with their images inside the page."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image

from trainer.data.pictures import open_image
from trainer.metrics import METRICS, normalize_answer, parse_box
from trainer.parsing import number
from trainer.report.run_directory import RunDirectory, test_sets
from trainer.report.tables import format_value, metric_label

PER_TASK = 4
LONGEST_TEXT = 400
LONGEST_SIDE = 320
# By these an answer is right or wrong; other metrics grade it, as VQA accuracy does by how many annotators agree.
RIGHT_OR_WRONG = {
    METRICS[name].label for name in ("exact_match", "accuracy_iou", "gqa_accuracy", "chartqa_strict", "chartqa_relaxed")
}
LOSSES = METRICS["perplexity"].label  # of given answers: there is no prediction, and no right or wrong


def sample_groups(run: RunDirectory, training: str) -> list[dict[str, Any]]:
    """Per task: a few predictions of one model on its first test set, right and wrong ones alike where both exist."""
    groups = []
    for task in run.tasks:
        if task.get("auxiliary"):
            continue
        part = next(iter(test_sets(task)))
        rows = run.predictions(training, "test", task["name"], part)
        if not rows:
            continue
        metrics = task.get("test_metrics")
        label = metric_label(metrics[0] if isinstance(metrics, list) and metrics else task.get("metric"))
        root = Path(str(task.get("image_root") or "."))
        roots = [root] if root.is_absolute() else [root, run.path / root]
        groups.append(
            {
                "task": task["name"],
                "part": part,
                "metric": label,
                "description": task.get("description"),
                "total": len(rows),
                "samples": [_sample(row, roots, label) for row in choose(rows, label)],
            }
        )
    return groups


def choose(rows: list[dict[str, Any]], label: str) -> list[dict[str, Any]]:
    """For a graded metric four across the range of scores; otherwise two right and two wrong, evenly spread."""
    if _graded(label):
        ranked = sorted(rows, key=lambda row: -(number(row.get("score")) or 0.0))
        return _spread(ranked, PER_TASK)
    right = [row for row in rows if (number(row.get("score")) or 0.0) > 0]
    wrong = [row for row in rows if (number(row.get("score")) or 0.0) <= 0]
    half = PER_TASK // 2
    few_right, few_wrong = max(half, PER_TASK - len(wrong)), max(half, PER_TASK - len(right))
    return _spread(right, few_right) + _spread(wrong, few_wrong)


def _graded(label: str) -> bool:
    return label not in RIGHT_OR_WRONG


def _spread(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    if len(rows) <= count:
        return rows
    # Middles of equal parts: neither the very first nor the very last, which tend to be odd.
    return [rows[(2 * k + 1) * len(rows) // (2 * count)] for k in range(count)]


def _sample(row: dict[str, Any], roots: list[Path], label: str) -> dict[str, Any]:
    prediction = str(row.get("prediction", ""))
    references = [str(reference) for reference in row.get("references") or []]
    score = number(row.get("score"))
    graded = _graded(label)
    right = (
        label != LOSSES and normalize_answer(prediction) in {normalize_answer(reference) for reference in references}
        if graded
        else (score or 0.0) > 0
    )
    question = str(row.get("question", ""))
    picture = _picture(row.get("image"), roots)
    boxes = [("asked", question)]
    if label.startswith("IoU"):
        boxes = [("reference", text) for text in references[:1]] + [("predicted", prediction)]
    return {
        **picture,
        "question": _shorten(question),
        "prediction": _shorten(prediction.strip()) if label != LOSSES else None,
        "references": [_shorten(reference) for reference in references[:3]],
        "more_references": max(0, len(references) - 3),
        "right": right,
        "graded": graded,
        "score": format_value(score, label) if graded else None,
        "boxes": _rectangles(boxes) if picture.get("square") else [],
    }


def _rectangles(boxes: list[tuple[str, str]]) -> list[dict[str, Any]]:
    rectangles = []
    for kind, text in boxes:
        box = parse_box(text)
        if box is None:
            continue
        x1, y1, x2, y2 = (min(1.0, max(0.0, side)) * 100 for side in box)
        rectangles.append({"kind": kind, "x": x1, "y": y1, "width": x2 - x1, "height": y2 - y1})
    return rectangles


def _shorten(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " …"


def _picture(image: Any, roots: list[Path]) -> dict[str, Any]:
    """The image as a data URI, scaled down when it is large, or the reason why it is not shown."""
    if not image:
        return {"image": None, "note": "no image"}
    candidates = [root / str(image) for root in roots]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        return {"image": None, "note": f"image {image} not found"}
    try:
        picture = open_image(file)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return {"image": None, "note": f"image {image} cannot be read"}
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    encoded = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 85})):
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        encoded.append((len(buffer.getvalue()), kind, base64.b64encode(buffer.getvalue()).decode()))
    _, kind, data = min(encoded)
    square = abs(picture.width - picture.height) <= 1  # where every box convention means the same
    return {"image": f"data:image/{kind};base64,{data}", "square": square, "note": None}
