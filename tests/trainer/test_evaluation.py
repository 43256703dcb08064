"""What a model answers, and its losses, are those of an unbatched loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from questions import COUNT, rows

from trainer.data.records import Record, Turn
from trainer.evaluation.generation import BatchScorer
from trainer.evaluation.ranks import load_encoder
from trainer.evaluation.running import _row, evaluate
from trainer.evaluation.spec import EvaluationSpec


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
