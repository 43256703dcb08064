"""Patching of an instance of a transformers model, and the undoing of it."""

# Shapes: B sequences, S positions, K tasks.

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from .. import validation
from ..backends import check_backend_name
from ..results import TaskLoss
from .fusing import classify, fuse_head, unfuse
from .head import FusedHead, FusedLoss, Targets, Uncast, checked_weights, probe_for
from .scaling import calls_loss_function, configured_scaling

Model = TypeVar("Model", bound=nn.Module)

TASK_FIELDS = ("task_loss", "task_tokens", "task_correct")
_FOREIGN_LOSSES = ("liger_kernel", "cut_cross_entropy", "unsloth")
_STATE = "cotbal_fused_loss"  # key in vars(model): not a parameter, a buffer or a submodule
_REPLACED = ("forward", "_loss_function", "accepts_loss_kwargs")  # keys in vars(model), which may have its own there


def apply_fused_loss(
    model: Model,
    task_weights: Tensor | Sequence[float] | None = None,
    num_tasks: int | None = None,
    *,
    ignore_index: int = -100,
    aggregation: str = "token",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    backend: str = "auto",
    chunk_size: int | None = None,
    check: bool = False,
) -> Model:
    """Patch this instance of a transformers causal language (or image-text) model; returns it.

    Args:
        model: any ``PreTrainedModel`` that can generate, with an ``nn.Linear`` head, tied or not, with or
            without bias, frozen or not, and the loss of causal language models; or a PEFT model around one, with
            LoRA or ``modules_to_save`` on the head or not. A positive factor on the logits and a tanh soft-cap
            are found by themselves (see :mod:`cotbal_kernels.huggingface.scaling`).
        task_weights: ``[K]``, lambda of Eq. 2, kept in float32 whatever the model is cast to; None means
            ones.
        num_tasks: K when ``task_weights`` is None; 1 by default.

    The other options are those of :func:`linear_task_cross_entropy`; "none" is not an aggregation here.

    The model then accepts, besides its own arguments:

    * ``labels [B, S]``, not shifted (the shift is done here, as transformers does); ``shift_labels [B, S]``, shifted
      already, take their place where given (context parallelism);
    * ``loss_task_ids [B]`` or ``[B, S]`` integers, per position shifted as the labels are; needed where K > 1. Not
      ``task_ids``: PEFT swallows an argument of that name;
    * ``num_items_in_batch``, the normalizer of Eq. 2 (see :func:`global_normalizer`), scalar.

    With labels, the output has ``loss`` (scalar float32), ``task_loss [K]``, ``task_tokens [K]`` and
    ``task_correct [K]``, and no ``logits``. What the model itself adds to its loss (the router loss of Mixtral) is
    added as before. Without labels, and in ``generate``, nothing changes.

    Raises:
        ValueError: the model cannot be patched (the message says why), is patched already, or a value is
            wrong. What a model does with its logits is seen in its first labelled forward pass, which raises then.
    """
    if aggregation not in ("token", "task", "sum"):
        raise ValueError(f"aggregation must be 'token', 'task' or 'sum' in a model, got {aggregation!r}")
    if task_weights is None:
        if num_tasks is not None and (type(num_tasks) is not int or num_tasks < 1):
            raise ValueError(f"num_tasks must be an integer >= 1, got {num_tasks!r}")
        task_weights = [1.0] * (num_tasks or 1)
    base: Any = unwrapped(model)
    _refuse_unsupported(base)
    name, head = type(base).__name__, base.get_output_embeddings()
    parts = classify(head, name)
    weights_K = checked_weights(task_weights)
    if num_tasks is not None and num_tasks != len(weights_K):
        raise ValueError(f"num_tasks is {num_tasks} but task_weights has {len(weights_K)} entries")
    check_backend_name(backend)
    validation.check_flags(check=check)
    validation.check_options(
        aggregation=aggregation,
        normalizer=None,
        num_tasks=len(weights_K),
        logit_scale=1.0,
        logit_softcap=None,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        chunk_size=chunk_size,
        ignore_index=ignore_index,
    )
    options = {
        "ignore_index": ignore_index,
        "aggregation": aggregation,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "backend": backend,
        "chunk_size": chunk_size,
        "check": check,
    }
    state = FusedLoss(name, weights_K, options, configured_scaling(base), probe_for(parts[0][0]))
    state.replaced = {key: vars(base)[key] for key in _REPLACED if key in vars(base)}
    fuse_head(head, state, name)
    vars(base)[_STATE] = state
    base.loss_function = state.loss_function
    # Trainer: the loss is divided by num_items_in_batch here, whatever the class said.
    base.accepts_loss_kwargs = True
    # Bound, so that a deep copy of the model is bound to the copy.
    vars(base)["forward"] = MethodType(_patched_forward(base), base)
    base.base_model.register_forward_pre_hook(MethodType(_refuse_replaced_forward, base))
    return model


