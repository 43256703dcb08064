"""A small synthetic run directory for the report's tests, and a parser of the page made from it."""

from __future__ import annotations

import json
from html.parser import HTMLParser

from PIL import Image

from trainer.report import build_report

HOSTILE = '<script>alert("x")</script><img src="https://example.org/x.png">'
LABELS = {"captions": "CIDEr", "questions": "EM", "boxes": "IoU@0.5"}
METRICS = {"captions": "cider", "questions": "exact_match", "boxes": "accuracy_iou"}
TASKS = list(LABELS)
VALUES = {
    "STL": {"captions": 0.50, "questions": 40.0, "boxes": 20.0},
    "EW": {"captions": 0.60, "questions": 44.0, "boxes": 19.0},
    "CoTBal": {"captions": 0.55, "questions": 50.0, "boxes": 25.0},
}
ERRORS = {
    "STL": {"captions": 0.01, "questions": 2.0, "boxes": 2.0},
    "EW": {"captions": 0.02, "questions": 1.5, "boxes": 2.0},
    "CoTBal": {"captions": 0.03, "questions": 2.0, "boxes": 3.0},
}
SAMPLING_ERRORS = {
    "CoTBal": {"delta_i": 7.5, "per_task": {"captions": 9.25, "questions": 8.5, "boxes": None}},
    "EW": {"delta_i": 6.25, "per_task": {"captions": 4.5, "questions": 3.25, "boxes": 2.75}, "behind_final": 4.75},
}
# CoTBal's margins over the majority in standard errors: captions 1.7, questions exactly 2, boxes 5.
MAJORITY = {"captions": 0.50, "questions": 46.0, "boxes": 10.0}
QUESTION_ONLY = {"captions": 0.40, "questions": 30.0, "boxes": 24.0}
V_MINI = {"captions": 0.2, "questions": 20.0, "boxes": 5.0}
V_FULL = {
    "captions": {"captions": 0.4, "questions": 25.0, "boxes": 4.0},
    "questions": {"captions": 0.3, "questions": 40.0, "boxes": 7.5},
    "boxes": {"captions": 0.2, "questions": 30.0, "boxes": 15.0},
}
LAMBDAS = {
    "lambda_one2all": [1.1, 0.9, 1.0],
    "lambda_all2one": [0.7, 1.2, 1.1],
    "lambda_c": [0.9, 1.05, 1.05],
    "lambda_d": [0.8, 1.0, 1.2],
    "weights": [0.85, 1.025, 1.125],
}


PIECES = ["config.yaml", "environment.json", "tasks.json", "scores.json", "weights.json", "results.json"]


class Page(HTMLParser):
    """Text of every table cell by table id, all tags with attributes, and a check that tags are balanced."""

    VOID = ("meta", "img", "wbr", "br", "link", "input")

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.html = html
        self.tags, self.tables, self.stack, self.text = [], {}, [], []
        self.table = self.cell = None
        self.feed(html)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)
        if tag == "table":
            self.table = self.tables.setdefault(dict(attrs).get("id"), [])
        elif tag == "tr":
            self.table.append([])
        elif tag in ("td", "th"):
            self.cell = []

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag, f"</{tag}> closes something else"
        if tag in ("td", "th"):
            self.table[-1].append(" ".join("".join(self.cell).split()))
            self.cell = None

    def handle_data(self, data):
        if self.cell is not None:
            self.cell.append(data)
        if not self.stack or self.stack[-1] != "style":
            self.text.append(data)

    def row(self, table, name):
        (found,) = [row for row in self.tables[table] if row and row[0].startswith(name)]
        return found

    @property
    def words(self):
        return " ".join("".join(self.text).split())


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def nested(table):
    return {task: {LABELS[task]: value} for task, value in table.items()}


def prediction(k, task):
    right = k % 2 == 0
    answer = "[0.10,0.10,0.60,0.60]" if task == "boxes" else f"answer {k}"
    wrong = "[0.70,0.70,0.90,0.90]" if task == "boxes" else HOSTILE
    return {
        "id": f"{task}-{k}",
        "image": f"{k % 3}.png",
        "question": f"question {k}?",
        "references": [answer],
        "prediction": answer if right else wrong,
        "score": 100.0 * right if task != "captions" else k / 4,
    }


