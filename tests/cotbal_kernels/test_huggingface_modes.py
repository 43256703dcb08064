"""A patched model under torch.compile, activation checkpointing, autocast and fp16 loss scaling, and its memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from loss_problems import FP32, error
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

transformers = pytest.importorskip("transformers")

from hf_models import (  # noqa: E402
    TEXT,
    assert_same_gradients,
    batch_for,
    build,
    gradients,
    labels_for,
    one_thread,  # noqa: F401
)

from cotbal_kernels.huggingface import apply_fused_loss, set_task_weights  # noqa: E402
from cotbal_kernels.reference import reference_task_cross_entropy  # noqa: E402

LAM = [1.7, 0.2, 0.9]
# The same operations, in an order of the compiler's.
SAME_OPERATIONS = 1e-6


def case(kind: str, **changes: Any) -> tuple[nn.Module, dict[str, Any]]:
    batch = batch_for(kind)
    labels = labels_for(batch)
    ids = torch.arange(labels.numel()).reshape(labels.shape) % 3
    return apply_fused_loss(build(kind, **changes), LAM), batch | {"labels": labels, "loss_task_ids": ids}


def step(model: nn.Module, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(**kwargs).loss
    loss.backward()
    return loss.detach(), gradients(model)


# --- torch.compile ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "warm"), [("internvl", True), ("gemma2", False)])
def test_compiled_whole(kind: str, warm: bool) -> None:
    """One graph, compiled once: neither the loss nor new weights break it."""
    torch._dynamo.reset()
    model, kwargs = case(kind, num_hidden_layers=1)
    kwargs |= {"num_items_in_batch": torch.tensor(11.0), "use_cache": False}
    twin, _ = case(kind, num_hidden_layers=1)
    if warm:
        model(**kwargs)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for weights in (LAM, [0.3, 1.0, 2.0]):
        set_task_weights(compiled, weights)
        set_task_weights(twin, weights)
        loss, found = step(twin, kwargs)
        out = compiled(**kwargs)
        out.loss.backward()
        assert out.logits is None
        assert out.task_tokens.sum() == 15
        assert error(out.loss, loss) <= FP32
        assert_same_gradients(gradients(model), found, SAME_OPERATIONS)
    assert counter.frame_count == 1


def test_compiled_lora_head() -> None:
    peft = pytest.importorskip("peft")
    torch._dynamo.reset()
    model, kwargs = case("llama", num_hidden_layers=1)
    config = peft.LoraConfig(r=3, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    loss, wanted = step(model, kwargs)
    compiled = torch.compile(model.get_base_model(), fullgraph=True, backend="aot_eager")
    out = compiled(**kwargs, use_cache=False)
    out.loss.backward()
    assert error(out.loss, loss) <= FP32
    assert_same_gradients(gradients(model), wanted, SAME_OPERATIONS)


def test_compiled_at_once_with_a_scaling_that_the_config_does_not_tell() -> None:
    """Nothing was measured, and the guess is wrong: the loss is NaN rather than another number."""
    torch._dynamo.reset()
    model, kwargs = case("llama", num_hidden_layers=1)
    own = model.lm_head.fused
    own.scaling = type(own.scaling).of(2.0)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert compiled(**kwargs, use_cache=False).loss.isnan()
    model(**kwargs)
    assert compiled(**kwargs, use_cache=False).loss.isfinite()


# --- activation checkpointing, dtypes ---------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["llama", "llava", "gemma2"])
def test_activation_checkpointing(kind: str, reentrant: bool) -> None:
    model, kwargs = case(kind)
    model.train()
    loss, wanted = step(model, kwargs)
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    recomputed = []
    layer = next(module for name, module in model.named_modules() if name.endswith("layers.0.mlp"))
    layer.register_forward_pre_hook(lambda *args: recomputed.append(1))
    again, found = step(model, kwargs)
    assert len(recomputed) == 2
    assert error(again, loss) <= FP32
    assert_same_gradients(found, wanted, SAME_OPERATIONS)


def test_bfloat16_model_keeps_float32_weights() -> None:
    """A weight of 2.01 cast to bf16 would be 2.016: the loss would be off by 0.3 %."""
    model = apply_fused_loss(build("cohere"), torch.tensor([2.01, 1.0])).bfloat16()
    batch = batch_for("cohere")
    ids, labels = torch.tensor([0, 1, 1]), labels_for(batch)
    out = model(**batch, labels=labels, loss_task_ids=ids)
    hidden = model.model(**batch).last_hidden_state
    logits = 7.0 * hidden.double() @ model.lm_head.weight.double().t()
    expected = reference_task_cross_entropy(logits, labels, ids, torch.tensor([2.01, 1.0]), shift=True)
    assert error(out.loss, expected.loss) <= FP32


def test_autocast() -> None:
    """bf16 autocast: the head's operands are rounded to bf16, the softmax is not; the gradients are float32."""
    model, kwargs = case("gemma2")
    seen = {}
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.update(hidden=args[0].detach()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, found = step(model, kwargs)
    hidden, weight = seen["hidden"].bfloat16().double(), model.lm_head.weight.bfloat16().double()
    logits = 0.5 * torch.tanh(hidden @ weight.t() / 0.5)
    ids, labels = kwargs["loss_task_ids"], kwargs["labels"]
    expected = reference_task_cross_entropy(logits, labels, ids, torch.tensor(LAM), shift=True)
    assert error(loss, expected.loss) <= FP32
    exact = step(case("gemma2")[0], kwargs)[1]
    assert {g.dtype for g in found.values()} == {torch.float32}
    # bf16 keeps 8 bits; two layers of products between the head and the embeddings
    assert_same_gradients(found, exact, 8 * 2**-8)


def test_fp16_loss_scaling() -> None:
    """torch.amp's scaler: gradients of fp16 activations, unscaled, are those of float32; no overflow is found."""
    model, kwargs = case("llama")
    exact = step(model, kwargs)[1]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.autocast("cpu", dtype=torch.float16):
        loss = model(**kwargs).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    assert_same_gradients(found, exact, 8 * 2**-11)  # fp16 keeps 11 bits; two layers
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**15
    assert any(not torch.equal(before[n], p) for n, p in model.named_parameters())


def test_fp16_model_with_a_large_loss_scale() -> None:
    """Linear in the scale: a gradient that fp16 would lose without it is kept."""
    model, kwargs = case("llama")
    exact = step(model, kwargs)[1]
    model.half()
    (model(**kwargs).loss * 2.0**12).backward()
    found = {n: g.float() / 2.0**12 for n, g in gradients(model).items()}
    assert_same_gradients(found, exact, 16 * 2**-11)  # parameters and gradients in fp16 too


# --- threads ----------------------------------------------------------------------------------------------


def in_a_thread(work: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def test_another_thread_during_a_labelled_pass() -> None:
    """Without labels it gets its logits, with labels it is refused; the pass that it came into is not disturbed."""
    model, kwargs = case("llama")
    batch = batch_for("llama")
    logits = model(**batch).logits
    loss, wanted = step(model, kwargs)
    seen = []

    def meanwhile(module: nn.Module, args: Any, output: Any) -> None:
        if not seen:
            seen.append(None)  # once, not in the other thread's own pass
            seen.append(in_a_thread(lambda: model(**batch).logits))
            with pytest.raises(ValueError, match="LlamaForCausalLM is in a labelled forward pass of another thread"):
                in_a_thread(lambda: model(**kwargs))

    model.model.norm.register_forward_hook(meanwhile)  # between the start of the pass and the head
    again, found = step(model, kwargs)
    assert torch.equal(seen[1], logits)
    assert error(again, loss) <= FP32
    assert_same_gradients(found, wanted, SAME_OPERATIONS)


def test_recomputation_in_another_thread() -> None:
    """As the autograd engine does it on a GPU: the whole labelled pass runs again in the thread of the backward."""
    model, kwargs = case("llama")
    loss, wanted = step(model, kwargs)
    again = checkpoint(lambda: model(**kwargs).loss, use_reentrant=False)
    in_a_thread(again.backward)
    assert error(again.detach(), loss) <= FP32
    assert_same_gradients(gradients(model), wanted, SAME_OPERATIONS)


# --- memory -----------------------------------------------------------------------------------------------

WIDE = {"vocab_size": 12000, "max_position_embeddings": 2048}


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation returns, views of nothing larger included."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        return out


def wide_step(fused: bool, sequences: int) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT | WIDE))
    if fused:
        apply_fused_loss(model, chunk_size=64)
    ids = torch.randint(3, 11000, (sequences, 256), generator=torch.Generator().manual_seed(1))
    model(input_ids=ids, labels=ids).loss.backward()


