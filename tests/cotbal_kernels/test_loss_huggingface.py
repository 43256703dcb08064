"""Patched transformers models against the same models unpatched, and against Eq. 2 in float64."""

import copy
import inspect

import pytest
import torch
from loss_problems import FP32, error
from torch import nn

from cotbal_kernels.huggingface import FusedLinear, apply_fused_loss, remove_fused_loss, set_task_weights
from cotbal_kernels.reference import reference_task_cross_entropy

transformers = pytest.importorskip("transformers")

IMAGE = 90
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def build(kind: str, **text) -> nn.Module:
    torch.manual_seed(0)
    if kind == "gemma2":
        config = transformers.Gemma2Config(**TEXT, head_dim=8, final_logit_softcapping=0.5, **text)
        return transformers.Gemma2ForCausalLM(config)
    config = transformers.LlamaConfig(**TEXT, **text)
    if kind == "llama":
        return transformers.LlamaForCausalLM(config)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    tied = text.get("tie_word_embeddings", False)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=config, image_token_index=IMAGE, tie_word_embeddings=tied
    )
    return transformers.LlavaForConditionalGeneration(config)


def batch_for(kind: str) -> dict:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 80, (3, 12), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["attention_mask"][1, 9:] = 0
    if kind == "llava":
        ids[:, 1:5] = IMAGE  # 4 patches
        batch["pixel_values"] = torch.randn(3, 3, 16, 16, generator=generator)
    return batch


def labels_for(batch: dict) -> torch.Tensor:
    labels = batch["input_ids"].clone()
    labels[:, :6] = -100
    labels[1, 9:] = -100
    return labels


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(a: dict, b: dict, tolerance: float) -> None:
    assert a.keys() == b.keys()
    # Parameters whose gradient is tiny share the scale of the largest gradient: it is where rounding comes from.
    scale = max(float(g.abs().max()) for g in b.values())
    assert max(float((a[n] - b[n]).abs().max()) for n in b) <= tolerance * scale


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "llava", "gemma2"])
def test_equals_the_model_unpatched(kind: str, tied: bool) -> None:
    """With one task the loss is the model's own: same loss, same gradient of every parameter."""
    model = build(kind, tie_word_embeddings=tied)
    batch = batch_for(kind)
    labels = labels_for(batch)
    for extra in ({}, {"num_items_in_batch": torch.tensor(40)}):
        own = model(**batch, labels=labels, **extra)
        model.zero_grad()
        own.loss.backward()
        wanted = gradients(model)
        apply_fused_loss(model)
        model.zero_grad()
        out = model(**batch, labels=labels, **extra)
        out.loss.backward()
        assert out.logits is None
        assert out.loss.dim() == 0
        assert error(out.loss, own.loss) <= FP32
        assert_same_gradients(gradients(model), wanted, 5e-6)  # two layers of attention behind the loss
        remove_fused_loss(model)


@pytest.mark.parametrize("kind", ["llama", "llava"])
@pytest.mark.parametrize("per_token", [False, True])
def test_weights_are_eq_2(kind: str, per_token: bool) -> None:
    model = build(kind)
    batch = batch_for(kind)
    labels = labels_for(batch)
    lam = torch.tensor([2.01, 0.3, 1.4])
    ids = torch.tensor([0, 2, 1])
    if per_token:
        ids = torch.arange(36).reshape(3, 12) % 3
    logits = model(**batch).logits
    expected = reference_task_cross_entropy(logits, labels, ids, lam, shift=True)
    expected.loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    apply_fused_loss(model, lam)
    out = model(**batch, labels=labels, loss_task_ids=ids)
    out.loss.backward()
    assert error(out.loss, expected.loss) <= FP32
    assert error(out.task_loss, expected.task_loss) <= FP32
    assert out["task_tokens"].tolist() == expected.task_tokens.tolist()
    assert out.task_correct.tolist() == expected.task_correct.tolist()
    assert_same_gradients(gradients(model), wanted, 5e-6)
    # other weights
    new = torch.tensor([0.0, 1.0, 5.0])
    set_task_weights(model, new)
    expected = reference_task_cross_entropy(logits, labels, ids, new, shift=True)
    assert error(model(**batch, labels=labels, loss_task_ids=ids).loss, expected.loss) <= FP32