def make_run(path):
    """A finished run of three tasks and an auxiliary one, written by hand."""
    for k, color in enumerate(["red", "green", "blue"]):
        (path / "images").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), color).save(path / "images" / f"{k}.png")
    rows = [
        {
            "name": task,
            "metric": METRICS[task],
            "auxiliary": False,
            "train_records": 3000,
            "validation_records": 100,
            "test_records": 8,
            "image_root": str(path / "images"),
            "description": f"about {task}",
            "sources": [{"name": "Shared set", "author": "A & B", "licence": "CC0"}],
        }
        for task in TASKS
    ]
    rows.append({"name": "chat", "metric": None, "auxiliary": True, "train_records": 5, "image_root": "."})
    write(path / "tasks.json", {"tasks": rows})
    write(path / "config.yaml", "tasks:\n- name: captions  # a < b\nseed: 7\n")
    write(path / "environment.json", {"python": "3.11", "torch": "2.13", "device": "cpu", "world_size": 2})
    write(path / "scores.json", {"tasks": TASKS, "mini": V_MINI, "full": V_FULL})
    contribution = [[(V_FULL[i][j] - V_MINI[j]) / (V_FULL[j][j] - V_MINI[j]) for j in TASKS] for i in TASKS]
    difficulty = [1 - V_MINI[j] / V_FULL[j][j] for j in TASKS]
    write(
        path / "weights.json",
        {
            "tasks": TASKS, "temperature": 0.5, "alpha": 0.5, "contribution": contribution,
            "difficulty": difficulty, **LAMBDAS, "clipped": [], "warnings": [],
            "sampling_errors": {
                "contribution": [[0.11, 0.12, 0.13], [0.21, 0.22, 0.23], [0.31, 0.32, 0.33]],
                "difficulty": [0.041, 0.042, 0.043], "applied": [0.151, 0.152, 0.153],
            },
        },
    )  # fmt: skip
    write(
        path / "results.json",
        {
            "tasks": {task: {LABELS[task]: "higher"} for task in TASKS},
            "baseline": nested(VALUES["STL"]),
            "methods": {"CoTBal": nested(VALUES["CoTBal"]), "EW": nested(VALUES["EW"])},
            "standard_errors": {name: nested(table) for name, table in ERRORS.items()},
            "sampling_errors": SAMPLING_ERRORS,
            "baselines": {"majority": nested(MAJORITY), "question_only": nested(QUESTION_ONLY)},
        },
    )
    for name in ("ew", "cotbal", *(f"stl-{task}" for task in TASKS)):
        tasks = [*TASKS, "chat"] if not name.startswith("stl-") else [name.removeprefix("stl-")]
        lines = [
            {"step": s, "steps": 10, "tasks": {t: {"loss": 3 / s, "tokens": 9, "weight": 1.0} for t in tasks}}
            for s in range(1, 11)
        ]
        write(path / f"trainings/{name}/log.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    for task in TASKS:
        lines = [json.dumps(prediction(k, task)) for k in range(8)]
        write(path / f"evaluations/cotbal/test/{task}.jsonl", "\n".join(lines) + "\n")
    for name in ("mini", *(f"plus-{task}" for task in TASKS)):
        metrics = {task: {"metric": LABELS[task], "value": 0, "standard_error": 1.25, "samples": 9} for task in TASKS}
        write(path / f"evaluations/{name}/validation/metrics.json", metrics)
    times = [("weights", 0.0, 4.25), ("train-mini", 0.25, 75.0), ("data", 0.5, 3700.0)]
    for stage, began, seconds in times:
        started, ended = (
            f"2026-01-01T{int(at // 3600):02d}:{int(at // 60) % 60:02d}:{at % 60:06.3f}"
            for at in (began, began + seconds)
        )
        manifest = {"stage": stage, "started": started, "ended": ended, "seconds": seconds, "status": "done"}
        write(path / f"stages/{stage}.json", manifest)
    return path


def page(run):
    return Page(build_report(run).read_text())
