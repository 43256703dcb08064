"""A patched model on its way through a program: copied, pickled, wrapped, unwrapped, patched under other defaults."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from hf_models import batch_for, build, labels_for, one_thread  # noqa: E402, F401

from cotbal_kernels.huggingface import apply_fused_loss, remove_fused_loss, set_task_weights  # noqa: E402
from cotbal_kernels.reference import reference_task_cross_entropy  # noqa: E402

LAM = [1.0, 9.0]
IDS = torch.tensor([0, 1, 1])


def case() -> dict[str, Any]:
    batch = batch_for("llama")
    return {**batch, "labels": labels_for(batch), "loss_task_ids": IDS}


def wanted() -> float:
    """Eq. 2 on the logits of the unpatched model."""
    batch = batch_for("llama")
    logits = build("llama")(**batch).logits
    return float(reference_task_cross_entropy(logits, labels_for(batch), IDS, torch.tensor(LAM), shift=True).loss)


def test_pickling_is_refused_and_copies_are_not() -> None:
    """Pickled, ``model.forward`` would come back as the class's, and the loss without its weights."""
    model = apply_fused_loss(build("llama"), LAM)
    with pytest.raises(ValueError, match="cannot be pickled: save it with save_pretrained or its state_dict"):
        pickle.dumps(model)
    twin = copy.deepcopy(model)
    set_task_weights(model, [3.0, 0.0])
    assert float(twin(**case()).loss) == pytest.approx(wanted(), rel=1e-6)
    pickle.loads(pickle.dumps(remove_fused_loss(model)))


def test_outputs_can_be_pickled() -> None:
    out = apply_fused_loss(build("llama"), LAM)(**case())
    with torch.no_grad():
        again = pickle.loads(pickle.dumps(type(out)(**{key: value.detach() for key, value in out.items()
                                                        if isinstance(value, torch.Tensor)})))  # fmt: skip
    assert type(again) is type(out)
    assert again.loss == out.loss
    assert torch.equal(again.task_loss, out.task_loss)


def test_the_wrapper_of_mixed_precision_comes_off_and_the_loss_stays() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # of other tests
    model = apply_fused_loss(build("llama"), LAM)
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(model)
    with pytest.raises(ValueError, match="keep_fp32_wrapper=False"):
        remove_fused_loss(prepared)
    plain = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert float(plain(**case()).loss) == pytest.approx(wanted(), rel=1e-6)
    assert remove_fused_loss(plain)(**batch_for("llama")).logits.shape[-1] == plain.config.vocab_size
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_a_forward_that_goes_around_the_patch_is_an_error() -> None:
    model = apply_fused_loss(build("llama"), LAM)
    given = case()
    del given["loss_task_ids"]
    with pytest.raises(ValueError, match="reached around its patched forward"):
        type(model).forward(model, **given)


@pytest.mark.parametrize("lam", [None, LAM])
def test_defaults_of_torch_do_not_matter(lam: list[float] | None) -> None:
    """Probes and weights are float32 numbers on the CPU, whatever new tensors are by default."""
    model, other = build("llama"), build("llama")
    torch.set_default_dtype(torch.bfloat16)
    try:
        apply_fused_loss(model, lam, num_tasks=2)
        loss = float(model(**case()).loss)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        apply_fused_loss(other, lam, num_tasks=2)
    assert loss == pytest.approx(float(other(**case()).loss), rel=1e-6)
    assert lam is None or loss == pytest.approx(wanted(), rel=1e-6)


def test_removal_gives_back_what_the_instance_had() -> None:
    model = build("llama")
    own_loss = transformers.loss.loss_utils.ForCausalLMLoss
    model.accepts_loss_kwargs = False
    model.loss_function = own_loss
    before = {key: vars(model)[key] for key in ("accepts_loss_kwargs", "_loss_function")}
    remove_fused_loss(apply_fused_loss(model, LAM))
    assert {key: vars(model).get(key) for key in before} == before
    assert "forward" not in vars(model)


def test_weights_that_moved_in_inference_mode_can_be_set() -> None:
    model = apply_fused_loss(build("llama"), LAM)
    state = vars(model)["cotbal_fused_loss"]
    with torch.inference_mode():
        moved = state.weights_on(torch.device("meta"))  # another device than a CPU, where there is no GPU
    assert moved is state.task_weights
    assert moved.device.type == "meta"
    assert not state.task_weights.is_inference()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_ids": IDS}, "takes the tasks as loss_task_ids, got task_ids"),
        ({"labels": [[1, 2]]}, "labels must be a tensor of integers, got list"),
        ({"loss_task_ids": [0, 1, 1]}, "loss_task_ids must be a tensor of integers, got list"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], message: str) -> None:
    model = apply_fused_loss(build("llama"), LAM)
    with pytest.raises(ValueError, match=message):
        model(**case() | changes)


@pytest.mark.parametrize(
    ("aggregation", "normalizer", "message"),
    [
        ("sum", torch.tensor(7), "'sum' has no normalizer, but num_items_in_batch came"),
        ("task", torch.tensor(7), r"got shape \(\): .* use TaskWeightedTrainerMixin"),
        ("task", torch.ones(4), r"got shape \(4,\): "),
        ("task", 7, "got 7: "),
    ],
)
def test_a_plain_trainer_cannot_normalise_other_aggregations(aggregation: str, normalizer: Any, message: str) -> None:
    model = apply_fused_loss(build("llama"), LAM, aggregation=aggregation)
    with pytest.raises(ValueError, match=message):
        model(**case(), num_items_in_batch=normalizer)


@pytest.mark.parametrize("num_tasks", [0, -1, 2.0, True])
def test_a_wrong_number_of_tasks(num_tasks: Any) -> None:
    with pytest.raises(ValueError, match=f"num_tasks must be an integer >= 1, got {num_tasks}"):
        apply_fused_loss(build("llama"), num_tasks=num_tasks)
