"""Every bad argument raises ValueError naming the argument, the expectation and what came."""

import pytest
import torch
from loss_problems import make_problem

from cotbal_kernels import (
    LinearTaskCrossEntropy,
    TaskCrossEntropy,
    global_normalizer,
    global_task_tokens,
    linear_task_cross_entropy,
    portable,
    task_cross_entropy,
    validation,
)
from cotbal_kernels.validation import checks_requested

LINEAR = [
    ({"hidden": [1.0]}, "hidden must be a torch.Tensor, got list"),
    ({"hidden": torch.zeros(3, 17, 24, dtype=torch.int64)}, "hidden must be bfloat16.*got torch.int64"),
    ({"hidden": torch.zeros(24)}, r"hidden must have at least two dimensions.*got \(24,\)"),
    (
        {"weight": torch.ones(67, 24).to_sparse()},
        r"weight must be a dense tensor, got torch.sparse_coo; pass .*to_dense",
    ),
    (
        {"hidden": torch.nested.as_nested_tensor([torch.ones(2, 24)], layout=torch.jagged)},
        r"hidden must be a dense.*nested.*values\(\)",
    ),
    ({"weight": torch.zeros(67, 23)}, r"weight must be \[V, 24\].*got \(67, 23\)"),
    ({"weight": torch.zeros(0, 24)}, "weight must have at least one vocabulary row"),
    ({"weight": torch.zeros(67, 24).bfloat16()}, "weight must have the dtype of hidden.*got torch.bfloat16"),
    ({"weight": torch.zeros(67, 24, device="meta")}, "weight must be on the device of hidden.*got meta"),
    ({"bias": torch.zeros(66)}, r"bias must be \[67\].*got \(66,\)"),
    ({"bias": torch.zeros(67).half()}, "bias must have the dtype of weight.*got torch.float16"),
    ({"bias": [0.0]}, "bias must be a torch.Tensor, got list"),
    ({"bias": torch.zeros(67, device="meta")}, "bias must be on the device of hidden.*got meta"),
    ({"weight": torch.zeros(67, 24, 1)}, r"weight must be \[V, 24\].*got \(67, 24, 1\)"),
    ({"labels": torch.zeros(3, 16).long()}, r"labels must be \(3, 17\) to match hidden.*got \(3, 16\)"),
    ({"labels": torch.zeros(3, 17)}, "labels must be integers .*, got torch.float32"),
    ({"labels": torch.zeros(3, 17, dtype=torch.bool)}, "labels must be integers .*, got torch.bool"),
    ({"task_ids": torch.zeros(3, 17)}, "task_ids must be integers .*, got torch.float32"),
    ({"task_ids": torch.zeros(17).long()}, r"task_ids must be \(3, 17\).*or \(3,\).*got \(17,\)"),
    ({"task_weights": torch.ones(4).bfloat16()}, "task_weights must be float32.*got torch.bfloat16"),
    ({"task_weights": torch.ones(4, 1)}, r"task_weights must be \[K\] with K >= 1, got \(4, 1\)"),
    ({"task_weights": torch.ones(0)}, r"task_weights must be \[K\] with K >= 1, got \(0,\)"),
    ({"hidden": torch.zeros(3, 17, 0)}, r"hidden must have at least one feature.*got \(3, 17, 0\)"),
    ({"labels": torch.zeros(3, 17, dtype=torch.uint16)}, "labels must be integers .*uint8.*, got torch.uint16"),
    ({"task_ids": torch.zeros(3, device="meta").long()}, "task_ids must be on the device of labels.*got meta"),
    ({"grad_weight_out": torch.zeros(24, 67).t()}, r"must be contiguous \(67, 24\), got .* with strides \(1, 67\)"),
    ({"grad_weight_out": torch.zeros(66, 24)}, r"grad_weight_out must be contiguous \(67, 24\), got \(66, 24\)"),
    ({"grad_weight_out": torch.zeros(67, 24).half()}, "grad_weight_out must be torch.float32.*got torch.float16"),
    ({"grad_weight_out": torch.zeros(67, 24, requires_grad=True)}, "grad_weight_out must not require grad"),
    ({"grad_weight_out": torch.zeros(67, 24, device="meta")}, "grad_weight_out must be on the device of weight"),
    ({"max_tokens": 2.5}, "max_tokens must be an integer, got 2.5"),
    ({"recompute": None}, "recompute must be True or False, got None"),
    ({"vocab_size": "60"}, "vocab_size must be an integer, got '60'"),
    ({"grad_weight_out": torch.zeros(67, 24), "backend": "reference"}, "grad_weight_out must be None with backend="),
]
VALUES = [
    ({"labels": 67}, r"labels must be in \[0, 67\) where supervised, got 67 at flattened position 20 \(1 such"),
    ({"labels": -1}, r"labels must be in \[0, 67\) where supervised, got -1 at flattened position 20"),
    ({"task_ids": 4}, r"task_ids must be in \[0, 4\) where supervised, got 4 at flattened position 20"),
    ({"task_ids": -1}, r"task_ids must be in \[0, 4\) where supervised, got -1 at flattened position 20"),
    ({"task_weights": -0.5}, "task_weights must be finite and >= 0, got -0.5 for task 2"),
    ({"task_weights": float("nan")}, "task_weights must be finite and >= 0, got nan for task 2"),
    ({"task_weights": float("inf")}, "task_weights must be finite and >= 0, got inf for task 2"),
]
OPTIONS = [
    ({"aggregation": "mean"}, "aggregation must be one of 'token', 'task', 'sum', 'none', got 'mean'"),
    ({"normalizer": 3.0, "aggregation": "sum"}, "normalizer must be None with aggregation='sum'"),
    ({"normalizer": 3.0, "aggregation": "task"}, r"normalizer must be a \[K\] tensor.*got 3.0"),
    ({"normalizer": torch.ones(3), "aggregation": "task"}, r"normalizer must have shape \(4,\).*got \(3,\)"),
    ({"normalizer": torch.ones(4)}, r"normalizer must have shape \(\).*got \(4,\)"),
    ({"normalizer": -1.0}, "normalizer must be None, a tensor or a finite number >= 0, got -1.0"),
    ({"normalizer": float("nan")}, "normalizer must be .*got nan"),
    ({"normalizer": float("inf")}, "normalizer must be .*got inf"),
    ({"normalizer": torch.tensor([1.0, -1, 2, 3]), "aggregation": "task"}, "normalizer must be finite and >= 0"),
    ({"logit_scale": 0.0}, "logit_scale must be a finite number > 0, got 0.0"),
    ({"logit_scale": float("inf")}, "logit_scale must be a finite number > 0, got inf"),
    ({"logit_scale": float("nan")}, "logit_scale must be a finite number > 0, got nan"),
    ({"logit_softcap": 0.0}, "logit_softcap must be None or a number from 1e-30 to 1e30, got 0.0"),
    ({"logit_softcap": float("inf")}, "logit_softcap must be None or a number from 1e-30 to 1e30, got inf"),
    ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
    ({"label_smoothing": -0.1}, r"label_smoothing must be in \[0, 1\), got -0.1"),
    ({"z_loss": -1.0}, "z_loss must be a finite number >= 0, got -1.0"),
    ({"chunk_size": 0}, "chunk_size must be None or a positive number of rows, got 0"),
    ({"shift": "no"}, "shift must be True or False, got 'no'"),
    ({"differentiable_tasks": 1}, "differentiable_tasks must be True or False, got 1"),
    ({"check": torch.tensor(True)}, r"check must be True or False, got tensor\(True\)"),
    ({"chunk_size": True}, "chunk_size must be an integer, got True"),
    ({"chunk_size": 1.5}, "chunk_size must be an integer, got 1.5"),
    ({"ignore_index": None}, "ignore_index must be an integer, got None"),
    ({"ignore_index": -100.0}, "ignore_index must be an integer, got -100.0"),
    ({"normalizer": torch.tensor(-3.0)}, "normalizer must be finite and >= 0, got -3.0"),
    ({"normalizer": torch.tensor(float("nan"))}, "normalizer must be finite and >= 0, got nan"),
    ({"normalizer": torch.tensor(True)}, "normalizer must be floating point or integers, got torch.bool"),
    ({"normalizer": torch.tensor(1j)}, "normalizer must be floating point or integers, got torch.complex64"),
    ({"normalizer": True}, "normalizer must be None, a tensor or a finite number >= 0, got True"),
    *(
        ({name: value}, message)
        for name in ("logit_scale", "logit_softcap", "label_smoothing", "z_loss")
        for value, message in (
            (
                torch.nn.Parameter(torch.tensor(0.5)),
                f"{name} must be a number, got a tensor, which would get",
            ),
            ("0.5", f"{name} must be a number, got '0.5'"),
        )
    ),
]


