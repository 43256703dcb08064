"""PEFT: adapters in the trunk, around the head, and a trainable copy of the head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_problems import FP32, error
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from hf_models import assert_same_gradients, batch_for, build, gradients, labels_for, one_thread  # noqa: E402, F401

from cotbal_kernels import functional  # noqa: E402
from cotbal_kernels.huggingface import apply_fused_loss, remove_fused_loss, set_task_weights  # noqa: E402
from cotbal_kernels.reference import reference_task_cross_entropy  # noqa: E402

LAM = [1.7, 0.2, 0.9]
TRUNK = ["q_proj", "up_proj"]
TWO_LAYERS = 1e-5  # see test_huggingface_architectures.py


def with_lora(model: nn.Module, **changes: Any) -> Any:
    """LoRA whose second matrices are not zero, as after some training."""
    defaults = {"r": 3, "lora_alpha": 5, "target_modules": [*TRUNK, "lm_head"], "lora_dropout": 0.0}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **defaults | changes))
    randomise(wrapped)
    return wrapped.eval()


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3, generator=generator)


def case(kind: str = "llama") -> tuple[dict[str, Tensor], Tensor, Tensor]:
    batch = batch_for(kind)
    labels = labels_for(batch)
    return batch, labels, torch.arange(labels.numel()).reshape(labels.shape) % 3


def expected(model: nn.Module, kind: str = "llama", lam: Any = LAM) -> tuple[Any, dict[str, Tensor]]:
    """Eq. 2 in float64 on the logits of the PEFT model as PEFT runs it, and its gradients."""
    batch, labels, ids = case(kind)
    result = reference_task_cross_entropy(model(**batch).logits, labels, ids, torch.tensor(lam), shift=True)
    result.loss.backward()
    return result, gradients(model)


def check(model: nn.Module, wanted: tuple[Any, dict[str, Tensor]], kind: str = "llama") -> None:
    batch, labels, ids = case(kind)
    for _ in range(2):
        out = model(**batch, labels=labels, loss_task_ids=ids)
        out.loss.backward()
        assert out.logits is None
        assert error(out.loss, wanted[0].loss) <= FP32
        assert error(out.task_loss, wanted[0].task_loss) <= FP32
        assert_same_gradients(gradients(model), wanted[1], TWO_LAYERS)


def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, ...]]:
    """Which gradients the op is asked for, call by call."""
    needs: list[tuple[bool, ...]] = []
    op = functional.ops.linear_task_ce

    def spy(*args: Any) -> Any:
        needs.append(tuple(args[8]))
        return op(*args)

    monkeypatch.setattr(functional.ops, "linear_task_ce", spy)
    return needs


@pytest.mark.parametrize("kind", ["llama", "qwen2_5_vl"])
def test_trunk_only(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The frozen head costs no gradient."""
    needs = asked(monkeypatch)
    model = with_lora(build(kind), target_modules=TRUNK)
    wanted = expected(model, kind)
    apply_fused_loss(model, LAM)
    check(model, wanted, kind)
    assert needs == [(True, False, False)] * 2
    assert model.get_base_model().lm_head.weight.grad is None


@pytest.mark.parametrize("first", ["patch", "adapters"])
@pytest.mark.parametrize(
    "changes", [{}, {"use_rslora": True, "r": 16}, {"lora_bias": True}, {"target_modules": ["lm_head"]}]
)
def test_around_the_head(changes: dict[str, Any], first: str) -> None:
    wanted = expected(with_lora(build("llama"), **changes))
    assert any("lm_head.lora_B" in name for name in wanted[1])
    if first == "patch":
        model = with_lora(apply_fused_loss(build("llama"), LAM), **changes)
    else:
        model = apply_fused_loss(with_lora(build("llama"), **changes), LAM)
    check(model, wanted)
    set_task_weights(model, [0.3, 1.0, 2.0])
    check(model, expected_after(model, changes))


def expected_after(model: nn.Module, changes: dict[str, Any]) -> Any:
    return expected(with_lora(build("llama"), **changes), lam=[0.3, 1.0, 2.0])


