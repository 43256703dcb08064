"""``cotbal evaluate`` and ``cotbal score``: what they take, print, refuse and leave behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

from trainer.evaluation.ranks import RankProcesses
from trainer.task_config import TaskConfig

Command = Callable[..., Any]


class TestScore:
    @pytest.fixture
    def write(self, tmp_path: Path) -> Callable[..., Path]:
        def write(*lines: Any) -> Path:
            path = tmp_path / "p.jsonl"
            path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
            return path

        return write

    def test_predictions_from_elsewhere(self, cotbal: Command, write: Callable[..., Path]) -> None:
        """2 of 4 right: 50 %, and a standard error of sqrt(4 * 50^2 / 3) / sqrt(4) = 28.8675 by hand."""
        rows = [
            {"prediction": text, "references": [" red", "blue\n"], "model": "other"}
            for text in (" Red.\n", "blue\n", "x", "y")
        ]
        outcome = cotbal("score", write(rows[0], "", *rows[1:]), "--metric", "exact_match", "--metric", "gqa_accuracy")
        assert outcome.code == 0, outcome.err
        found = json.loads(outcome.out)
        assert list(found) == ["exact_match", "gqa_accuracy"]
        error = found["exact_match"].pop("standard_error")
        assert found["exact_match"] == {"metric": "EM", "value": 50.0, "samples": 4}
        assert error == pytest.approx(28.867513459481287, abs=1e-12)
        assert found["gqa_accuracy"]["value"] == 50.0  # which compares strings: blanks at the ends are off

    @pytest.mark.parametrize(("second", "expected"), [("b.png", 50.0), ("a.png", None), ({"bytes": ""}, 37.5)])
    def test_predictions_about_one_image(
        self, cotbal: Command, write: Callable[..., Path], second: Any, expected: float | None
    ) -> None:
        """a right twice, b wrong twice: sqrt(2 / 1 * (100^2 + 100^2)) / 4. All of one image tell nothing. What names no
        image is one of its own: groups of 2, 1 and 1 have sqrt(3 / 2 * (100^2 + 50^2 + 50^2)) / 4."""
        rows = [
            {"prediction": text, "references": ["red"], "image": image}
            for text, image in (("red", "a.png"), ("red", "a.png"), ("x", second), ("y", second))
        ]
        outcome = cotbal("score", write(*rows), "--metric", "exact_match")
        assert json.loads(outcome.out)["exact_match"]["standard_error"] == (expected and pytest.approx(expected))

    def test_a_byte_order_mark_is_no_damage(self, cotbal: Command, write: Callable[..., Path]) -> None:
        outcome = cotbal("score", write("\ufeff" + json.dumps(self.GOOD)), "--metric", "exact_match")
        assert json.loads(outcome.out)["exact_match"]["value"] == 100.0

    def test_losses(self, cotbal: Command, write: Callable[..., Path]) -> None:
        outcome = cotbal("score", write({"loss_sum": 3.0, "tokens": 2}), "--metric", "perplexity")
        assert json.loads(outcome.out)["perplexity"] == {
            "metric": "perplexity", "value": pytest.approx(4.4816890703380645), "standard_error": None, "samples": 1,
        }  # fmt: skip
        sure = cotbal("score", write({"loss_sum": 0, "tokens": 2}), "--metric", "perplexity")
        assert json.loads(sure.out)["perplexity"]["value"] == 1.0

    def test_an_infinite_perplexity_is_null(self, cotbal: Command, write: Callable[..., Path]) -> None:
        outcome = cotbal("score", write({"loss_sum": 1e6, "tokens": 2}), "--metric", "perplexity")
        assert '"value": null' in outcome.out

    GOOD = {"id": 1, "prediction": "a", "references": ["a"]}  # noqa: RUF012

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            ([GOOD, {"references": ["a"]}], "line 2: there is no 'prediction' (a string); the line has references"),
            ([GOOD, "", {"prediction": "a"}], "line 3: there is no 'references'"),
            ([{"prediction": 3, "references": ["a"]}], "line 1: 'prediction' must be a string, got 3"),
            ([{"prediction": "", "references": "a"}], "line 1: 'references' must be a list of at least one string"),
            ([{"prediction": "", "references": []}], "line 1: 'references' must be a list of at least one string"),
            ([GOOD, "{'a'"], "line 2: not valid JSON"),
            ([GOOD, [1]], "line 2: expected an object, got list"),
            ([GOOD, GOOD | {"id": 2}, GOOD], "line 3: id '1' is already on line 1; it would count twice"),
            ([], "has no lines to score"),
        ],
    )
    def test_errors(self, cotbal: Command, write: Callable[..., Path], lines: list[Any], message: str) -> None:
        outcome = cotbal("score", write(*lines), "--metric", "exact_match")
        assert (outcome.code, outcome.out) == (2, "")
        assert message in outcome.err

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            (GOOD, "there is no 'loss_sum'"),
            ({"loss_sum": -1, "tokens": 1}, "'loss_sum' must be the sum of -ln p"),
            ({"loss_sum": 10**400, "tokens": 1}, "'loss_sum' must be the sum of -ln p"),
            (
                {"loss_sum": 1.0, "tokens": 10**400},
                "'tokens' must be how many tokens that sum has, at least 1, got 1000",
            ),
            ({"loss_sum": 1.0, "tokens": 0}, "'tokens' must be how many tokens that sum has, at least 1, got 0"),
            ({"loss_sum": 1.0, "tokens": 1.5}, "'tokens' must be how many tokens that sum has, at least 1, got 1.5"),
            ({"loss_sum": 1.0, "tokens": True}, "'tokens' must be how many tokens that sum has, at least 1, got True"),
        ],
    )
    def test_errors_of_losses(
        self, cotbal: Command, write: Callable[..., Path], row: dict[str, Any], message: str
    ) -> None:
        assert message in cotbal("score", write(row), "--metric", "perplexity").err

    def test_correct_answers_that_a_metric_cannot_count(self, cotbal: Command, write: Callable[..., Path]) -> None:
        """Boxes of another notation would be a score of 0; a single one among good ones stays one that is missed."""
        box, other = "[0.1, 0.2, 0.5, 0.6]", "<box>(100,200),(500,600)</box>"
        good, bad = ({"prediction": box, "references": [reference]} for reference in (box, other))
        outcome = cotbal("score", write(bad, bad), "--metric", "accuracy_iou")
        assert (outcome.code, outcome.out) == (2, "")
        assert f"prediction 1: its correct answer '{other}' itself scores 0 under accuracy_iou, and so" in outcome.err
        outcome = cotbal("score", write(good, bad), "--metric", "accuracy_iou")
        assert json.loads(outcome.out)["accuracy_iou"]["value"] == 50.0
        either = good | {"references": [other, box]}  # one that can be right is enough
        assert (
            json.loads(cotbal("score", write(either), "--metric", "accuracy_iou").out)["accuracy_iou"]["value"] == 100
        )

    def test_usage(self, cotbal: Command, write: Callable[..., Path], tmp_path: Path) -> None:
        assert "did you mean 'exact_match'?" in cotbal("score", write(self.GOOD), "--metric", "exactmatch").err
        assert "at least one --metric" in cotbal("score", write(self.GOOD)).err
        assert "cannot be read: No such file" in cotbal("score", tmp_path / "no.jsonl", "--metric", "bleu").err


class TestCommand:
    @pytest.fixture
    def run(self, cotbal: Command, tiny_tasks: list[TaskConfig], pixel_model: Path, tmp_path: Path) -> Command:
        def run(*options: object, model: Path = pixel_model, task: int = 0, metric: str = "exact_match") -> Any:
            own = tiny_tasks[task]
            return cotbal(
                "evaluate", model, "--records", own.train, "--image-root", own.image_root, "--metric", metric,
                "--output", tmp_path / "out", "--device", "cpu", "--threads", 1, "--precision", "fp32",
                "--max-new-tokens", 6, *options,
            )  # fmt: skip

        return run

    def test_answers_of_one_annotator_are_refused_before_the_model_answers(self, run: Command, tmp_path: Path) -> None:
        outcome = run(metric="vqa_accuracy")
        assert outcome.code == 2
        assert "set 'predictions': record 'colour-train-0': references[0] has one answer; VQA accuracy" in outcome.err
        assert not (tmp_path / "out" / "manifest.json").exists()

    def test_limit_score_refusal_and_overwrite(
        self, run: Command, cotbal: Command, tiny_tasks: list[TaskConfig], pixel_model: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        outcome = run("--limit", 5, "--batch-size", 2)
        assert outcome.code == 0, outcome.err
        assert "5 of 5 samples, " in outcome.err
        assert "tokens/s, padding " in outcome.err
        lines = tiny_tasks[0].train.read_text().splitlines()[:5]
        found = [json.loads(line) for line in (out / "predictions.jsonl").read_bytes().splitlines()]
        assert [row["id"] for row in found] == [json.loads(line)["id"] for line in lines], "the first five, in order"
        metrics = json.loads((out / "metrics.json").read_text())
        assert json.loads(outcome.out) == metrics
        scored = cotbal("score", out / "predictions.jsonl", "--metric", "exact_match", "--metric", "bleu")
        assert json.loads(scored.out)["exact_match"] == metrics["metrics"]["exact_match"]

        before = (out / "predictions.jsonl").read_bytes()
        other = tmp_path / "other"
        shutil.copytree(pixel_model, other)
        weights = bytearray((other / "model.safetensors").read_bytes())
        weights[-5] ^= 64
        (other / "model.safetensors").write_bytes(weights)
        for options, message in (
            (("--limit", 5, "--batch-size", 3), "batch_size is 2 there and 3 here"),
            (("--batch-size", 2), "sets.predictions.limit is 5 there and None here"),
            (("--limit", 5, "--batch-size", 2, "--precision", "bf16"), "precision is 'fp32' there and 'bf16' here"),
            (("--limit", 5, "--batch-size", 2, "--max-new-tokens", 7), "max_new_tokens is 6 there and 7 here"),
        ):
            refused = run(*options)
            assert refused.code == 2
            assert message in refused.err
            assert "choose another --output, or replace it with --overwrite" in refused.err
        refused = run("--limit", 5, "--batch-size", 2, model=other)
        assert "holds another evaluation: model is '" in refused.err
        refused = run("--limit", 5, "--batch-size", 2, task=1)
        assert "sets.predictions.records is '" in refused.err
        assert (out / "predictions.jsonl").read_bytes() == before
        again = run("--limit", 5, "--batch-size", 2)  # the same one: nothing to do
        assert json.loads(again.out) == metrics
        replaced = run("--limit", 3, "--overwrite")
        assert json.loads(replaced.out)["metrics"]["exact_match"]["samples"] == 3
        assert len((out / "predictions.jsonl").read_bytes().splitlines()) == 3

    def test_files_of_unknown_origin_are_kept(self, run: Command, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/predictions.jsonl").write_text("precious\n")
        outcome = run()
        assert "holds predictions.jsonl of unknown origin" in outcome.err
        assert (tmp_path / "out/predictions.jsonl").read_text() == "precious\n"

    def test_a_task_of_a_configuration_is_the_same_as_its_records(
        self, cotbal: Command, run_data: dict[str, Any], write_config: Callable[..., Path], tmp_path: Path,
        tiny_tasks: list[TaskConfig], pixel_model: Path,
    ) -> None:  # fmt: skip
        config = write_config(run_data)
        outcome = cotbal(
            "evaluate", pixel_model, "--config", config, "--task", "box", "--split", "validation", "--output",
            tmp_path / "a",
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
        own = tiny_tasks[1]
        plain = cotbal(
            "evaluate", pixel_model, "--records", own.validation, "--image-root", own.image_root, "--metric",
            "accuracy_iou", "--output", tmp_path / "b", "--device", "cpu", "--precision", "fp32", "--threads", 1,
            "--max-new-tokens", 12,
        )  # fmt: skip
        assert json.loads(outcome.out)["metrics"] == json.loads(plain.out)["metrics"]
        written = [(tmp_path / name / "predictions.jsonl").read_bytes() for name in "ab"]
        assert written[0] == written[1]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ((), "takes either --records FILE"),
            (("--records", "r.json", "--metric", "cidr"), "unknown metric 'cidr' (did you mean 'cider'?)"),
            (("--records", "no.json", "--metric", "cider"), "no.json does not exist"),
            (("--config", "CONFIG"), "--config needs --task, one of colour, box, chat"),
            (("--config", "CONFIG", "--task", "colr"), "unknown task 'colr' (did you mean 'colour'?)"),
            (("--config", "CONFIG", "--task", "box", "--split", "train"), "--split must be one of validation, test"),
            (("--config", "CONFIG", "--task", "box", "--precision", "int8"), "--precision must be one of fp32, bf16"),
        ],
    )
    def test_errors(
        self, cotbal: Command, run_data: dict[str, Any], write_config: Callable[..., Path], pixel_model: Path,
        tmp_path: Path, options: tuple[str, ...], message: str,
    ) -> None:  # fmt: skip
        config = str(write_config(run_data))
        given = [config if option == "CONFIG" else option for option in options]
        outcome = cotbal("evaluate", pixel_model, "--output", tmp_path / "out", "--device", "cpu", *given)
        assert (outcome.code, outcome.out) == (2, "")
        assert message in outcome.err

    def test_questions_without_answers_get_the_same_predictions(
        self, run: Command, cotbal: Command, tiny_tasks: list[TaskConfig], pixel_model: Path, tmp_path: Path
    ) -> None:
        """As of VQAv2's test-dev: nothing to score with, and nothing is scored."""
        rows = [json.loads(line) for line in tiny_tasks[0].train.read_text().splitlines()[:3]]
        for row in rows:
            del row["conversations"][1:]
        secret = tmp_path / "secret.jsonl"
        secret.write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = (
            "evaluate", pixel_model, "--records", secret, "--image-root", tiny_tasks[0].image_root, "--output",
            tmp_path / "secret", "--device", "cpu", "--threads", 1, "--precision", "fp32", "--max-new-tokens", 6,
        )  # fmt: skip
        outcome = cotbal(*options)
        assert outcome.code == 0, outcome.err
        assert json.loads(outcome.out)["metrics"] == {}
        assert run("--limit", 3).code == 0
        found, scored = (
            [json.loads(line) for line in (tmp_path / name / "predictions.jsonl").read_text().splitlines()]
            for name in ("secret", "out")
        )
        assert [row.pop("references") for row in found] == [[]] * 3
        assert all(row.pop("references") for row in scored)
        assert found == scored
        outcome = cotbal(*options, "--metric", "exact_match")
        assert "line 1 (id 'colour-train-0'): 'conversations' must be a list with at least one human and" in outcome.err

    def test_an_empty_correct_answer_is_scored(
        self, run: Command, tiny_tasks: list[TaskConfig], tmp_path: Path
    ) -> None:
        """Nothing to be found in an image: no question without an answer, of which scoring would say so at its end."""
        rows = [json.loads(line) for line in tiny_tasks[0].train.read_text().splitlines()[:2]]
        for row in rows:
            row["id"] += "-again"  # beside the task's own
        rows[0]["references"] = [""]
        records = tmp_path / "empty.jsonl"
        records.write_text("".join(json.dumps(row) + "\n" for row in rows))
        outcome = run("--records", records)
        assert outcome.code == 0, outcome.err
        found = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
        assert [row["references"] for row in found[-2:]] == [[""], [rows[1]["conversations"][1]["value"]]]

    def test_a_rank_that_the_kernel_has_killed_is_one_line(self, run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        def submit(*_: Any) -> Future[Any]:
            gone: Future[Any] = Future()
            gone.set_exception(BrokenProcessPool("terminated abruptly"))
            return gone

        monkeypatch.setattr(RankProcesses, "submit", submit)
        outcome = run("--processes", 2)
        assert outcome.code == 2
        assert "was ended from outside (out of memory?); lower evaluation.batch_size" in outcome.err
        assert len(outcome.err.splitlines()) == 1

    def test_bad_material(self, run: Command, tiny_tasks: list[TaskConfig], tmp_path: Path) -> None:
        assert "is not a model folder" in run(model=tmp_path).err
        assert "image_root (--image-root)" in run("--image-root", tmp_path).err
        twice = run("--records", tiny_tasks[0].train)
        assert "id 'colour-train-0' is already used in" in twice.err
        assert not (tmp_path / "out" / "parts").exists()
