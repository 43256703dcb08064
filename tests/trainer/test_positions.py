"""Positions of a model whose table of them ends, as GPT-2's and OPT's, and of one whose RoPE goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from families import make_tokenizer
from transformers import BloomConfig, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, Qwen2Config

from trainer.data.lengths import counter_of
from trainer.data.records import write_jsonl
from trainer.errors import UserError
from trainer.evaluation.ranks import load_encoder
from trainer.evaluation.running import evaluate
from trainer.evaluation.spec import EvaluationSet, EvaluationSpec
from trainer.models.loading import positions, table_of_positions


def make_spec(tmp_path: Path, **changes: Any) -> EvaluationSpec:
    tokenizer = make_tokenizer(["<|im_end|>"], {})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    sizes = {"vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 24}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    turns = [{"from": "human", "value": "red " * 15}, {"from": "gpt", "value": "red"}]
    write_jsonl(tmp_path / "a.jsonl", [{"id": "long", "conversations": turns}])
    chosen = EvaluationSet("predictions", (tmp_path / "a.jsonl",), tmp_path, ("exact_match",), **changes)
    return EvaluationSpec(tmp_path / "model", (chosen,), tmp_path / "out", 4, "fp32", ("cpu",), threads=1)


def test_an_answer_beyond_a_table_of_them_is_refused(tmp_path: Path) -> None:
    (chosen,) = make_spec(tmp_path, max_new_tokens=1).sets
    encoder = load_encoder(make_spec(tmp_path, max_new_tokens=1))
    prompt = len(encoder.prompt(chosen.load()[0], chosen.image_path).input_ids)
    most = 24 - prompt + 1  # the last token that is generated is not read
    assert prompt < 24
    evaluate(make_spec(tmp_path, max_new_tokens=most))
    assert (tmp_path / "out" / "predictions.jsonl").exists()
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(UserError, match=rf"record 'long': its prompt of {prompt} tokens and up to {most + 1} new "):
        evaluate(make_spec(tmp_path, max_new_tokens=most + 1))


def test_a_token_without_an_embedding_is_refused(tmp_path: Path) -> None:
    """Before it is asked anything, by lengths and by prompts alike."""
    spec = make_spec(tmp_path, max_new_tokens=1)
    (chosen,) = spec.sets
    record = chosen.load()[0]
    path = tmp_path / "model" / "config.json"
    most = max(load_encoder(spec).prompt(record, chosen.image_path).input_ids)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": most}))
    encoder = load_encoder(spec)
    for encode in (encoder.prompt, counter_of(encoder).prompt):
        with pytest.raises(UserError, match=rf"record 'long': the tokenizer gives '.*' \({most}\), and the model has"):
            encode(record, chosen.image_path)


@pytest.mark.parametrize(
    ("config", "most", "table"),
    [
        (Qwen2Config(max_position_embeddings=32768), 32768, None),
        # Its README: "for long texts", up to 131,072 tokens with these lines in a file that keeps 32,768.
        (
            Qwen2Config(
                max_position_embeddings=32768,
                rope_scaling={"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
            ),
            131072,
            None,
        ),
        # Llama 3.1, whose file has the number of after: 8 times 8,192 is less.
        (
            LlamaConfig(
                max_position_embeddings=131072,
                rope_scaling={
                    "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192,
                    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                },
            ),
            131072,
            None,
        ),
        (LlamaConfig(max_position_embeddings=4096, rope_scaling={"type": "linear", "factor": 4.0}), 16384, None),
        (Gemma3TextConfig(max_position_embeddings=32768), 32768, None),  # a RoPE for each kind of layer
        (GPT2Config(n_positions=24), 24, 24),
        (BloomConfig(), None, None),
    ],
)  # fmt: skip
def test_stretched_ones_count(config: Any, most: int | None, table: int | None) -> None:
    assert (positions(config), table_of_positions(config)) == (most, table)