def test_scaled_head_with_bias_and_an_image() -> None:
    """Everything that a head can have at once: LoRA, bias, soft-cap, scale, images."""
    changes = {"target_modules": ["q_proj", "lm_head"], "lora_bias": True}
    for kind in ("gptj", "cohere", "paligemma"):
        trained = with_lora(build(kind), **changes).eval()
        batch, labels, ids = case(kind)
        logits = trained(**batch, labels=labels).logits
        result = reference_task_cross_entropy(logits, labels, ids, torch.tensor(LAM), shift=True)
        result.loss.backward()
        wanted = result, gradients(trained)
        check(apply_fused_loss(trained, LAM), wanted, kind)


def test_dropout() -> None:
    """In training mode the adapter sees dropped features, the frozen weight whole ones: the same random draws."""
    batch, labels, _ = case()
    results = []
    for fused in (False, True):
        model = with_lora(build("llama"), lora_dropout=0.4).train()
        if fused:
            apply_fused_loss(model)
        torch.manual_seed(7)
        out = model(**batch, labels=labels)
        out.loss.backward()
        results.append((out.loss, gradients(model)))
    assert error(results[1][0], results[0][0]) <= FP32
    assert_same_gradients(results[1][1], results[0][1], TWO_LAYERS)


def test_several_adapters() -> None:
    """Both active, one of them, and none: whatever PEFT has switched on."""
    model = with_lora(build("llama"))
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["lm_head"]))
    randomise(model)
    batch, labels, _ = case()
    apply_fused_loss(model)
    losses = set()
    for active in (["default", "second"], ["second"], ["default"]):
        model.base_model.set_adapter(active)
        own = reference_task_cross_entropy(
            model(**batch).logits, labels, torch.zeros(3).long(), torch.ones(1), shift=True
        )
        own.loss.backward()
        wanted = gradients(model)
        out = model(**batch, labels=labels)
        out.loss.backward()
        assert error(out.loss, own.loss) <= FP32
        assert_same_gradients(gradients(model), wanted, TWO_LAYERS)
        losses.add(round(float(out.loss), 4))
    with model.disable_adapter():
        out = model(**batch, labels=labels)
    assert error(out.loss, build("llama")(**batch, labels=labels).loss) <= FP32
    assert len(losses | {round(float(out.loss), 4)}) == 4


def test_merged() -> None:
    model = apply_fused_loss(with_lora(build("llama")))
    batch, labels, _ = case()
    before = model(**batch, labels=labels).loss
    model.merge_adapter()
    assert error(model(**batch, labels=labels).loss, before) <= 1e-5  # W + s B A is rounded
    head = model.get_base_model().lm_head
    assert head.operands(torch.zeros(3, 14, 32))[1] is head.base_layer.weight  # no copy of it
    with model.disable_adapter():  # PEFT takes the adapter out of W again in this pass
        without = model(**batch, labels=labels).loss
    assert error(without, build("llama")(**batch, labels=labels).loss) <= 1e-5
    assert not head.merged
    assert error(model(**batch, labels=labels).loss, before) <= 1e-5
    merged = model.merge_and_unload()
    assert type(merged.lm_head) is nn.Linear
    assert error(merged(**batch, labels=labels).loss, before) <= 1e-5


@pytest.mark.parametrize("first", ["patch", "adapters"])
def test_modules_to_save(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"target_modules": TRUNK, "modules_to_save": ["lm_head"]}
    wanted = expected(with_lora(build("llama"), **changes))
    assert any("lm_head.modules_to_save.default.weight" in name for name in wanted[1])
    needs = asked(monkeypatch)
    if first == "patch":
        model = with_lora(apply_fused_loss(build("llama"), LAM), **changes)
    else:
        model = apply_fused_loss(with_lora(build("llama"), **changes), LAM)
    check(model, wanted)
    assert needs == [(True, True, False)] * 2
    batch, labels, ids = case()
    with model.disable_adapter():
        out = model(**batch, labels=labels, loss_task_ids=ids)
    own = reference_task_cross_entropy(build("llama")(**batch).logits, labels, ids, torch.tensor(LAM), shift=True)
    assert error(out.loss, own.loss) <= FP32


@pytest.mark.parametrize("changes", [{}, {"target_modules": TRUNK, "modules_to_save": ["lm_head"]}])
def test_removal(changes: dict[str, Any]) -> None:
    model = apply_fused_loss(with_lora(build("llama"), **changes))
    batch, labels, _ = case()
    types = {name: type(module) for name, module in with_lora(build("llama"), **changes).named_modules()}
    fused = model(**batch, labels=labels)
    remove_fused_loss(model)
    assert {name: type(module) for name, module in model.named_modules()} == types
    own = model(**batch, labels=labels)
    assert own.logits is not None
    assert error(fused.loss, own.loss) <= FP32