def remove_fused_loss(model: Model) -> Model:
    """Undo :func:`apply_fused_loss`; returns the model. Raises ``ValueError`` if it is not patched."""
    base: Any = unwrapped(model)
    state = fused_loss(base)
    if not hasattr(vars(base).get("forward"), "cotbal_original"):
        raise ValueError(
            "model.forward was wrapped again after apply_fused_loss: undo that first (what mixed precision of "
            "accelerate wraps, accelerator.unwrap_model(model, keep_fp32_wrapper=False) unwraps)"
        )
    for part, _ in classify(base.get_output_embeddings(), type(base).__name__):
        for module in (part, getattr(part, "base_layer", None)):
            if isinstance(module, FusedHead):
                unfuse(module)
    for key in (_STATE, *_REPLACED):
        del vars(base)[key]
    vars(base).update(state.replaced)
    hooks = base.base_model._forward_pre_hooks
    for number in [key for key, hook in hooks.items() if getattr(hook, "__func__", None) is _refuse_replaced_forward]:
        del hooks[number]
    return model


def set_task_weights(model: nn.Module, task_weights: Tensor | Sequence[float]) -> None:
    """Replace lambda ``[K]`` of a patched model, in place and with the same K; at any time between steps.

    A weight that is negative or not finite raises ``ValueError``. From a tensor on a GPU, which is not waited for, it
    makes the next loss NaN instead.
    """
    state = fused_loss(model)
    new = checked_weights(task_weights, wait=False)
    if new.shape != state.task_weights.shape:
        raise ValueError(f"task_weights must keep K = {len(state.task_weights)}, got {len(new)} entries")
    state.task_weights.copy_(new)


def fused_loss(model: Any) -> FusedLoss:
    """The state of a patched model, also through PEFT, DDP, DeepSpeed and ``torch.compile``; ``ValueError`` if none."""
    base = unwrapped(model)
    state = vars(base).get(_STATE)
    if state is None:
        raise ValueError(f"{type(base).__name__} does not carry the fused loss: call apply_fused_loss first")
    return cast(FusedLoss, state)


def unwrapped(model: Any) -> Any:
    """The transformers model inside the wrappers of PEFT, ``torch.compile``, DDP, DeepSpeed."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        elif callable(getattr(type(model), "get_base_model", None)):
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), nn.Module) and not hasattr(
            type(model), "get_output_embeddings"
        ):
            model = model.module
        else:
            return model


def _refuse_replaced_forward(model: Any, *_: Any) -> None:
    """Before the layers of a patched model run: another package's forward in place of ours drops task weights silently.

    It is put there after patching (Liger's in ``Trainer.train``, TRL's in ``SFTTrainer``), so only a pass shows it.
    """
    state = vars(model).get(_STATE)
    if state is None or not model.training or torch.compiler.is_compiling():
        return
    if state.passes == 0 and not carries_patched_forward(model):
        raise ValueError(replaced_forward(model))


def forward_package(model: Any) -> str:
    """Whose code a model's forward is, whatever it calls itself: wrappers copy ``__module__``."""
    function = getattr(model.forward, "__func__", model.forward)
    return getattr(function, "__globals__", {}).get("__name__", "something").split(".")[0]


def replaced_forward(model: Any) -> str:
    """What to say of a patched model whose forward is another's now."""
    return (
        f"model.forward of a patched {type(model).__name__} was replaced by {forward_package(model)} after "
        "apply_fused_loss, and that knows no task weights: leave it out (Trainer's use_liger_kernel); with TRL's "
        "SFTTrainer use cotbal_kernels.huggingface.trl.TaskWeightedSFTTrainer"
    )


def carries_patched_forward(model: Any) -> bool:
    """Whether the forward of a model is ours, or one of accelerate's around it."""
    forward = vars(model).get("forward")
    while forward is not None and not hasattr(forward, "cotbal_original"):
        forward = getattr(forward, "__wrapped__", None)
    return forward is not None


