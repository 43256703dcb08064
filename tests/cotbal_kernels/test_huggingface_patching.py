"""What patching changes in a transformers model, what it leaves alone, and what it refuses."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from loss_problems import FP32, error
from torch import nn

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

from cotbal_kernels.huggingface import (  # noqa: E402
    apply_fused_loss,
    fused_loss,
    remove_fused_loss,
    set_task_weights,
)
from cotbal_kernels.reference import reference_task_cross_entropy  # noqa: E402


def test_weights_can_be_set() -> None:
    """One task per sequence, and weights replaced between steps."""
    model = build("llama")
    batch = batch_for("llama")
    labels = labels_for(batch)
    ids = torch.tensor([0, 2, 1])
    logits = model(**batch).logits
    first = torch.tensor([2.01, 0.3, 1.4])
    apply_fused_loss(model, first)
    for lam in ([2.01, 0.3, 1.4], [0.5, 1.0, 5.0]):
        set_task_weights(model, lam)
        expected = reference_task_cross_entropy(logits, labels, ids, torch.tensor(lam), shift=True)
        out = model(**batch, labels=labels, loss_task_ids=ids)
        assert error(out.loss, expected.loss) <= FP32
        assert error(out.task_loss, expected.task_loss) <= FP32
    assert first.tolist() == torch.tensor([2.01, 0.3, 1.4]).tolist()  # the caller's stay what they are


@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_nothing_else_changes(kind: str) -> None:
    model = build(kind).eval()
    batch = batch_for(kind)
    signature = inspect.signature(model.forward)
    state, head_keys = list(model.state_dict()), set(vars(model.lm_head))
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
    assert set(vars(model.lm_head)) == head_keys
    assert model.loss_function.__name__ == "ForCausalLMLoss"
    assert inspect.signature(model.forward) == signature
    with torch.no_grad():
        assert model(**batch, labels=labels_for(batch)).logits.shape[-1] == 97


def test_loss_runs_inside_the_call_of_the_head() -> None:
    """ZeRO-3 and FSDP gather the weight in hooks of the head: they must fire around the loss, and see a tuple."""
    model = apply_fused_loss(build("llama"))
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
    assert model(**batch).logits.shape == (3, 14, 97)


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
    for numbers in ("ab", ["a"], {"a": 1.0}, [[1.0], 2.0]):
        with pytest.raises(ValueError, match=r"task_weights must be numbers \[K\], got "):
            apply_fused_loss(model, numbers)
    with pytest.raises(ValueError, match="check must be True or False, got 'no'"):
        apply_fused_loss(model, check="no")
    for weights in (torch.ones(2, 2), torch.ones(0), []):
        with pytest.raises(ValueError, match=r"task_weights must be \[K\] with K >= 1"):
            apply_fused_loss(model, weights)
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

    head = model.lm_head
    model.lm_head = nn.Sequential(head)
    batch = batch_for("llama")
    with pytest.raises(ValueError, match=r"plain torch.nn.Linear.*got torch.nn.modules.container.Sequential"):
        model(**batch, labels=labels_for(batch))
    assert model(**batch).logits.shape == (3, 14, 97)
    model.lm_head = head
    model = remove_fused_loss(model)
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match=r"plain torch.nn.Linear.*Sequential"):
        apply_fused_loss(model)


def test_refuses_a_head_that_others_have_changed() -> None:
    model = build("llama")
    model.get_output_embeddings = lambda: None
    with pytest.raises(ValueError, match=r"plain torch\.nn\.Linear as output embeddings, got none: "):
        apply_fused_loss(model)
    del model.get_output_embeddings
    model.lm_head.forward = lambda hidden: 2 * nn.functional.linear(hidden, model.lm_head.weight)
    with pytest.raises(ValueError, match="the head of LlamaForCausalLM has a forward of its own"):
        apply_fused_loss(model)
    del model.lm_head.forward
    model.lm_head.weight.device_mesh = None  # what a DTensor is known by
    with pytest.raises(ValueError, match=r"head of LlamaForCausalLM is sharded .* before FSDP shards it"):
        apply_fused_loss(model)
    del model.lm_head.weight.device_mesh
    apply_fused_loss(model)
    ours = type(model.lm_head)
    model.lm_head.__class__ = type("Wrapped", (ours,), {})
    with pytest.raises(ValueError, match="head's class was changed to Wrapped after apply_fused_loss"):
        remove_fused_loss(model)
    model.lm_head.__class__ = ours
    assert type(remove_fused_loss(model).lm_head) is nn.Linear


def test_refuses_other_kinds_of_models() -> None:
    with pytest.raises(ValueError, match="causal language model, which T5ForConditionalGeneration is not"):
        apply_fused_loss(
            transformers.T5ForConditionalGeneration(
                transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=2, vocab_size=97)
            )
        )
    bart = transformers.BartConfig(
        **{k: v for k, v in TEXT.items() if k in ("vocab_size", "max_position_embeddings")},
        d_model=32,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=48,
    )
    with pytest.raises(ValueError, match=r"BartForCausalLM computes its loss in a way of its own"):
        apply_fused_loss(transformers.BartForCausalLM(bart))
    model = build("llama")
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum()
    with pytest.raises(ValueError, match=r"ForCausalLMLoss, got <lambda>"):
        apply_fused_loss(model)


def test_refuses_foreign_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    def lce_forward(self, input_ids=None, labels=None, **kwargs):
        raise AssertionError

    lce_forward.__module__ = "liger_kernel.transformers.model.llama"
    model = build("llama")
    monkeypatch.setattr(type(model), "forward", lce_forward)
    with pytest.raises(ValueError, match="liger_kernel already"):
        apply_fused_loss(model)


def test_refuses_another_ignored_label_and_a_loss_before_the_head() -> None:
    model = apply_fused_loss(build("llama"))
    batch = batch_for("llama")
    labels = labels_for(batch)
    with pytest.raises(ValueError, match="ignores label 3: pass ignore_index=3 when patching"):
        model(**batch, labels=labels, ignore_index=3)
    model.model.register_forward_hook(lambda *_: model.loss_function(torch.zeros(1, 1, 97), labels))
    with pytest.raises(RuntimeError, match="called its loss before its head"):
        model(**batch, labels=labels)


def test_refuses_losses_that_bypass_it() -> None:
    """Trainer's compute_loss_func takes the labels away; the weights would be ignored silently."""
    model = apply_fused_loss(build("llama")).train()
    for extra in ({"loss_task_ids": torch.tensor([0, 0, 0])}, {"num_items_in_batch": torch.tensor(3)}):
        with pytest.raises(ValueError, match="came without labels: either the batch has none, or compute_loss_func"):
            model(**batch_for("llama"), **extra)
        model.eval()(**batch_for("llama"), **extra)
        model.train()


def test_resized_vocabulary() -> None:
    """The head that transformers makes anew is patched in the next labelled pass."""
    model = apply_fused_loss(build("gemma2"))
    batch = batch_for("gemma2")
    model(**batch, labels=labels_for(batch))
    model.resize_token_embeddings(101)
    labels = labels_for(batch)
    labels[0, 9] = 100
    out = model(**batch, labels=labels)
    assert len(fused_loss(model).probe) == 101
    remove_fused_loss(model)
    own = model(**batch, labels=labels)
    assert own.logits.shape[-1] == 101
    assert error(out.loss, own.loss) <= FP32


def test_accelerate_hooks() -> None:
    """device_map="auto" replaces the bound forward of every module, the head's too."""
    pytest.importorskip("accelerate")
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = build("llama")
    batch = batch_for("llama")
    own = model(**batch, labels=labels_for(batch))
    for module in (model, model.lm_head):
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    apply_fused_loss(model)
    assert error(model(**batch, labels=labels_for(batch)).loss, own.loss) <= FP32
    assert torch.equal(model(**batch).logits, own.logits)
    remove_fused_loss(model)
    assert torch.equal(model(**batch, labels=labels_for(batch)).loss, own.loss)