def arguments() -> dict:
    p = make_problem()
    p.labels[1, 3] = 5  # flattened position 20 is supervised
    names = ("hidden", "weight", "labels", "task_ids", "task_weights")
    return dict(zip(names, (t.detach() for t in p.tensors), strict=True))


@pytest.mark.parametrize(("wrong", "message"), LINEAR + OPTIONS)
def test_linear(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_task_cross_entropy(**{**arguments(), **wrong})


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("function", ["linear", "logits"])
@pytest.mark.parametrize(("wrong", "message"), VALUES)
def test_values(function: str, wrong: dict, message: str, backend: str) -> None:
    good = arguments()
    ((name, value),) = wrong.items()
    good[name][(2,) if name == "task_weights" else (1, 3)] = value
    run = linear_task_cross_entropy
    if function == "logits":
        run, good["logits"] = task_cross_entropy, good.pop("hidden") @ good.pop("weight").t()
    with pytest.raises(ValueError, match=message):
        run(**good, backend=backend)


@pytest.mark.parametrize(("wrong", "message"), OPTIONS)
def test_logits(wrong: dict, message: str) -> None:
    good = arguments()
    logits = good.pop("hidden") @ good.pop("weight").t()
    with pytest.raises(ValueError, match=message):
        task_cross_entropy(logits, **{**good, **wrong})
    with pytest.raises(ValueError, match="logits must have at least two dimensions"):
        task_cross_entropy(logits[0, 0], **good)
    with pytest.raises(ValueError, match=r"labels must be .* to match logits"):
        task_cross_entropy(logits[:, 1:], **good)


@pytest.mark.parametrize("value", [-3.0, float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"differentiable_tasks": True}, {"aggregation": "none"}], ids=str)
def test_a_normalizer_whose_value_is_not_read_makes_the_loss_nan(
    monkeypatch: pytest.MonkeyPatch, value: float, options: dict
) -> None:
    """What a GPU does, shown on the CPU by taking the check away."""
    monkeypatch.setattr(validation, "_check_normalizer_values", lambda _: None)
    given = arguments()
    out = linear_task_cross_entropy(**given, normalizer=torch.tensor(value), **options)
    assert bool((out.loss if out.loss.dim() == 0 else out.loss[given["labels"] != -100]).isnan().all())