def _patched_forward(model: Any) -> Callable[..., Any]:
    overridden = vars(model).get("forward")
    original = type(model).forward if overridden is None else overridden
    signature = inspect.signature(model.forward)
    names = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    _prepare_output_class(original)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = vars(self)[_STATE]
        # A dict of its own: torch.compile refuses models that look at signatures after one it was given has changed.
        kwargs = kwargs | dict(zip(names, args, strict=False))
        call = functools.partial(original, self) if overridden is None else original
        if "task_ids" in kwargs and "task_ids" not in names:
            raise ValueError("a patched model takes the tasks as loss_task_ids, got task_ids")
        task_ids, normalizer = kwargs.pop("loss_task_ids", None), kwargs.pop("num_items_in_batch", None)
        labels: Any = kwargs.get("labels")
        shift_labels = kwargs.get("shift_labels")
        if labels is None and shift_labels is None:
            if self.training and (task_ids is not None or normalizer is not None):
                raise ValueError(
                    "loss_task_ids or num_items_in_batch came without labels: either the batch has none, or "
                    "compute_loss_func or label_smoothing_factor of Trainer took them away and would bypass the fused "
                    "loss; leave those out (apply_fused_loss has label_smoothing=)"
                )
            state.enter()
            try:
                return call(**kwargs)
            finally:
                state.leave()
        for argument, value in (("labels", labels), ("shift_labels", shift_labels), ("loss_task_ids", task_ids)):
            if value is not None and not isinstance(value, Tensor):
                raise ValueError(f"{argument} must be a tensor of integers, got {type(value).__name__}")
        if labels is None:
            kwargs["labels"] = labels = shift_labels  # models look at them to know that a loss is wanted
        as_dict = kwargs.pop("return_dict", None)
        if as_dict is None:
            as_dict = getattr(self.config, "return_dict", True)
        _refresh_head(self, state)
        router_share = 1.0
        if isinstance(normalizer, Uncast):
            router_share, normalizer = normalizer.router_share, normalizer.value
        state.begin(Targets(labels, task_ids, normalizer, shift_labels))
        state.enter()
        try:
            out = call(**kwargs, return_dict=True)
            result = state.result
            if router_share != 1 and result is not None and out.get("aux_loss") is not None:
                out.loss = result.loss + router_share * (out.loss - result.loss)
        finally:
            state.leave()
            state.end()
        out = _with_task_loss(out, result, state.name)
        return out if as_dict else out.to_tuple()

    # generate() and Trainer look at the signature to see which arguments a model takes.
    own = inspect.Parameter("loss_task_ids", inspect.Parameter.KEYWORD_ONLY, default=None)
    self_parameter = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [self_parameter, *signature.parameters.values()]
    has_kwargs = parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    parameters.insert(len(parameters) - has_kwargs, own)
    vars(forward)["__signature__"] = signature.replace(parameters=parameters)
    vars(forward)["cotbal_original"] = overridden
    # What unwinds the wrappers of mixed precision (accelerate's unwrap_model) has to stop here.
    del vars(forward)["__wrapped__"]
    return forward


def _refresh_head(model: Any, state: FusedLoss) -> None:
    """Patch a head that was replaced or wrapped since: by PEFT, by a resized vocabulary."""
    head = model.get_output_embeddings()
    if isinstance(head, FusedHead) and head.fused is state:
        return
    fuse_head(head, state, state.name)


def _with_task_loss(out: Any, result: TaskLoss | None, name: str) -> Any:
    """The model's output with the task fields, without logits."""
    if result is None:
        raise ValueError(f"model {name} did not call its loss function: it computes its loss in a way of its own")
    values = {key: value for key, value in out.items() if key != "logits"}
    tasks = {field: getattr(result, field) for field in TASK_FIELDS}
    return _output_class(type(out))(**values, **tasks)


_OUTPUT_CLASSES: dict[type, Any] = {}


def _output_class(base: type) -> Any:
    """The model's output class with real task fields, since DDP and FSDP rebuild outputs from their fields."""
    if base not in _OUTPUT_CLASSES:
        extra = [(name, Any, dataclasses.field(default=None)) for name in TASK_FIELDS]
        own = {"__reduce__": lambda out: (_rebuilt_output, (base, dict(out.items())))}
        _OUTPUT_CLASSES[base] = dataclasses.make_dataclass(
            f"{base.__name__}WithTasks", extra, bases=(base,), namespace=own
        )
    return _OUTPUT_CLASSES[base]


def _rebuilt_output(base: type, values: dict[str, Any]) -> Any:
    return _output_class(base)(**values)


def _prepare_output_class(forward: Any) -> None:
    """Make the class now if the forward says what it returns: torch.compile cannot make one."""
    try:
        returned = typing.get_type_hints(inspect.unwrap(forward)).get("return")
    except (NameError, TypeError, AttributeError):
        return  # made in the first labelled pass
    for kind in (returned, *typing.get_args(returned)):
        if isinstance(kind, type) and dataclasses.is_dataclass(kind) and issubclass(kind, dict):
            _output_class(kind)


def _refuse_unsupported(model: Any) -> None:
    name = type(model).__name__
    if not callable(getattr(model, "get_output_embeddings", None)) or not hasattr(model, "config"):
        raise ValueError(f"model must be a transformers PreTrainedModel, got {name}")
    if _STATE in vars(model):
        raise ValueError("model is patched already: use set_task_weights, or remove_fused_loss first")
    if model.config.is_encoder_decoder or not model.can_generate():
        raise ValueError(f"model must be a causal language model, which {name} is not")
    for forward in (type(model).forward, model.forward):
        package = (getattr(inspect.unwrap(forward), "__module__", None) or "").split(".")[0]
        if package in _FOREIGN_LOSSES:
            raise ValueError(
                f"model {name} has the fused loss of {package} already, which drops task weights silently: "
                "load it without that"
            )
    if not calls_loss_function(model):
        raise ValueError(f"model {name} computes its loss in a way of its own (no self.loss_function in its forward)")
    own = getattr(model.loss_function, "__name__", type(model.loss_function).__name__)
    if own != "ForCausalLMLoss":
        raise ValueError(f"model {name} must have the loss of causal language models, ForCausalLMLoss, got {own}")
