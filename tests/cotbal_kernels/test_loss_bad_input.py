"""Every bad argument raises ValueError naming the argument, the expectation and what came."""

import pytest
import torch
from loss_problems import make_problem

from cotbal_kernels import global_normalizer, linear_task_cross_entropy, portable, task_cross_entropy
from cotbal_kernels.validation import checks_requested

LINEAR = [
    ({"hidden": [1.0]}, "hidden must be a torch.Tensor, got list"),
    ({"hidden": torch.zeros(3, 17, 24, dtype=torch.int64)}, "hidden must be bfloat16.*got torch.int64"),
    ({"hidden": torch.zeros(24)}, r"hidden must have at least two dimensions.*got \(24,\)"),
    ({"weight": torch.zeros(67, 23)}, r"weight must be \[V, 24\].*got \(67, 23\)"),
    ({"weight": torch.zeros(0, 24)}, "weight must have at least one vocabulary row"),
    ({"weight": torch.zeros(67, 24).bfloat16()}, "weight must have the dtype of hidden.*got torch.bfloat16"),
    ({"weight": torch.zeros(67, 24, device="meta")}, "weight must be on the device of hidden.*got meta"),
    ({"bias": torch.zeros(66)}, r"bias must be \[67\].*got \(66,\)"),
    ({"bias": torch.zeros(67).half()}, "bias must have the dtype of weight.*got torch.float16"),
    ({"labels": torch.zeros(3, 16).long()}, r"labels must be \(3, 17\) to match hidden.*got \(3, 16\)"),
    ({"labels": torch.zeros(3, 17)}, "labels must be integers, got torch.float32"),
    ({"labels": torch.zeros(3, 17, dtype=torch.bool)}, "labels must be integers, got torch.bool"),
    ({"task_ids": torch.zeros(3, 17)}, "task_ids must be integers, got torch.float32"),
    ({"task_ids": torch.zeros(17).long()}, r"task_ids must be \(3, 17\).*or \(3,\).*got \(17,\)"),
    ({"task_weights": torch.ones(4).bfloat16()}, "task_weights must be float32.*got torch.bfloat16"),
    ({"task_weights": torch.ones(4, 1)}, r"task_weights must be \[K\] with K >= 1, got \(4, 1\)"),
    ({"task_weights": torch.ones(0)}, r"task_weights must be \[K\] with K >= 1, got \(0,\)"),
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
    ({"logit_scale": 0.0}, "logit_scale must be a finite number > 0, got 0.0"),
    ({"logit_scale": float("inf")}, "logit_scale must be a finite number > 0, got inf"),
    ({"logit_scale": float("nan")}, "logit_scale must be a finite number > 0, got nan"),
    ({"logit_softcap": 0.0}, "logit_softcap must be None or a finite number > 0, got 0.0"),
    ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
    ({"z_loss": -1.0}, "z_loss must be a finite number >= 0, got -1.0"),
    ({"chunk_size": 0}, "chunk_size must be None or a positive number of rows, got 0"),
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


@pytest.mark.parametrize("function", ["linear", "logits"])
@pytest.mark.parametrize(("wrong", "message"), VALUES)
def test_values(function: str, wrong: dict, message: str) -> None:
    good = arguments()
    ((name, value),) = wrong.items()
    good[name][(2,) if name == "task_weights" else (1, 3)] = value
    run = linear_task_cross_entropy
    if function == "logits":
        run, good["logits"] = task_cross_entropy, good.pop("hidden") @ good.pop("weight").t()
    with pytest.raises(ValueError, match=message):
        run(**good)


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