@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_nothing_else_changes(kind: str) -> None:
    model = build(kind).eval()
    batch = batch_for(kind)
    signature = inspect.signature(model.forward)
    state = list(model.state_dict())
    with torch.no_grad():
        logits = model(**batch).logits
        generated = model.generate(**batch, max_new_tokens=5, do_sample=False)
    apply_fused_loss(model, torch.tensor([2.0, 1.0]))
    patched = inspect.signature(model.forward)
    assert set(patched.parameters) - set(signature.parameters) == {"loss_task_ids"}
    assert list(model.state_dict()) == state
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, logits)
        assert torch.equal(
            model(batch["input_ids"], **{k: v for k, v in batch.items() if k != "input_ids"}).logits, logits
        )
        assert torch.equal(model.generate(**batch, max_new_tokens=5, do_sample=False), generated)
    remove_fused_loss(model)
    assert "forward" not in vars(model)
    assert type(model.lm_head) is nn.Linear
    assert not hasattr(model.lm_head, "fused")
    assert inspect.signature(model.forward) == signature
    with torch.no_grad():
        assert model(**batch, labels=labels_for(batch)).logits.shape[-1] == 97


def test_loss_runs_inside_the_call_of_the_head() -> None:
    """ZeRO-3 and FSDP gather the weight in hooks of the head: they must fire around the loss, and see a tuple."""
    model = apply_fused_loss(build("llama"), [1.0, 2.0])
    batch = batch_for("llama")
    seen = []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append("before"))
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(type(output)))
    model(**batch, labels=labels_for(batch))
    assert seen == ["before", tuple]


def test_gathered_weight_of_zero3() -> None:
    """The weight is empty outside the head's call, as under ZeRO-3; the result is the same."""
    model = build("llama")
    batch = batch_for("llama")
    labels = labels_for(batch)
    apply_fused_loss(model)
    model(**batch, labels=labels).loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    full = model.lm_head.weight.data

    def gather(module, args):
        module.weight.data = full

    def release(module, args, output):
        module.weight.data = full.new_empty(0)

    model.lm_head.weight.data = full.new_empty(0)
    model.lm_head.register_forward_pre_hook(gather)
    model.lm_head.register_forward_hook(release)
    out = model(**batch, labels=labels)
    model.lm_head.weight.data = full  # ZeRO-3 gathers again before the backward pass of the head
    out.loss.backward()
    assert_same_gradients(gradients(model), wanted, 1e-6)


@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_gradient_checkpointing(kind: str) -> None:
    model = apply_fused_loss(build(kind), [1.0, 3.0]).train()
    batch = batch_for(kind)
    kwargs = {"labels": labels_for(batch), "loss_task_ids": torch.tensor([0, 1, 1])}
    model(**batch, **kwargs).loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**batch, **kwargs).loss.backward()
    assert_same_gradients(gradients(model), wanted, 1e-6)


def test_frozen_head() -> None:
    model = apply_fused_loss(build("llama"))
    model.lm_head.weight.requires_grad_(False)
    batch = batch_for("llama")
    model(**batch, labels=labels_for(batch)).loss.backward()
    assert model.lm_head.weight.grad is None
    assert float(model.model.layers[0].mlp.up_proj.weight.grad.abs().max()) > 0


def test_bfloat16_model_keeps_float32_weights() -> None:
    """A weight of 2.01 cast to bf16 would be 2.016: the loss would be off by 0.3 %."""
    model = apply_fused_loss(build("llama"), torch.tensor([2.01, 1.0])).bfloat16()
    batch = batch_for("llama")
    ids, labels = torch.tensor([0, 1, 1]), labels_for(batch)
    out = model(**batch, labels=labels, loss_task_ids=ids)
    hidden = model.model(**batch).last_hidden_state
    logits = hidden.double() @ model.lm_head.weight.double().t()
    expected = reference_task_cross_entropy(logits, labels, ids, torch.tensor([2.01, 1.0]), shift=True)
    assert error(out.loss, expected.loss) <= FP32


