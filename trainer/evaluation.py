"""Scoring a trained model: batched greedy generation, predictions kept as JSONL, metrics beside them.

Runs on the saved model folder without DeepSpeed, so that one process is enough and ranks never wait for each other.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.config import RunConfig
from trainer.data.collator import stack_images
from trainer.data.encoding import ConversationEncoder, Encoded
from trainer.data.records import IMAGE_PLACEHOLDER, Record, write_jsonl
from trainer.metrics import get_metric
from trainer.models.features import FeatureStore
from trainer.models.loading import load_model, load_processor
from trainer.tasks import Task, load_task


@dataclass(frozen=True)
class EvaluationSpec:
    """What to score: a model folder, a split, some tasks.

    Attributes:
        config: the run's resolved configuration, with its tasks spelled out.
        model_path: the trained model's folder.
        split: ``validation`` or ``test``.
        tasks: names of the tasks to score.
        output_dir: gets ``<task>.jsonl`` and ``metrics.json``.
        features: folder of cached vision features, when the tower takes them.
        device: ``cpu`` or ``cuda``.
        threads: CPU threads.
    """

    config: RunConfig
    model_path: Path
    split: str
    tasks: tuple[str, ...]
    output_dir: Path
    features: Path | None
    device: str
    threads: int


def evaluate(spec: EvaluationSpec) -> dict[str, dict[str, Any]]:
    """Scores a model on every task of `spec`; returns and writes ``{task: {metric, value, standard_error, samples}}``.

    A task whose predictions are already on disk is not generated again.
    """
    torch.set_num_threads(spec.threads)
    assert not isinstance(spec.config.tasks, str), "the pipeline spells the tasks out"
    tasks = [load_task(config) for config in spec.config.tasks if config.name in spec.tasks]
    dtype = torch.bfloat16 if spec.config.training.precision == "bf16" else torch.float32
    processor = load_processor(str(spec.model_path))
    encoder = ConversationEncoder(
        processor, spec.config.model.max_length, FeatureStore(spec.features) if spec.features else None
    )
    model = load_model(str(spec.model_path), spec.config.model, dtype).to(spec.device).eval()
    metrics: dict[str, dict[str, Any]] = {}
    for task in tasks:
        path = spec.output_dir / f"{task.name}.jsonl"
        if path.exists():
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        else:
            rows = predict(model, encoder, task, task.split(spec.split), spec.config.evaluation.batch_size)
        metrics[task.name] = score(task, rows)
        write_jsonl(path, rows)
    partial = spec.output_dir / "metrics.json.partial"
    partial.write_text(json.dumps(metrics, indent=2))
    partial.replace(spec.output_dir / "metrics.json")
    return metrics


def score(task: Task, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Adds each row's ``score`` in place and returns the task's metric as a JSON object."""
    assert task.config.metric is not None
    metric = get_metric(task.config.metric)
    result = metric.compute([row["prediction"] for row in rows], [row["references"] for row in rows])
    for row, value in zip(rows, result.per_sample, strict=True):
        row["score"] = value
    return {
        "metric": metric.label,
        "value": result.value,
        "standard_error": result.standard_error,
        "samples": len(rows),
    }


def predict(
    model: nn.Module,
    encoder: ConversationEncoder,
    task: Task,
    records: Sequence[Record],
    batch_size: int,
) -> list[dict[str, Any]]:
    """Greedy answers to the last question of every record, in record order.

    Prompts are batched by length (longest first, so that a batch too large for memory fails at once) and padded
    on the left.
    """
    prompts = [encoder.prompt(record, task.image_path) for record in records]
    order = sorted(range(len(records)), key=lambda index: -len(prompts[index].input_ids))
    answers: dict[int, str] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        texts = _generate(model, encoder, [prompts[index] for index in chosen], task.config.max_new_tokens)
        answers.update(zip(chosen, texts, strict=True))
    return [
        {
            "id": record.id,
            "image": record.images[0] if record.images else None,
            "question": record.turns[-1].question.replace(IMAGE_PLACEHOLDER, "").strip(),
            "references": record.answers,
            "prediction": answers[index],
        }
        for index, record in enumerate(records)
    ]


@torch.inference_mode()
def _generate(
    model: nn.Module, encoder: ConversationEncoder, prompts: Sequence[Encoded], max_new_tokens: int
) -> list[str]:
    device = next(model.parameters()).device
    width = max(len(prompt.input_ids) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), encoder.tokenizer.pad_token_id)
    attention_mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt.input_ids) :] = torch.tensor(prompt.input_ids)
        attention_mask[row, width - len(prompt.input_ids) :] = 1
    images = {
        key: value.to(device, dtype=next(model.parameters()).dtype if value.is_floating_point() else None)
        for key, value in stack_images(prompts).items()
    }
    generated = model.generate(  # type: ignore[operator]  # any transformers model that generates
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=encoder.tokenizer.pad_token_id,
        **images,
    )
    texts = encoder.tokenizer.batch_decode(generated[:, width:], skip_special_tokens=True)
    return [text.strip() for text in texts]
