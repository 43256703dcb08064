"""Evaluation at scale: ranks, kills and restarts leave the same files; the answers are those of an unbatched loop."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from trainer.data.records import Record, Turn
from trainer.evaluation.generation import BatchScorer
from trainer.evaluation.parts import no_ranks
from trainer.evaluation.progress import Meter
from trainer.evaluation.ranks import RankProcesses, load_encoder, measure
from trainer.evaluation.running import _row, evaluate
from trainer.evaluation.spec import EvaluationSet, EvaluationSpec

COUNT = 23  # with batches of 4, each set ends in a ragged one
# fmt: off
WORDS = [
    "square", "circle", "left", "of", "the", "red", "green", "blue", "yellow", "picture", "above",
    "below", "between", "many", "few", "two", "three",
]
# fmt: on


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``mixed.jsonl``: every third record without an image, prompts of many lengths, the longest in the middle."""
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "images").mkdir()
    rows = []
    for number in range(COUNT):
        words = [WORDS[(7 * number + k) % len(WORDS)] for k in range(1 + (number * 5) % 17)]
        row: dict[str, Any] = {"id": f"r{number}", "references": [WORDS[number % 5], "other"]}
        question = " ".join(words) + "?"
        if number % 3:
            row["image"] = f"images/{number}.png"
            Image.new("RGB", (64, 64), (40 * (number % 7), 11 * number, 255 - 9 * number)).save(folder / row["image"])
            question = f"<image>\n{question}"
        answer = " ".join(WORDS[number % 5 : number % 5 + 1 + number % 4])
        row["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        rows.append(row)
    (folder / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def make_spec(data: Path, pixel_model: Path) -> Callable[..., EvaluationSpec]:
    """A specification on one rank; batches of 4, so that most batches are padded."""

    def make(output: Path, **changes: Any) -> EvaluationSpec:
        own = {"metrics": ("exact_match",), "limit": None} | {
            key: changes.pop(key) for key in ("metrics", "limit") if key in changes
        }
        chosen = EvaluationSet("predictions", (data / "mixed.jsonl",), data, max_new_tokens=9, **own)
        base = EvaluationSpec(pixel_model, (chosen,), output, 4, "fp32", ("cpu",), threads=1, max_length=256)
        return replace(base, **changes)

    return make


@pytest.fixture(scope="module")
def answers(make_spec: Callable[..., EvaluationSpec], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished evaluation on one rank, never interrupted."""
    output = tmp_path_factory.mktemp("answers")
    evaluate(make_spec(output))
    return output


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankProcesses]:
    with closing(RankProcesses(2)) as processes:
        yield processes


def rows(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "predictions.jsonl").read_bytes().splitlines()]


def unbatched(spec: EvaluationSpec, records: list[dict[str, Any]]) -> list[str]:
    """transformers' own way from a record to an answer, one at a time: no padding, nothing of the trainer's."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(spec.model_path)
    model = AutoModelForImageTextToText.from_pretrained(spec.model_path, dtype=torch.float32).eval()
    (chosen,) = spec.sets
    texts = []
    for record in records:
        text = record["conversations"][0]["value"].removeprefix("<image>\n")
        content: list[dict[str, str]] = [{"type": "image"}] if "image" in record else []
        message = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
        rendered = processor.apply_chat_template([message], add_generation_prompt=True)
        images = [Image.open(chosen.image_root / record["image"]).convert("RGB")] if "image" in record else None
        inputs = processor(text=rendered, images=images, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        out = model.generate(**inputs, max_new_tokens=chosen.max_new_tokens, do_sample=False)
        answer = out[0, inputs["input_ids"].shape[1] :]
        texts.append(processor.tokenizer.decode(answer, skip_special_tokens=True))
    return texts


class TestAnswers:
    def test_are_those_of_an_unbatched_loop(self, make_spec: Callable[..., EvaluationSpec], answers: Path) -> None:
        spec = make_spec(answers)
        records = [json.loads(line) for line in spec.sets[0].files[0].read_text().splitlines()]
        found = rows(answers)
        assert [row["prediction"] for row in found] == unbatched(spec, records)
        assert len({row["prediction"] for row in found}) > COUNT // 2, "a model that always says the same tests nothing"
        for row, record in zip(found, records, strict=True):
            question = record["conversations"][0]["value"].removeprefix("<image>\n")
            assert row == {
                "id": record["id"], "image": record.get("image"), "question": question,
                "references": record["references"], "prediction": row["prediction"],
            }  # fmt: skip

    def test_leave_predictions_metrics_and_a_manifest(self, answers: Path) -> None:
        assert {path.name for path in answers.iterdir() if path.name[0] != "."} == {
            "predictions.jsonl", "metrics.json", "manifest.json",
        }  # fmt: skip

    def test_throughput_counts_tokens(self, make_spec: Callable[..., EvaluationSpec], answers: Path) -> None:
        spec = make_spec(answers)
        encoder, (chosen,) = load_encoder(spec), spec.sets
        lengths = [len(encoder.prompt(record, chosen.image_path).input_ids) for record in chosen.load()]
        found = json.loads((answers / "metrics.json").read_text())["throughput"]
        assert (found["samples"], found["prompt_tokens"]) == (COUNT, sum(lengths))
        ordered = sorted(lengths, reverse=True)  # longest first, cut into batches of 4
        padded = sum(ordered[start] * len(ordered[start : start + 4]) for start in range(0, COUNT, 4))
        assert found["padding_share"] == round(1 - sum(lengths) / padded, 4)
        assert found["tokens_per_second"] == pytest.approx(found["generated_tokens"] / found["seconds"], rel=0.05)

    def test_generated_tokens_end_at_the_end_mark(self) -> None:
        class Model(torch.nn.Module):
            generation_config = type("Config", (), {"eos_token_id": [2, 5]})

        scorer = BatchScorer(Model(), None, 3)
        generated_BN = torch.tensor([[3, 2, 0, 0], [3, 3, 3, 3], [5, 2, 0, 0], [3, 3, 3, 5]])
        assert scorer._until_end(generated_BN) == 2 + 4 + 1 + 4
        Model.generation_config.eos_token_id = None
        assert scorer._until_end(generated_BN) == 16


class TestRanks:
    @pytest.mark.slow  # starts two processes
    @pytest.mark.slow  # starts a process
    def test_a_rank_that_is_starting_does_not_die_of_a_scheduler_s_warning(self, two_ranks: RankProcesses) -> None:
        blocked = two_ranks.submit(0, signal.pthread_sigmask, signal.SIG_BLOCK, ()).result()
        assert blocked == {signal.SIGUSR1}

    def test_two_give_the_same_files_as_one(
        self,
        make_spec: Callable[..., EvaluationSpec],
        answers: Path,
        two_ranks: RankProcesses,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Losses as well as answers: their last bits tell with which neighbours a record went through the model. Both
        measure records too, so that none waits for minutes."""
        submit, measured = two_ranks.submit, []

        def noted(rank: int, work: Callable[..., Any], *arguments: Any) -> Any:
            measured.extend([rank] if work is measure else [])
            return submit(rank, work, *arguments)

        monkeypatch.setattr(two_ranks, "submit", noted)
        losses = evaluate(make_spec(tmp_path / "one", metrics=("perplexity",)))
        for name, reference, metrics in (
            ("answers", answers, ("exact_match",)),
            ("losses", tmp_path / "one", ("perplexity",)),
        ):
            wrote: set[str] = set()

            def look(meter: Meter, output: Path = tmp_path / name, wrote: set[str] = wrote) -> None:
                wrote |= {path.name for path in (output / "parts").glob("rank-*") if path.stat().st_size}

            evaluate(make_spec(tmp_path / name, metrics=metrics, devices=("cpu", "cpu")), two_ranks, look)
            assert wrote == {"rank-0.jsonl", "rank-1.jsonl"}
            assert measured == [0, 1]
            measured.clear()
            found, wanted = ((folder / "predictions.jsonl").read_bytes() for folder in (tmp_path / name, reference))
            assert found == wanted
        metrics_of_two = json.loads((tmp_path / "losses" / "metrics.json").read_text())
        assert metrics_of_two["metrics"] == losses["metrics"]

    @pytest.mark.slow
    def test_an_error_in_one_ends_all_and_keeps_what_is_done(
        self, make_spec: Callable[..., EvaluationSpec], answers: Path, two_ranks: RankProcesses, tmp_path: Path,
        data: Path,
    ) -> None:  # fmt: skip
        shutil.copytree(data, tmp_path / "data")
        spec = make_spec(tmp_path / "out", devices=("cpu", "cpu"))
        chosen = replace(spec.sets[0], files=(tmp_path / "data/mixed.jsonl",), image_root=tmp_path / "data")
        spec = replace(spec, sets=(chosen,))
        shortest = tmp_path / "data/images/7.png"  # "r7" is in the last batch
        image = shortest.read_bytes()
        shortest.write_bytes(b"no picture")
        with pytest.raises(ValueError, match=r"set 'predictions', record 'r7': .*7.png cannot be decoded"):
            evaluate(spec, two_ranks)
        shortest.write_bytes(image)
        before: list[int] = []
        evaluate(spec, two_ranks, lambda meter: before.append(meter.before))
        assert before[0] >= 4
        assert (tmp_path / "out/predictions.jsonl").read_bytes() == (answers / "predictions.jsonl").read_bytes()

    def test_need_processes(self, make_spec: Callable[..., EvaluationSpec], tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="2 ranks need processes"):
            evaluate(make_spec(tmp_path, devices=("cpu", "cpu")))


class Stop(Exception):
    """In place of a kill, where a test can do without one."""


def stop_after(batches: int) -> Callable[[Meter], None]:
    calls = []

    def report(meter: Meter) -> None:
        calls.append(meter.samples)
        if len(calls) > batches:
            raise Stop

    return report


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that go through a model in this process."""
    sizes: list[int] = []
    whole = BatchScorer.__call__

    def call(self: BatchScorer, chosen: EvaluationSet, encoded: Any) -> Any:
        sizes.append(len(encoded))
        return whole(self, chosen, encoded)

    monkeypatch.setattr(BatchScorer, "__call__", call)
    return sizes


class TestRestart:
    @pytest.mark.skipif(sys.platform != "linux", reason="a process can ask to end with its parent on Linux only")
    @pytest.mark.slow
    def test_killed_and_restarted_equals_uninterrupted(
        self, make_spec: Callable[..., EvaluationSpec], counted: list[int], tmp_path: Path, two_ranks: RankProcesses
    ) -> None:
        """SIGKILL to a real two-rank command in the middle of a set; then on one rank, and on two."""
        whole, killed = tmp_path / "whole", tmp_path / "killed"
        spec = make_spec(killed, batch_size=1, devices=("cpu", "cpu"))
        evaluate(make_spec(whole, batch_size=1))
        ((chosen,), count) = spec.sets, COUNT
        process = subprocess.Popen(
            [sys.executable, "-m", "trainer.cli", "evaluate", spec.model_path, "--records", chosen.files[0],
             "--image-root", chosen.image_root, "--metric", "exact_match", "--output", killed, "--batch-size", "1",
             "--precision", "fp32", "--device", "cpu", "--threads", "1", "--processes", "2", "--max-new-tokens", "9"],
            stdout=subprocess.DEVNULL, stderr=(tmp_path / "errors").open("w"),
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        deadline = time.monotonic() + 300
        while sum(path.read_bytes().count(b"\n") for path in (killed / "parts").glob("rank-*.jsonl")) < 2:
            if process.poll() is not None:
                pytest.fail(f"ended before it could be killed: {(tmp_path / 'errors').read_text()[-3000:]}")
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with no_ranks(killed):  # they have ended with it
            assert not (killed / "predictions.jsonl").exists()
        counted.clear()
        parts = sorted((killed / "parts").glob("rank-*.jsonl"))
        for path in parts:  # what a kill in the middle of a write leaves
            whole_lines = path.read_bytes()[: path.read_bytes().rfind(b"\n") + 1]
            path.write_bytes(whole_lines + b'{"batch": 3, "results": [{"predic')
        finished = sum(path.read_bytes().count(b"\n") for path in parts)
        assert 2 <= finished < count
        other = tmp_path / "other"
        shutil.copytree(killed, other)

        evaluate(make_spec(killed, batch_size=1))
        assert len(counted) == count - finished, "what was finished was done again"
        evaluate(make_spec(other, batch_size=1, devices=("cpu", "cpu")), two_ranks)
        for output in (killed, other):
            assert (output / "predictions.jsonl").read_bytes() == (whole / "predictions.jsonl").read_bytes()
            found, wanted = (json.loads((folder / "metrics.json").read_text()) for folder in (output, whole))
            assert found["metrics"] == wanted["metrics"]
            for key in ("samples", "prompt_tokens", "generated_tokens", "padding_share"):
                assert found["throughput"][key] == wanted["throughput"][key]

    def test_a_cut_off_line_costs_its_batch_only(
        self, make_spec: Callable[..., EvaluationSpec], answers: Path, counted: list[int], tmp_path: Path
    ) -> None:
        spec = make_spec(tmp_path)
        with pytest.raises(Stop):
            evaluate(spec, None, stop_after(4))
        assert sum(counted) == 16
        part = tmp_path / "parts/rank-0.jsonl"
        lines = part.read_bytes().splitlines(keepends=True)
        part.write_bytes(b"".join(lines[:3]) + lines[3][:-1])  # only the end of the line is missing
        counted.clear()
        evaluate(spec)
        assert sum(counted) == COUNT - 12
        assert (tmp_path / "predictions.jsonl").read_bytes() == (answers / "predictions.jsonl").read_bytes()

    def test_goes_on_with_smaller_batches(
        self, make_spec: Callable[..., EvaluationSpec], answers: Path, counted: list[int], tmp_path: Path
    ) -> None:
        """What to do where memory runs out; once more, stopped again and with larger ones, nothing is lost either."""
        with pytest.raises(Stop):
            evaluate(make_spec(tmp_path), None, stop_after(2))
        assert counted == [4, 4]
        with pytest.raises(Stop):
            evaluate(make_spec(tmp_path, batch_size=3), None, stop_after(3))
        assert sum(counted) == 8 + 9
        assert json.loads((tmp_path / "manifest.json").read_text())["evaluation"]["batch_size"] == 3
        evaluate(make_spec(tmp_path, batch_size=8))
        assert (sum(counted), max(counted[2:])) == (COUNT, 3)
        assert (tmp_path / "predictions.jsonl").read_bytes() == (answers / "predictions.jsonl").read_bytes()

    def test_a_finished_one_is_scored_again_without_the_model(
        self, make_spec: Callable[..., EvaluationSpec], answers: Path, counted: list[int], tmp_path: Path
    ) -> None:
        shutil.copytree(answers, tmp_path / "copy")
        before = json.loads((answers / "metrics.json").read_text())
        found = evaluate(make_spec(tmp_path / "copy", metrics=("span_f1", "exact_match")))
        assert counted == []
        assert list(found["metrics"]) == ["span_f1", "exact_match"]
        assert found["metrics"]["exact_match"] == before["metrics"]["exact_match"]
        assert found["throughput"] == before["throughput"]

    def test_killed_between_the_merge_of_two_sets(
        self, make_spec: Callable[..., EvaluationSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import trainer.evaluation.running as running

        spec = make_spec(tmp_path, limit=5, by_task=True)
        (own,) = spec.sets
        spec = replace(spec, sets=(replace(own, name="a"), replace(own, name="b", metrics=("span_f1",))))
        write = running.write_jsonl
        monkeypatch.setattr(running, "write_jsonl", lambda path, rows: write(path, rows) if path.stem == "a" else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate(spec)
        monkeypatch.setattr(running, "write_jsonl", write)
        found = evaluate(spec)
        assert {name: (entry["metric"], entry["samples"]) for name, entry in found.items()} == {
            "a": ("EM", 5), "b": ("F1", 5),
        }  # fmt: skip
        assert not (tmp_path / "parts").exists()


class TestLosses:
    def test_perplexity_is_that_of_plain_cross_entropy(
        self, make_spec: Callable[..., EvaluationSpec], tmp_path: Path
    ) -> None:
        """One record at a time, logits in float64. 1e-5: a sum of at most 40 float32 losses, each off by some 1e-7."""
        from transformers import AutoModelForImageTextToText

        spec = make_spec(tmp_path, metrics=("perplexity",))
        evaluate(spec)
        model = AutoModelForImageTextToText.from_pretrained(spec.model_path, dtype=torch.float32).eval()
        encoder, (chosen,) = load_encoder(spec), spec.sets
        total, tokens = 0.0, 0
        for row, record in zip(rows(tmp_path), chosen.load(), strict=True):
            one = encoder.training_sample(record, chosen.image_path)
            labels = torch.tensor(one.labels)[1:]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([one.input_ids]), **one.image_inputs).logits[0, :-1].double()
            loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
            assert row["loss_sum"] == pytest.approx(loss, rel=1e-5)
            assert row["tokens"] == int((labels != -100).sum())
            total, tokens = total + loss, tokens + row["tokens"]
        found = json.loads((tmp_path / "metrics.json").read_text())["metrics"]["perplexity"]
        assert found["value"] == pytest.approx(torch.tensor(total / tokens).exp().item(), rel=1e-5)
        assert found["samples"] == COUNT

    def test_conversations_are_cut_at_the_positions_of_the_model(
        self, make_spec: Callable[..., EvaluationSpec], tmp_path: Path
    ) -> None:
        """256, where --records asks for 2048: a table of positions ends there."""
        spec = replace(make_spec(tmp_path, metrics=("perplexity",)), max_length=2048)
        (chosen,) = spec.sets
        record = chosen.load()[0]
        long = replace(record, turns=(*record.turns, replace(record.turns[0], question="red " * 400)))
        assert len(load_encoder(spec).training_sample(long, chosen.image_path).input_ids) == 256

    def test_do_not_mix_with_answers(self, make_spec: Callable[..., EvaluationSpec], tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="perplexity scores the given answers, exact_match generated ones"):
            evaluate(make_spec(tmp_path, metrics=("perplexity", "exact_match")))


def test_a_row_has_the_question_without_placeholders() -> None:
    """In a record without images there are none."""
    said = (Turn("<image>\nWhat is <image/>?", "one"),)
    found = [_row(Record("a", images, said, ()), True)["question"] for images in (("a.png",), ())]
    assert found == ["What is <image/>?", "<image>\nWhat is <image/>?"]
