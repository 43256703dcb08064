"""Gradient norms at the head of a patched model against autograd through the model unpatched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from cotbal_kernels.huggingface import apply_fused_loss
from trainer.loop.measuring import HeadTap

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class CutLlama(transformers.LlamaForCausalLM):
    """The last rows of its head are padding."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        logits = self.lm_head(self.model(input_ids).last_hidden_state)[..., :90]
        loss = None if labels is None else self.loss_function(logits, labels, 90, **kwargs)
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(**TEXT),
        transformers.LlamaConfig(**TEXT, head_dim=16),
        transformers.CohereConfig(**TEXT, logit_scale=7.0, tie_word_embeddings=False),
        transformers.CohereConfig(**TEXT, logit_scale=0.3, tie_word_embeddings=False),
        transformers.Gemma2Config(**TEXT, head_dim=8, final_logit_softcapping=0.5, tie_word_embeddings=False),
    ],
    ids=["plain", "cut", "scaled", "with a bias", "capped"],
)
def test_norms_of_scaled_and_capped_heads(config: transformers.PreTrainedConfig) -> None:
    torch.manual_seed(0)
    cut = getattr(config, "head_dim", None) == 16
    model = (CutLlama(config) if cut else transformers.AutoModelForCausalLM.from_config(config)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    if getattr(config, "logit_scale", 1.0) == 0.3:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(97))
    ids = torch.randint(3, 90, (4, 9))
    labels = ids.masked_fill(torch.rand(4, 9) < 0.3, -100)
    tasks = torch.tensor([0, 1, 1, 2])
    expected = []
    for task in range(3):
        rows = tasks == task
        logits = model(ids[rows]).logits[:, :-1].double().flatten(0, 1)
        loss = cross_entropy(logits, labels[rows][:, 1:].flatten(), reduction="sum")
        expected.append(float(torch.autograd.grad(loss, model.lm_head.weight)[0].double().norm()))
    apply_fused_loss(model, num_tasks=3)
    tap = HeadTap(model, 3)
    tap.open()
    for first in (0, 2):
        part = slice(first, first + 2)
        model(ids[part], labels=labels[part], loss_task_ids=tasks[part])
    # Squares in float32 of differences p - 1, themselves of float32 logits.
    assert tap.norms().tolist() == pytest.approx(expected, rel=1e-5)