def test_copies_are_independent() -> None:
    """A deep copy (EMA, reference model) runs its own weights, not those of the original."""
    model = apply_fused_loss(build("llama"), [1.0, 3.0])
    batch = batch_for("llama")
    kwargs = {"labels": labels_for(batch), "loss_task_ids": torch.tensor([0, 1, 1])}
    twin = copy.deepcopy(model)
    before = model(**batch, **kwargs).loss
    with torch.no_grad():
        twin.lm_head.weight.mul_(2)
    set_task_weights(twin, [3.0, 1.0])
    assert torch.equal(model(**batch, **kwargs).loss, before)
    assert not torch.equal(twin(**batch, **kwargs).loss, before)


def test_output_forms() -> None:
    model = apply_fused_loss(build("llama"))
    batch = batch_for("llama")
    labels = labels_for(batch)
    out = model(**batch, labels=labels)
    as_tuple = model(**batch, labels=labels, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], out.loss)
    rebuilt = torch.utils._pytree.tree_map(lambda x: x, out)  # what DDP and FSDP do to an output
    assert torch.equal(rebuilt.task_loss, out.task_loss)


def test_failed_step_leaves_nothing_behind() -> None:
    model = apply_fused_loss(build("llama"))
    batch = batch_for("llama")
    with pytest.raises(ValueError, match=r"labels must be"):
        model(**batch, labels=labels_for(batch)[:, :5])
    assert model(**batch).logits.shape == (3, 12, 97)


def test_refusals() -> None:
    model = build("llama")
    with pytest.raises(ValueError, match="does not carry the fused loss"):
        remove_fused_loss(model)
    with pytest.raises(ValueError, match="does not carry the fused loss"):
        set_task_weights(model, [1.0])
    with pytest.raises(ValueError, match="num_tasks is 3 but task_weights has 2"):
        apply_fused_loss(model, [1.0, 2.0], num_tasks=3)
    with pytest.raises(ValueError, match=r"got -1\.0 for task 1"):
        apply_fused_loss(model, [1.0, -1.0])
    with pytest.raises(ValueError, match="task_weights must be float32"):
        apply_fused_loss(model, torch.ones(2).bfloat16())
    with pytest.raises(ValueError, match="aggregation must be 'token', 'task' or 'sum'"):
        apply_fused_loss(model, aggregation="none")
    with pytest.raises(ValueError, match=r"label_smoothing must be in"):
        apply_fused_loss(model, label_smoothing=2.0)
    with pytest.raises(ValueError, match="backend='magic' does not exist"):
        apply_fused_loss(model, backend="magic")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="backend='triton' cannot run here: it needs a CUDA device"):
            apply_fused_loss(model, backend="triton")
    assert type(model.lm_head) is nn.Linear  # nothing was half done
    apply_fused_loss(model, num_tasks=2)
    with pytest.raises(ValueError, match="patched already"):
        apply_fused_loss(model)
    with pytest.raises(ValueError, match="must keep K = 2, got 3"):
        set_task_weights(model, [1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="PreTrainedModel, got Linear"):
        apply_fused_loss(nn.Linear(2, 2))

    class LoraLinear(nn.Module):  # as PEFT does it: no nn.Linear
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base_layer = base

    head = model.lm_head
    model.lm_head = LoraLinear(head)
    batch = batch_for("llama")
    with pytest.raises(ValueError, match=r"does not carry the fused loss.*LoraLinear"):
        model(**batch, labels=labels_for(batch))
    model.lm_head = head
    model = remove_fused_loss(model)
    model.lm_head = LoraLinear(model.lm_head)
    with pytest.raises(ValueError, match=r"plain torch.nn.Linear.*LoraLinear"):
        apply_fused_loss(model)


def test_refuses_foreign_losses_and_scaled_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    def lce_forward(self, input_ids=None, labels=None, **kwargs):
        raise AssertionError

    lce_forward.__module__ = "liger_kernel.transformers.model.llama"
    model = build("llama")
    monkeypatch.setattr(type(model), "forward", lce_forward)
    with pytest.raises(ValueError, match="liger_kernel already"):
        apply_fused_loss(model)
    monkeypatch.undo()
    model.config.logits_scaling = 8.0
    with pytest.raises(ValueError, match=r"scales its logits .logits_scaling"):
        apply_fused_loss(model)
    model.config.logits_scaling = 1.0
    assert isinstance(apply_fused_loss(model).lm_head, FusedLinear)
