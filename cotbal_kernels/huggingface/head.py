"""The head module of a patched model, and what it shares with the model.

One labelled forward pass: the patched ``model.forward`` leaves targets with :class:`FusedLoss`. The model calls its
head, which keeps the hidden states and returns a probe in place of the logits. The model does with the probe what
it does with logits and calls ``self.loss_function``, which is :meth:`FusedLoss.loss_function`: that compares the
probe, and calls the head again, this time with targets and with all its hooks, for the loss.
"""

# Shapes: B sequences, S positions, D hidden width, V vocabulary, K tasks.

import copy
import math
import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import linear_task_cross_entropy
from ..results import TaskLoss
from .scaling import LogitScaling, make_probe, measure, poison


@dataclass
class Targets:
    """Of one labelled forward pass."""

    labels: Tensor  # [B, S] as the model gets them
    task_ids: Tensor | None  # [B] or [B, S]; None: all of one task
    normalizer: Tensor | float | None
    shift_labels: Tensor | None  # [B, S] labels that are shifted already


@dataclass
class FusedLoss:
    """State of a patched model, shared with its head: plain attributes, since buffers get cast to bfloat16."""

    name: str  # class of the model
    task_weights: Tensor  # [K]
    options: dict[str, Any]
    scaling: LogitScaling
    probe: Tensor  # [V]
    replaced: dict[str, Any] = field(default_factory=dict)  # of vars(model), for remove_fused_loss
    measured: bool = False
    targets: Targets | None = None
    thread: int | None = None  # that `targets` belong to; None: any, since torch.compile cannot trace the question
    hidden: Tensor | None = None
    head: "FusedHead | None" = field(default=None, repr=False)
    result: TaskLoss | None = field(default=None, repr=False)
    passes: int = 0  # of the patched forward that run now
    # Sums of loss and tokens of the last labelled pass, [K] each, as they were before mixed precision cast outputs.
    task_sums: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FusedLoss":
        memo[id(self)] = new = object.__new__(FusedLoss)
        vars(new).update({key: copy.deepcopy(value, memo) for key, value in vars(self).items()})
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickle would bring the class's own forward back, which knows no task weights.
        raise ValueError(
            f"a patched {self.name} cannot be pickled: save it with save_pretrained or its state_dict, or call "
            "remove_fused_loss before and apply_fused_loss after"
        )

    def enter(self) -> None:
        """The patched forward starts; not counted under torch.compile, where nothing asks."""
        if not torch.compiler.is_compiling():
            self.passes += 1

    def leave(self) -> None:
        """The patched forward has ended."""
        if not torch.compiler.is_compiling():
            self.passes -= 1

    def begin(self, targets: Targets) -> None:
        """A labelled forward pass starts."""
        if self.targets is not None and self.current() is None:
            raise ValueError(f"model {self.name} is in a labelled forward pass of another thread: only one at a time")
        normalizer = targets.normalizer
        if isinstance(normalizer, Tensor) and normalizer.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"num_items_in_batch came in {normalizer.dtype}, which is off by up to 0.4 %: mixed precision cast it "
                "on the way; use TaskWeightedTrainerMixin with Trainer, "
                "MixedPrecisionPolicy(cast_forward_inputs=False) with FSDP, leave fp16.auto_cast off with DeepSpeed, "
                "or pass a Python float"
            )
        aggregation, count = self.options["aggregation"], len(self.task_weights)
        if targets.task_ids is None and count > 1:
            raise ValueError(no_task_ids(count))
        if normalizer is not None and aggregation == "sum":
            raise ValueError(
                "aggregation='sum' has no normalizer, but num_items_in_batch came (Trainer passes it): patch the model "
                "with 'token' or 'task', or use a loop of your own"
            )
        if normalizer is not None and aggregation == "task" and getattr(normalizer, "shape", None) != (count,):
            came = f"shape {tuple(normalizer.shape)}" if isinstance(normalizer, Tensor) else repr(normalizer)
            raise ValueError(
                f"aggregation='task' needs num_items_in_batch as a tensor [K = {count}], the tokens of each task, got "
                f"{came}: Trainer counts tokens of all tasks; use TaskWeightedTrainerMixin, or global_task_tokens"
            )
        self.thread = None if torch.compiler.is_compiling() else threading.get_ident()
        self.targets = targets

    def current(self) -> Targets | None:
        """Targets of the labelled pass that the calling thread is in: another thread may generate meanwhile."""
        ours = torch.compiler.is_compiling() or self.thread in (None, threading.get_ident())
        return self.targets if ours else None

    def end(self) -> None:
        """Forget the pass, whether it succeeded or not."""
        self.targets = self.thread = self.hidden = self.head = self.result = None

    def defer(self, head: "FusedHead", hidden: Tensor) -> Tensor:
        """Keep what reached the head; returns the probe ``[1, ..., 1, V]`` for the model to go on with."""
        if self.head is not None:
            raise ValueError(
                f"model {self.name} calls its head more than once before a loss (multi-token prediction?), "
                "which the fused loss does not support"
            )
        self.head, self.hidden = head, hidden
        if self.probe.device != hidden.device or len(self.probe) != head.out_features:  # a vocabulary was resized
            self.probe = probe_for(head).to(hidden.device)
        # A copy, for models that write into their logits.
        return self.probe.clone().reshape((1,) * (hidden.dim() - 1) + (-1,))

    def loss_function(self, logits: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """In place of ``model.loss_function``: the loss from the head, scalar."""
        targets = self.current()
        if targets is None:
            raise ValueError(
                f"the loss of a patched {self.name} was reached around its patched forward, without task weights: "
                "model.forward was replaced after apply_fused_loss, or model.loss_function was called by hand"
            )
        if self.head is None or self.hidden is None:
            raise RuntimeError(f"model {self.name} called its loss before its head")
        if self.result is not None:
            raise ValueError(f"model {self.name} takes more than one loss in a forward pass, which is not supported")
        self._check_untouched(targets, labels, kwargs)
        if torch.compiler.is_compiling() or self.measured:
            correction = None if self.measured else poison(logits, self.probe, self.scaling, self.name)
        else:
            self.scaling, self.measured, correction = measure(logits, self.probe, self.name), True, None
        try:
            fields: Any = self.head.call_with_targets(self.hidden, targets)
        except ValueError as error:
            error.args = (as_passed(error, targets.shift_labels is not None),)
            raise
        if not isinstance(fields, tuple) or len(fields) != len(TaskLoss._fields):
            raise ValueError(
                f"a forward hook on the head of {self.name} changes its output, which is the loss here: remove it, or "
                "let it leave tuples alone"
            )
        self.result = TaskLoss(*fields)
        loss = self.result.loss
        # A tensor of its own: models add router losses to it in place.
        return loss.clone() if correction is None else loss + correction.to(loss.device)

    def weights_on(self, device: torch.device) -> Tensor:
        """Lambda ``[K]`` on a device."""
        if self.task_weights.device != device:
            with torch.inference_mode(False):  # or no later step could change them in place
                self.task_weights = self.task_weights.to(device)
        return self.task_weights

    def _check_untouched(self, targets: Targets, labels: Tensor | None, kwargs: dict[str, Any]) -> None:
        """The loss was computed from the caller's labels: refuse a model that takes others."""
        for name, given, own in (
            ("labels", labels, targets.labels),
            ("shift_labels", kwargs.get("shift_labels"), targets.shift_labels),
        ):
            moved = given is not None and own is not None and given.device != own.device and given.shape == own.shape
            if given is not own and not moved:
                raise ValueError(f"model {self.name} changes its {name} before the loss, which is not supported")
        ignored = kwargs.get("ignore_index", self.options["ignore_index"])
        if ignored != self.options["ignore_index"]:
            raise ValueError(f"model {self.name} ignores label {ignored}: pass ignore_index={ignored} when patching")


@dataclass(frozen=True)
class Uncast:
    """A normaliser that reaches the loss as it is: frameworks cast the tensors among a model's arguments alone."""

    value: Tensor
    router_share: float = 1.0  # factor of the router loss, where a step has several passes


def no_task_ids(tasks: int, batch: Iterable[str] = ()) -> str:
    """What to say of a batch without tasks."""
    found = f" among {', '.join(sorted(batch))}" if batch else ""
    return (
        f"the model has {tasks} task weights and the batch no loss_task_ids{found}: without them every token would "
        "belong to task 0. Let the collator make them ([B] or [B, S] integers); a column of that name survives "
        "remove_unused_columns"
    )


def as_passed(error: ValueError, shifted: bool) -> str:
    """What an error of the loss says, with the names that a model's arguments have, which are not the loss's own."""
    names = {"task_ids": "loss_task_ids", "normalizer": "num_items_in_batch"}
    if shifted:
        names["labels"] = "shift_labels"
    return re.sub(rf"\b({'|'.join(names)})\b", lambda found: names[found[0]], str(error))


class FusedHead(nn.Module):
    """What a patched head inherits from, before the class that it had."""

    fused: FusedLoss
    plain_class: type[nn.Module]

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the module with all its hooks; while a loss is wanted, keep the hidden states for it instead."""
        if self.fused.current() is not None:
            return self.fused.defer(self, hidden)
        return super().__call__(hidden, *args, **kwargs)

    def _replicate_for_data_parallel(self) -> Any:
        raise ValueError(
            f"a patched {self.fused.name} cannot run in torch.nn.DataParallel, whose copies would share one loss: "
            "start one process per GPU (torchrun), or show this one a single GPU (CUDA_VISIBLE_DEVICES=0)"
        )

    def call_with_targets(self, hidden: Tensor, targets: Targets) -> tuple[Tensor, ...]:
        """Run the module with all its hooks and targets: ZeRO-3 and FSDP have gathered its weight there."""
        labels = targets.labels if targets.shift_labels is None else targets.shift_labels
        return super().__call__(hidden, labels=labels, task_ids=targets.task_ids, shift=targets.shift_labels is None)

    def forward(
        self,
        hidden: Tensor,
        *args: Any,
        labels: Tensor | None = None,
        task_ids: Tensor | None = None,
        shift: bool = True,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, ...]:
        """Logits ``[B, S, V]``, or with ``labels`` the fields of :class:`TaskLoss`.

        A plain tuple: DeepSpeed's hooks rebuild the outputs of a module, and cannot rebuild every NamedTuple.
        """
        if labels is None:
            return super().forward(hidden, *args, **kwargs)
        labels = labels.to(hidden.device)
        task_ids = labels.new_zeros(labels.shape[:1]) if task_ids is None else task_ids.to(hidden.device)
        fused = self.fused
        # Not an argument of the call: FSDP casts those to the parameters' dtype.
        targets = fused.current()
        normalizer = None if targets is None else targets.normalizer
        if isinstance(normalizer, Tensor):
            normalizer = normalizer.to(hidden.device)
        features, weight, bias = self.operands(hidden)
        out = linear_task_cross_entropy(
            features,
            fused.scaling.kept(weight),
            labels,
            task_ids,
            fused.weights_on(hidden.device),
            bias=None if bias is None else fused.scaling.kept(bias),
            shift=shift,
            normalizer=normalizer,
            logit_scale=fused.scaling.scale,
            logit_softcap=fused.scaling.softcap,
            **fused.options,
        )
        fused.task_sums = out.task_loss.detach(), out.task_tokens
        return tuple(out)

    def operands(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Features ``[B, S, D]``, weight ``[V, D]`` and bias ``[V]`` whose product the logits are."""
        raise NotImplementedError(f"{type(self).__name__} does not say which product its logits are")


class FusedLinear(FusedHead, nn.Linear):  # type: ignore[misc]  # forward takes targets too
    """A patched ``nn.Linear``."""

    plain_class = nn.Linear

    def operands(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The layer's own."""
        return hidden, self.weight, self.bias


def checked_weights(task_weights: Tensor | Sequence[float], wait: bool = True) -> Tensor:
    """Lambda ``[K]`` as a float32 tensor of its own; raises ``ValueError`` unless finite and >= 0.

    Values on a GPU are read only with ``wait``; the loss checks them again, on the device.
    """
    if isinstance(task_weights, Tensor) and task_weights.dtype in (torch.bfloat16, torch.float16):
        raise ValueError(f"task_weights must be float32 whatever the model's dtype, got {task_weights.dtype}")
    device = task_weights.device if isinstance(task_weights, Tensor) else "cpu"  # not a default device: no meta tensor
    try:
        weights_K = torch.as_tensor(task_weights, dtype=torch.float32, device=device).detach().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"task_weights must be numbers [K], got {task_weights!r}") from error
    if weights_K.dim() != 1 or len(weights_K) == 0:
        raise ValueError(f"task_weights must be [K] with K >= 1, got {tuple(weights_K.shape)}")
    for task, value in enumerate(weights_K.tolist() if wait or weights_K.device.type == "cpu" else ()):
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"task_weights must be finite and >= 0, got {value} for task {task}")
    return weights_K


def probe_for(head: Any) -> Tensor:
    """The probe of a head; not from the weight, which is empty under ZeRO-3."""
    return make_probe(head.out_features)