def test_removal_of_a_patch_below_lora() -> None:
    """LoRA came after the patch, and no labelled pass has seen it yet."""
    model = with_lora(apply_fused_loss(build("llama"), LAM))
    remove_fused_loss(model)
    wanted = {name: type(module) for name, module in with_lora(build("llama")).named_modules()}
    assert {name: type(module) for name, module in model.named_modules()} == wanted


def test_bfloat16_around_the_head() -> None:
    """PEFT keeps adapters in float32; the product is rounded to bf16 once more than PEFT's."""
    batch, labels, ids = case()
    model = with_lora(build("llama").bfloat16(), lora_bias=True)
    up = model.get_base_model().lm_head.lora_B["default"]
    assert up.weight.dtype == up.bias.dtype == torch.float32
    own = reference_task_cross_entropy(model(**batch).logits, labels, ids, torch.tensor(LAM), shift=True)
    own.loss.backward()
    wanted = gradients(model)
    apply_fused_loss(model, LAM)
    features, weight, _ = model.get_base_model().lm_head.operands(torch.zeros(3, 14, 32, dtype=torch.bfloat16))
    assert features.shape[-1] == weight.shape[1] == 48  # 32 + 3, and zeros up to rows of whole 16 bytes
    out = model(**batch, labels=labels, loss_task_ids=ids)
    out.loss.backward()
    found = gradients(model)
    assert error(out.loss, own.loss) <= 2**-8
    assert {name: g.dtype for name, g in found.items()} == {name: g.dtype for name, g in wanted.items()}
    assert_same_gradients(found, wanted, 8 * 2**-8)  # two layers in bf16


def test_prompt_tuning() -> None:
    """PEFT puts virtual tokens before the sequence and their labels, -100, before the labels."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    batch, labels, _ = case()
    ids = torch.tensor([0, 2, 1])
    results = []
    for fused in (False, True):
        torch.manual_seed(5)
        model = peft.get_peft_model(build("llama"), config).eval()
        if fused:
            apply_fused_loss(model, [1.0, 1.0, 1.0])
        out = model(**batch, labels=labels, **({"loss_task_ids": ids} if fused else {}))
        out.loss.backward()
        results.append((out.loss.detach(), gradients(model)))
    assert error(results[1][0], results[0][0]) <= FP32
    assert_same_gradients(results[1][1], results[0][1], TWO_LAYERS)


def test_saved_adapters_are_the_same(tmp_path: Any) -> None:
    models = [with_lora(build("llama")), apply_fused_loss(with_lora(build("llama")))]
    for name, model in zip("ab", models, strict=True):
        model.save_pretrained(tmp_path / name)
    from safetensors.torch import load_file

    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_refusals() -> None:
    batch, labels, _ = case()
    model = apply_fused_loss(with_lora(build("llama"), use_dora=True))
    with pytest.raises(ValueError, match=r"variant of LoRA .Dora.*leave the head out of target_modules"):
        model(**batch, labels=labels)
    config = peft.VeraConfig(r=3, target_modules=["lm_head"])
    with pytest.raises(ValueError, match=r"head wrapped by peft.tuners.vera.*modules_to_save are supported"):
        apply_fused_loss(peft.get_peft_model(build("llama"), config))
    with pytest.raises(ValueError, match=r"rows of its head trained by trainable_token_indices.*modules_to_save="):
        apply_fused_loss(with_lora(build("llama"), target_modules=TRUNK, trainable_token_indices={"lm_head": [1, 2]}))

    class Quantised(nn.Linear):
        pass

    Quantised.__module__ = "bitsandbytes.nn.modules"
    model = build("llama")
    model.lm_head.__class__ = Quantised
    with pytest.raises(ValueError, match=r"got bitsandbytes.nn.modules\.\S*Quantised.*llm_int8_skip_modules"):
        apply_fused_loss(model)
    with pytest.raises(ValueError, match=r"LoRA around a head of bitsandbytes.*leave a quantised head out"):
        apply_fused_loss(with_lora(model))
