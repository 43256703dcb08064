"""A whole training step, or an evaluation of losses, of a LLaVA-shaped model with each peer as its head's loss.

Legend: B sequences, S positions, M = B S, D hidden width, V vocabulary, K tasks.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import equality, memory, turns
from bench.cases import DTYPES, ModelCase, Preset
from bench.equality import Values
from bench.peers.base import IGNORED, Peer, Weighting
from bench.problems import Problem
from bench.record import record
from bench.results import OK, Entry, Row
from bench.timing import Variant, clock_for, describe, interleaved, require_device

PATCH = 14  # pixels, as CLIP-L/14


@dataclass
class Training:
    """A model, its optimizer and the one batch that every step sees."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    inputs: dict[str, Tensor]
    labels_M: Tensor  # int64, already shifted: position t holds the label of t + 1
    weighting: Weighting

    def hidden_MD(self, model: nn.Module | None = None) -> Tensor:
        """Last hidden states of every position."""
        chosen = model or self.model
        inputs = {name: _as_model(value, chosen) for name, value in self.inputs.items()}
        hidden_BSD = chosen.model(**inputs, use_cache=False).last_hidden_state  # type: ignore[operator]
        return hidden_BSD.flatten(0, 1)

    @property
    def head_VD(self) -> Tensor:
        return self.model.lm_head.weight  # type: ignore[return-value, union-attr]

    def loss(self, peer: Peer) -> Tensor:
        return peer.loss(self.hidden_MD(), self.head_VD, self.labels_M, self.weighting)

    def watched(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The two ends of the backward pass, whose gradients are compared: the head and the projector's input."""
        projector = model.model.multi_modal_projector.linear_1.weight  # type: ignore[union-attr]
        return {"head": model.lm_head.weight, "projector": projector}  # type: ignore[dict-item, union-attr]


def build(case: ModelCase, device: torch.device) -> Training:
    """Random weights and one random batch. The vision tower is one frozen layer: images are not what is measured."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    image_token = case.V - 1
    side = case.patches * PATCH
    text = LlamaConfig(
        vocab_size=case.V,
        hidden_size=case.D,
        intermediate_size=4 * case.D,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=max(1, case.heads // 4),
        tie_word_embeddings=False,
        max_position_embeddings=case.sequence,
    )
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=side,
        patch_size=PATCH,
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=image_token,
        image_seq_length=case.patches**2,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # Weights are made where and as they are used: a billion float32 on the host would take longer than the case.
        with torch.device(device):
            default = torch.get_default_dtype()
            torch.set_default_dtype(DTYPES[case.dtype])
            try:
                model = LlavaForConditionalGeneration(config)
            finally:
                torch.set_default_dtype(default)
    model.model.vision_tower.requires_grad_(False)
    model.train(case.train)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=device.type == "cuda")
    return Training(model, optimizer, *_batch(case, device, image_token))


def _batch(case: ModelCase, device: torch.device, image_token: int) -> tuple[dict[str, Tensor], Tensor, Weighting]:
    generator = torch.Generator().manual_seed(0)
    words_BS = torch.randint(0, image_token, (case.batch, case.sequence), generator=generator)
    words_BS[:, : case.patches**2] = image_token
    labels_BS = words_BS.clone()
    labels_BS[:, : -case.answer] = IGNORED
    shifted_BS = F.pad(labels_BS[:, 1:], (0, 1), value=IGNORED)
    task_ids_BS = (torch.arange(case.batch) % case.tasks)[:, None].expand(shifted_BS.shape)
    side = case.patches * PATCH
    inputs = {
        "input_ids": words_BS.to(device),
        "pixel_values": torch.randn(case.batch, 3, side, side, generator=generator).to(device, DTYPES[case.dtype]),
    }
    weighting = Weighting(task_ids_BS.reshape(-1).to(device), torch.linspace(0.6, 1.4, case.tasks, device=device))
    return inputs, shifted_BS.reshape(-1).to(device), weighting


def variant_of(peer: Peer, training: Training, case: ModelCase) -> Variant:
    """One optimizer step, or one evaluation."""

    def evaluate(_: None) -> Tensor:
        with torch.no_grad():
            return training.loss(peer)

    def step(_: None) -> None:
        training.optimizer.zero_grad(set_to_none=True)
        training.loss(peer).backward()
        training.optimizer.step()

    return Variant(step if case.train else evaluate)


def measure(case: ModelCase, preset: Preset, device: torch.device, peers: Sequence[Peer]) -> Row:
    """Loss and gradients of every peer against a float64 copy of the model, then memory, then time in turn."""
    training = build(case, device)
    entries = equality.check(
        peers,
        device,
        DTYPES[case.dtype],
        _exact(training, case),
        lambda peer: _evaluate(training, case, peer),
        lambda: _tidy(training),
    )
    ready = [peer for peer in peers if entries[peer.name].status == OK]
    for peer in ready if case.memory else ():
        turns.take(peer.name)
        _measure_memory(peer, training, case, entries[peer.name])
    variants = {peer.name: variant_of(peer, training, case) for peer in ready}
    timings = interleaved(variants, clock_for(device), preset.rounds, preset.warmup, preset.seconds_per_variant)
    for peer in ready:
        record(entries[peer.name], timings, tokens=case.batch * case.sequence)
    return Row(suite=case.suite, label=case.label, case=asdict(case), entries=list(entries.values()))


def _evaluate(training: Training, case: ModelCase, peer: Peer) -> Values:
    if not case.train:
        with torch.no_grad():
            return Values(training.loss(peer).detach(), {})
    training.optimizer.zero_grad(set_to_none=True)
    loss = training.loss(peer)
    (loss * equality.UPSTREAM).backward()
    return Values(loss.detach(), _gradients(training.watched(training.model), equality.UPSTREAM))


def _gradients(watched: dict[str, nn.Parameter], upstream: float) -> dict[str, Tensor]:
    gradients = {}
    for name, parameter in watched.items():
        if parameter.grad is None:
            raise equality.NotEqualError(f"gives no gradient for {name}")
        gradients[name] = parameter.grad.detach() / upstream
    return gradients


def _exact(training: Training, case: ModelCase) -> Values:
    """The head's loss from the formula of Eq. 2, the trunk by autograd, both in float64."""
    model = copy.deepcopy(training.model).double()
    if case.train:  # what float64 layers keep for their backward pass would fill a GPU
        if hasattr(model, "activation_checkpointing_enable"):  # the name that stays in transformers 6
            model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        else:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    with torch.set_grad_enabled(case.train):
        hidden_MD = training.hidden_MD(model)
    leaf_MD = hidden_MD.detach().requires_grad_(case.train)
    head_VD = model.lm_head.weight.detach().requires_grad_(case.train)  # type: ignore[operator, union-attr]
    values = equality.exact(Problem(leaf_MD, head_VD, training.labels_M, training.weighting))
    if not case.train:
        return values
    hidden_MD.backward(values.gradients["scores"])
    projector = model.model.multi_modal_projector.linear_1.weight.grad  # type: ignore[union-attr]
    return Values(values.loss, {"head": values.gradients["weight"], "projector": projector})  # type: ignore[dict-item]


def _measure_memory(peer: Peer, training: Training, case: ModelCase, entry: Entry) -> None:
    """Peak above parameters and optimizer states: activations, gradients and what the loss needs."""
    try:
        variant = variant_of(peer, training, case)
        if training.labels_M.is_cuda:
            variant.run(None)  # the optimizer makes its states in its first step
            _tidy(training)
            entry.memory = memory.cuda_peak(lambda: variant.run(None), 0)
        else:
            entry.memory = memory.process_peak(peer.name, case)
    except Exception as error:
        require_device()
        entry.memory_error = describe(error)
    _tidy(training)


def _tidy(training: Training) -> None:
    training.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if training.labels_M.is_cuda:
        torch.cuda.empty_cache()


def _as_model(value: Tensor, model: nn.Module) -> Tensor:
    """Floating-point inputs in the dtype of the model."""
    return value.to(next(model.parameters()).dtype) if value.is_floating_point() else value


def step_for_memory(peer: Peer, case: ModelCase) -> tuple[Callable[[], Any], Callable[[], None]]:
    """A step, and what clears up after it, for a process that measures itself."""
    training = build(case, torch.device("cpu"))
    variant = variant_of(peer, training, case)
    return lambda: variant.run(None), lambda: _tidy(training)
