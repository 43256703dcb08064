"""Many architectures, patched, against themselves unpatched and against Eq. 2 in float64."""

from __future__ import annotations

import pytest
import torch
from loss_problems import FP32, error

transformers = pytest.importorskip("transformers")

from hf_models import (  # noqa: E402
    MODELS,
    TEXT_MODELS,
    assert_same_gradients,
    batch_for,
    build,
    gradients,
    labels_for,
    one_thread,  # noqa: F401
)

from cotbal_kernels.huggingface import apply_fused_loss, fused_loss, remove_fused_loss  # noqa: E402
from cotbal_kernels.reference import reference_task_cross_entropy  # noqa: E402

TWO_LAYERS = 1e-5  # float32 roundings of another order in the head, carried through the trunk's backward pass
OLDEST = transformers.__version__.startswith("5.17.")
SCALINGS = {
    "gemma2": (1.0, 0.5),
    "gemma3_text": (1.0, 0.7),
    "paligemma": (1.0, 0.5),
    "recurrent_gemma": (1.0, 0.5),
    "granite": (8.0, None),
    "granitemoe": (8.0, None),
    "cohere": (7.0, None),
    "cohere2": (0.0625, None),
    "falcon_h1": (3.0, None),
    "aya_vision": (1.0, None),  # its config has logit_scale 0.0625, its code does not apply it
}


@pytest.mark.parametrize("kind", MODELS)
def test_equals_the_model_unpatched(kind: str) -> None:
    model = build(kind)
    batch = batch_for(kind)
    labels = labels_for(batch)
    for extra in ({}, {"num_items_in_batch": torch.tensor(40)}):
        own = model(**batch, labels=labels, **extra)
        own.loss.backward()
        wanted = gradients(model)
        guessed = fused_loss(apply_fused_loss(model)).scaling
        for _ in range(2):  # the first pass measures the scaling
            out = model(**batch, labels=labels, **extra)
            out.loss.backward()
            assert out.logits is None
            assert error(out.loss, own.loss) <= FP32
            assert_same_gradients(gradients(model), wanted, TWO_LAYERS)
        scaling = fused_loss(model).scaling
        left_out = OLDEST and kind == "paligemma"  # 5.17 does not apply the cap of its config
        assert (scaling.scale, scaling.softcap) == ((1.0, None) if left_out else SCALINGS.get(kind, (1.0, None)))
        assert guessed == scaling or left_out
        remove_fused_loss(model)


@pytest.mark.parametrize("kind", MODELS)
def test_weights_are_eq_2(kind: str) -> None:
    """Three tasks with random weights, mixed within sequences; the logits are those of the model unpatched."""
    model = build(kind)
    batch = batch_for(kind)
    labels = labels_for(batch)
    lam = torch.rand(3, generator=torch.Generator().manual_seed(2)) * 2 + 0.1
    ids = torch.arange(labels.numel()).reshape(labels.shape) % 3
    # The labels go along: PaliGemma masks the prefix by them.
    logits = model(**batch, labels=labels).logits
    expected = reference_task_cross_entropy(logits, labels, ids, lam, shift=True)
    expected.loss.backward()
    wanted = gradients(model)
    apply_fused_loss(model, lam)
    out = model(**batch, labels=labels, loss_task_ids=ids)
    out.loss.backward()
    assert error(out.loss, expected.loss) <= FP32
    assert error(out.task_loss, expected.task_loss) <= FP32
    assert out.task_tokens.tolist() == expected.task_tokens.tolist()
    assert out.task_correct.tolist() == expected.task_correct.tolist()
    assert_same_gradients(gradients(model), wanted, TWO_LAYERS)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "llava", "qwen2_vl"])
def test_tied(kind: str) -> None:
    model = build(kind, tie_word_embeddings=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    batch = batch_for(kind)
    own = model(**batch, labels=labels_for(batch))
    own.loss.backward()
    wanted = gradients(model)
    apply_fused_loss(model)
    out = model(**batch, labels=labels_for(batch))
    out.loss.backward()
    assert error(out.loss, own.loss) <= FP32
    assert_same_gradients(gradients(model), wanted, TWO_LAYERS)


@pytest.mark.parametrize("kind", ["mixtral", "granitemoe"])
def test_router_loss_is_added(kind: str) -> None:
    if OLDEST and kind == "granitemoe":
        pytest.skip("granitemoe of transformers 5.17 has no router loss and fails when asked for one")
    model = build(kind, output_router_logits=True, router_aux_loss_coef=0.3)
    batch = batch_for(kind)
    own = model(**batch, labels=labels_for(batch))
    own.loss.backward()
    wanted = gradients(model)
    apply_fused_loss(model)
    out = model(**batch, labels=labels_for(batch))
    out.loss.backward()
    assert float(own.aux_loss) > 0.1
    assert error(out.loss, own.loss) <= FP32
    assert torch.equal(out.aux_loss, own.aux_loss)
    assert error(out.loss - 0.3 * out.aux_loss, out.task_loss.sum() / out.task_tokens.sum()) <= 2 * FP32
    assert_same_gradients(gradients(model), wanted, TWO_LAYERS)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_shift_labels(kind: str) -> None:
    """Labels that are shifted already, as transformers passes them under context parallelism."""
    model = build(kind)
    batch = batch_for(kind)
    labels = labels_for(batch)
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    shifted[0, -1] = 5  # what a shift here would drop
    own = model(**batch, labels=labels, shift_labels=shifted)
    own.loss.backward()
    wanted = gradients(model)
    apply_fused_loss(model)
    for kwargs in ({"labels": labels, "shift_labels": shifted}, {"shift_labels": shifted}):
        out = model(**batch, **kwargs)
        out.loss.backward()
        assert error(out.loss, own.loss) <= FP32
        assert_same_gradients(gradients(model), wanted, TWO_LAYERS)


def test_the_models_are_many() -> None:
    assert len(TEXT_MODELS) >= 17
    assert len(MODELS) >= 27