def test_no_operation_makes_the_logits() -> None:
    """The operations inside the op included; the largest is the head's weight, or the attention's mask."""
    sizes = {}
    for fused in (True, False):
        with Largest() as largest:
            wide_step(fused, 8)
        sizes[fused] = largest.elements
    rows = 8 * 256
    assert sizes[False] >= rows * 12000
    assert sizes[True] <= max(12000 * 32, 64 * 12000, rows * 48 * 2)


def test_peak_does_not_grow_with_the_logits(tmp_path: Path) -> None:
    """What torch has allocated at once, counted by its profiler. From 8 to 32 sequences the logits grow by 0.29 GB."""
    logits = 4 * 6144 * 12000
    # What grows without the logits: 6144 more positions through two layers of width 32 and 48, about 40 floats of 32
    # kept for each, and attention of 256 x 256 for 4 heads.
    trunk = 4 * 6144 * (40 * 32 + 2 * 4 * 256)
    assert trunk < 0.3 * logits
    growth = {fused: _peak(fused, 32, tmp_path) - _peak(fused, 8, tmp_path) for fused in (True, False)}
    assert growth[False] > logits
    assert growth[True] < trunk


def _peak(fused: bool, sequences: int, folder: Path) -> int:
    """The largest number of bytes that a step holds at once, of those that it allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        wide_step(fused, sequences)
    profiled.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    held: dict[int, int] = {}  # by address: what was there before may be freed meanwhile
    total = peak = 0
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        if size > 0:
            held[address] = size
            total += size
        else:
            total -= held.pop(address, 0)
        peak = max(peak, total)
    return peak
