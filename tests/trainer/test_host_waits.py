"""What a step of every balancing method waits for, seen without a GPU: tensors without values stand for those on one.

Reading a value of theirs, or asking how many a mask takes, is what the host would wait for. So is a copy to or from the
device that is not said to go on by itself.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_training import FIXED, MOVING, NAMES, collate, samples, tiny_model, validation_batches
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cotbal_kernels.huggingface import apply_fused_loss, fused_loss
from trainer.balancing.method import MethodContext
from trainer.balancing.registry import method_class, read_options
from trainer.loop.weighting import Tasks, TaskWeighting

DEVICE = torch.device("meta")
MICRO_BATCHES = 2


class Waits(TorchDispatchMode):
    """Counts what the host would wait for, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        if name in ("nonzero", "masked_select", "bincount") or mask:
            if args[0].device == DEVICE:
                self.found["size"] += 1
            if name == "nonzero":
                return torch.zeros(args[0].numel(), args[0].dim(), dtype=torch.int64, device=args[0].device)
        if name == "_local_scalar_dense" and args[0].device == DEVICE:
            self.found["value"] += 1
            return 1
        out = func(*args, **kwargs)
        devices = {tensor.device for tensor in [*tensors, *tree_leaves(out)] if isinstance(tensor, torch.Tensor)}
        if len(devices) > 1 and not kwargs.get("non_blocking"):
            self.found["copy"] += 1
        return out


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    mode, own = Waits(), torch.Tensor.tolist

    def tolist(tensor: torch.Tensor) -> Any:
        if tensor.device != DEVICE:
            return own(tensor)
        mode.found["value"] += 1
        return own(torch.ones(tensor.shape, dtype=tensor.dtype))

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    return mode


def test_waits_are_seen(waits: Waits) -> None:
    numbers, mask = torch.ones(3, device=DEVICE), torch.ones(3, dtype=torch.bool, device=DEVICE)
    with waits:
        numbers.sum().item()
        numbers.tolist()
        mask.nonzero()
        numbers.copy_(torch.ones(3))
        torch.ones(3).to(DEVICE, non_blocking=True)
    assert waits.found == {"value": 2, "size": 1, "copy": 1}


@pytest.mark.parametrize("name", [*MOVING, "ew", "tla", "uniform", "cotbal"])
def test_a_step_waits_for_nothing(name: str, waits: Waits, tmp_path: Path) -> None:
    """Only norms of gradients do: for the number of supervised rows of a batch, and once for those of each task."""
    chosen = method_class(name)
    validation = validation_batches() if chosen.needs.validation else None
    batches = validation.batches_per_pass if validation else 0
    method = chosen(MethodContext(2, DEVICE, 3, batches, FIXED), read_options(name, MOVING.get(name)))
    weighting = TaskWeighting(method, Tasks(NAMES, [True, True, False]), validation, 1, tmp_path / "weights.csv")
    with DEVICE:
        model = tiny_model()
    aggregation = "token" if method.options.aggregation == "token" else "task"
    loss = fused_loss(apply_fused_loss(model, num_tasks=3, aggregation=aggregation))
    loss.measured, loss.probe = True, loss.probe.to(DEVICE)  # by the first pass of a training
    loss.weights_on(DEVICE)
    state = SimpleNamespace(is_world_process_zero=False, global_step=0, epoch=0.0)
    weighting.attach(
        SimpleNamespace(  # type: ignore[arg-type]  # what is used of a trainer
            model=model,
            model_wrapped=model,
            args=SimpleNamespace(device=DEVICE),
            state=state,
            compute_loss_context_manager=nullcontext,
            _prepare_inputs=lambda batch: batch,
        )
    )
    rows = samples(4 * MICRO_BATCHES, seed=1)
    parts = [collate(rows[start : start + 4]) for start in range(0, len(rows), 4)]
    window = [{key: value.to(DEVICE) for key, value in part.items()} for part in parts]
    arguments: tuple[Any, ...] = (None, state, None)
    with waits:
        weighting.on_train_begin(*arguments)
    for step in (1, 2):  # the second one after the method has seen a step
        waits.found.clear()
        with waits:
            normalizer = weighting.begin_step(window)
            for batch in window:
                out = model(**batch, num_items_in_batch=normalizer)
                weighting.micro_batch(out["task_loss"], out["task_tokens"])
                out.loss.backward()
            state.global_step = step
            weighting.on_step_end(*arguments)
        passes = {"gradnorm": MICRO_BATCHES, "gradnorm_star": len(validation(0)) if validation else 0}.get(name)
        assert waits.found == ({"size": passes, "value": 1} if passes else {})
