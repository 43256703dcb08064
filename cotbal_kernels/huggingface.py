"""The fused loss inside a transformers model, without changing how the model is called.

    apply_fused_loss(model, task_weights=lam)
    out = model(**batch, labels=labels, loss_task_ids=ids)

The loss runs inside the ``__call__`` of the head module, where ZeRO-3 and FSDP have gathered its weight. To
get it there the head's class becomes a subclass of ``nn.Linear`` that, when the patched ``model.forward`` has
left targets on it, returns the loss instead of logits. Neither transformers nor DeepSpeed is imported.
"""

# Shapes: B sequences, S positions, D hidden width, K tasks.

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, make_dataclass
from types import MethodType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from . import validation
from .backends import check_backend_name
from .functional import linear_task_cross_entropy
from .results import TaskLoss

Model = TypeVar("Model", bound=nn.Module)

_TASK_FIELDS = ("task_loss", "task_tokens", "task_correct")
_FOREIGN_LOSSES = ("liger_kernel", "cut_cross_entropy", "unsloth")
# Multipliers that some models put between the head and the loss.
_UNSUPPORTED_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")


@dataclass
class _FusedState:
    """What a patched head carries: a plain attribute, since parameters and buffers get cast to bfloat16."""

    task_weights: Tensor
    options: dict[str, Any]
    targets: dict[str, Any] | None = None  # set by the patched forward for the next call of the head
    result: TaskLoss | None = field(default=None, repr=False)

    def weights_on(self, device: torch.device) -> Tensor:
        if self.task_weights.device != device:
            self.task_weights = self.task_weights.to(device)
        return self.task_weights


class FusedLinear(nn.Linear):
    """A linear head that returns logits ``[B, S, V]``, or with ``labels`` the fields of :class:`TaskLoss`.

    A plain tuple: DeepSpeed's hooks rebuild the outputs of a module, and cannot rebuild every NamedTuple.
    """

    fused: _FusedState

    def __call__(self, hidden: Tensor) -> Tensor:
        """Run the module with all its hooks; with targets waiting, keep the loss and return no logits."""
        targets, self.fused.targets = self.fused.targets, None
        if targets is None:
            return super().__call__(hidden)
        self.fused.result = TaskLoss(*super().__call__(hidden, **targets))
        return hidden[..., :0]  # the model goes on with logits of vocabulary size 0

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        task_ids: Tensor | None = None,
        normalizer: Tensor | float | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        if labels is None:
            return super().forward(hidden)
        labels = labels.to(hidden.device)
        if task_ids is None:
            task_ids = labels.new_zeros(labels.shape[:1])
        return tuple(
            linear_task_cross_entropy(
                hidden,
                self.weight,
                labels,
                task_ids.to(hidden.device),
                self.fused.weights_on(hidden.device),
                bias=self.bias,
                shift=True,
                normalizer=normalizer,
                **self.fused.options,
            )
        )


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
            without bias, frozen or not. A tanh soft-cap in the config (``final_logit_softcapping``) is
            applied.
        task_weights: ``[K]``, lambda of Eq. 2, kept in float32 whatever the model is cast to; None means
        ones.
        num_tasks: K when ``task_weights`` is None; 1 by default.

    The other options are those of :func:`linear_task_cross_entropy`; "none" is not an aggregation here.

    The model then accepts, besides its own arguments:

    * ``labels [B, S]``, not shifted (the shift is done here, as transformers does);
    * ``loss_task_ids [B]`` or ``[B, S]`` integers; without them every token belongs to task 0. Not
      ``task_ids``: PEFT swallows an argument of that name;
    * ``num_items_in_batch``, the normalizer of Eq. 2 (see :func:`global_normalizer`), scalar.

    With labels, the output has ``loss`` (scalar float32), ``task_loss [K]``, ``task_tokens [K]`` and
    ``task_correct [K]``, and ``logits`` is None. Without labels, and in ``generate``, nothing changes.

    Raises:
        ValueError: the model cannot be patched (the message says why), is patched already, or a value is
        wrong.
    """
    if aggregation not in ("token", "task", "sum"):
        raise ValueError(f"aggregation must be 'token', 'task' or 'sum' in a model, got {aggregation!r}")
    if task_weights is None:
        task_weights = torch.ones(1 if num_tasks is None else num_tasks)
    elif num_tasks is not None and num_tasks != len(task_weights):
        raise ValueError(f"num_tasks is {num_tasks} but task_weights has {len(task_weights)} entries")
    _refuse_unsupported(model)
    head = _linear_head(model)
    config = cast(Any, model).config.get_text_config()
    options: dict[str, Any] = {
        "ignore_index": ignore_index,
        "aggregation": aggregation,
        "logit_softcap": getattr(config, "final_logit_softcapping", None),
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "backend": backend,
        "chunk_size": chunk_size,
        "check": check,
    }
    state = _FusedState(_checked_weights(task_weights), options)
    check_backend_name(backend)
    validation.check_options(
        aggregation=aggregation,
        normalizer=None,
        num_tasks=len(state.task_weights),
        logit_softcap=options["logit_softcap"],
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        chunk_size=chunk_size,
    )
    head.__class__ = FusedLinear
    cast(FusedLinear, head).fused = state
    # Bound, so that a deep copy of the model is bound to the copy.
    model.__dict__["forward"] = MethodType(_patched_forward(model), model)
    return model


def remove_fused_loss(model: Model) -> Model:
    """Undo :func:`apply_fused_loss`; returns the model. Raises ``ValueError`` if it is not patched."""
    head = _fused_head(model)
    patched = model.__dict__.get("forward")
    if not hasattr(patched, "cotbal_original"):
        raise ValueError("model.forward was wrapped again after apply_fused_loss: undo that first")
    original = patched.cotbal_original  # type: ignore[union-attr]
    if original is None:
        del model.__dict__["forward"]
    else:
        model.__dict__["forward"] = original
    del head.fused
    cast(nn.Linear, head).__class__ = nn.Linear
    return model


def set_task_weights(model: nn.Module, task_weights: Tensor | Sequence[float]) -> None:
    """Replace lambda ``[K]`` of a patched model, in place and with the same K; at any time between steps."""
    state = _fused_head(model).fused
    new = _checked_weights(task_weights)
    if new.shape != state.task_weights.shape:
        raise ValueError(f"task_weights must keep K = {len(state.task_weights)}, got {len(new)} entries")
    state.task_weights.copy_(new)


def _patched_forward(model: Any) -> Callable[..., Any]:
    overridden = model.__dict__.get("forward")
    original = type(model).forward if overridden is None else overridden
    signature = inspect.signature(model.forward)
    names = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.update(zip(names, args, strict=False))
        call = functools.partial(original, self) if overridden is None else original
        task_ids = kwargs.pop("loss_task_ids", None)
        if kwargs.get("labels") is None:
            return call(**kwargs)
        fused = _fused_head(self).fused
        as_dict = kwargs.pop("return_dict", None)
        if as_dict is None:
            as_dict = getattr(self.config, "return_dict", True)
        fused.targets = {
            "labels": kwargs.pop("labels"),
            "task_ids": task_ids,
            "normalizer": kwargs.pop("num_items_in_batch", None),
        }
        try:
            out = call(**kwargs, return_dict=True)
            result = fused.result
        finally:
            fused.targets = fused.result = None
        out = _with_task_loss(out, result)
        return out if as_dict else out.to_tuple()

    # generate() and Trainer look at the signature to see which arguments a model takes.
    own = inspect.Parameter("loss_task_ids", inspect.Parameter.KEYWORD_ONLY, default=None)
    self_parameter = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [self_parameter, *signature.parameters.values()]
    has_kwargs = parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    parameters.insert(len(parameters) - has_kwargs, own)
    vars(forward)["__signature__"] = signature.replace(parameters=parameters)
    vars(forward)["cotbal_original"] = overridden
    return forward


def _with_task_loss(out: Any, result: TaskLoss | None) -> Any:
    """The model's output with the loss and the task fields, without logits."""
    if result is None:
        raise RuntimeError("the fused loss did not run: the model's forward never called its head")
    if result.loss.dim() != 0:
        raise RuntimeError(f"the fused loss must be a scalar, got shape {tuple(result.loss.shape)}")
    if out.get("aux_loss") is not None:
        raise RuntimeError("the fused loss leaves out the router loss: set output_router_logits=False")
    values = {**out, "loss": result.loss, "logits": None}
    tasks = {name: getattr(result, name) for name in _TASK_FIELDS}
    return _output_class(type(out))(**values, **tasks)  # type: ignore[arg-type]