def test_modules_are_checked_when_they_are_made() -> None:
    with pytest.raises(ValueError, match="ignore_index must be an integer, got None"):
        LinearTaskCrossEntropy(torch.ones(2), ignore_index=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="magic"):
        TaskCrossEntropy(torch.ones(2), backend="magic")


def test_meta_tensors_have_shapes() -> None:
    good = {name: tensor.to("meta") for name, tensor in arguments().items()}
    out = linear_task_cross_entropy(**good)
    assert (out.loss.shape, out.lse.shape, out.loss.device.type) == ((), (3, 17), "meta")


def test_where_raising_would_synchronise_the_loss_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does, shown on the CPU by taking the check away; COTBAL_CHECK=1 brings it back."""
    for wrong, _ in VALUES:
        good = arguments()
        ((name, value),) = wrong.items()
        good[name][(2,) if name == "task_weights" else (1, 3)] = value
        with monkeypatch.context() as context:
            context.setattr(portable, "check_target_values", lambda *_: None)
            for kwargs in ({}, {"differentiable_tasks": True}, {"aggregation": "sum"}):
                out = linear_task_cross_entropy(**good, **kwargs)
                assert bool(out.loss.isnan())
    assert not checks_requested(False)
    assert checks_requested(True)
    monkeypatch.setenv("COTBAL_CHECK", "1")
    assert checks_requested(False)


def test_global_normalizer() -> None:
    labels, ids, lam = torch.zeros(2, 3).long(), torch.zeros(2).long(), torch.ones(2)
    with pytest.raises(ValueError, match="aggregation must be one of 'token', 'task', 'none', got 'sum'"):
        global_normalizer(labels, ids, lam, aggregation="sum")
    with pytest.raises(ValueError, match=r"two lists of as many.*got 2 and 1"):
        global_normalizer([labels, labels], [ids], lam)
    with pytest.raises(ValueError, match="got 0 and 0"):
        global_normalizer([], [], lam)
    with pytest.raises(ValueError, match=r"task_ids must be \(2, 3\).*got \(3,\)"):
        global_normalizer(labels, torch.zeros(3).long(), lam)
    with pytest.raises(ValueError, match=r"task_ids must be in \[0, 2\)"):
        global_normalizer(labels, ids + 2, lam)
    with pytest.raises(ValueError, match="task_weights must be float32"):
        global_normalizer(labels, ids, lam.double())
    with pytest.raises(ValueError, match="labels must be a tensor or a list of tensors, got NoneType"):
        global_normalizer(None, ids, lam)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"each of labels must be a torch\.Tensor, got list"):
        global_normalizer([[0, 1]], [ids], lam)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="shift must be True or False, got 'no'"):
        global_normalizer(labels, ids, lam, shift="no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_tasks must be at least 1, got 0"):
        global_task_tokens(labels, ids, 0)
    whole = global_normalizer([labels, labels], [ids, ids], lam)
    assert whole == global_normalizer(iter([labels, labels]), iter([ids, ids]), lam) == 12