@functools.cache
def _output_class(base: Any) -> Any:
    """The model's output class with real task fields, since DDP and FSDP rebuild outputs from their fields."""
    extra = [(name, Any, field(default=None)) for name in _TASK_FIELDS]
    return make_dataclass(f"{base.__name__}WithTasks", extra, bases=(base,))


def _refuse_unsupported(model: Any) -> None:
    name = type(model).__name__
    if not callable(getattr(model, "get_output_embeddings", None)) or not hasattr(model, "config"):
        raise ValueError(f"model must be a transformers PreTrainedModel, got {name}")
    if model.config.is_encoder_decoder or not model.can_generate():
        raise ValueError(f"model must be a causal language model, which {name} is not")
    for forward in (type(model).forward, model.forward):
        package = (getattr(inspect.unwrap(forward), "__module__", None) or "").split(".")[0]
        if package in _FOREIGN_LOSSES:
            raise ValueError(
                f"model {name} has the fused loss of {package} already, which drops task weights silently: "
                "load it without that"
            )
    config = model.config.get_text_config()
    for scale in _UNSUPPORTED_SCALES:
        if getattr(config, scale, None) not in (None, 1, 1.0):
            raise ValueError(f"model {name} scales its logits ({scale}), which is not supported yet")


def _linear_head(model: Any) -> nn.Linear:
    head = model.get_output_embeddings()
    if isinstance(head, FusedLinear):
        raise ValueError("model is patched already: use set_task_weights, or remove_fused_loss first")
    if type(head) is not nn.Linear:
        kind = "none" if head is None else f"{type(head).__module__}.{type(head).__qualname__}"
        raise ValueError(
            f"model {type(model).__name__} must have a plain torch.nn.Linear as output embeddings, got {kind} "
            "(a head wrapped by LoRA or quantised is not supported)"
        )
    return head


def _fused_head(model: Any) -> FusedLinear:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, FusedLinear):
        raise ValueError(
            f"the head of {type(model).__name__} does not carry the fused loss (it is {type(head).__name__}): "
            "call apply_fused_loss, and only after anything that replaces or wraps the head"
        )
    return head


def _checked_weights(task_weights: Tensor | Sequence[float]) -> Tensor:
    if isinstance(task_weights, Tensor) and task_weights.dtype in (torch.bfloat16, torch.float16):
        raise ValueError(f"task_weights must be float32 whatever the model's dtype, got {task_weights.dtype}")
    weights_K = torch.as_tensor(task_weights, dtype=torch.float32).detach().clone()
    if weights_K.dim() != 1 or len(weights_K) == 0:
        raise ValueError(f"task_weights must be [K] with K >= 1, got {tuple(weights_K.shape)}")
    for task, value in enumerate(weights_K.tolist()):
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"task_weights must be finite and >= 0, got {value} for task {task}")
    return weights_K
