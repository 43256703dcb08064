"""What a model does with its logits between the head and the loss: measured, not looked up.

Some models multiply their logits (Cohere), divide them (Granite) or cap them (Gemma 2), and a config that has the
number need not mean that the model applies it (Aya Vision does not). So the head of a patched model hands a probe
of known values through the model's own code in place of the logits, and what arrives at the loss is compared, for
every vocabulary column, with

    y = softcap * tanh(scale * x / softcap),      without a cap y = scale * x

The last columns may be missing (Inkling pads its vocabulary and cuts the padding off). Anything else (a mask over some
tokens, an offset) is refused, since the fused loss could not compute it.
"""

# Shapes: V vocabulary.

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Where the first guess comes from, for a model that is compiled before it was ever measured.
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling",)
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_COLUMNS = ("unpadded_vocab_size",)
# Small enough to show the slope, large enough to show the cap.
_SMALL, _LARGE, _RANGE = 1e-6, 1e6, 20.0
_TOLERANCE = 1e-5  # of float32 arithmetic in the model, a few roundings; a probe of 1e6 shows a wrong scale in full


@dataclass(frozen=True)
class LogitScaling:
    """``y = softcap * tanh(scale * x / softcap)``; None: no cap.

    Kept as text, because torch.compile turns a float that differs between models into a symbol, which an op's
    options cannot be.
    """

    scale_text: str = "1.0"
    softcap_text: str | None = None
    columns: int | None = None  # as many of the first ones; None: all

    @classmethod
    def of(cls, scale: float, softcap: float | None = None, columns: int | None = None) -> "LogitScaling":
        """From numbers."""
        return cls(repr(scale), None if softcap is None else repr(softcap), columns)

    @property
    def scale(self) -> float:
        """The factor on the logits."""
        return float(self.scale_text)

    @property
    def softcap(self) -> float | None:
        """The cap, after the factor."""
        return None if self.softcap_text is None else float(self.softcap_text)

    def kept(self, rows: Tensor) -> Tensor:
        """Of the weight ``[V, D]`` or the bias ``[V]`` of a head, what belongs to the columns that reach the loss."""
        return rows if self.columns is None else rows[: self.columns]

    def __call__(self, logits: Tensor) -> Tensor:
        """Apply it."""
        scaled = logits[..., : self.columns] * self.scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)


def make_probe(vocab_size: int) -> Tensor:
    """Float32 ``[V]``: both signs, every magnitude that matters (the extremes first), no two columns alike."""
    probe_V = torch.linspace(-_RANGE, _RANGE, vocab_size, dtype=torch.float32, device="cpu")  # whatever the defaults
    probe_V[:2] = torch.tensor([_SMALL, _LARGE], dtype=torch.float32, device="cpu")[:vocab_size]
    return probe_V


def measure(seen: Tensor, probe_V: Tensor, name: str) -> LogitScaling:
    """The scaling that turned the probe into `seen`; synchronises with the host.

    Raises:
        ValueError: no scaling does, or it is not positive.
    """
    _check_shape(seen, probe_V, min(max(seen.shape[-1], 2), len(probe_V)), name)
    seen_V = seen.detach().reshape(-1).to(device="cpu", dtype=torch.float64)
    probe_V = probe_V.to(device="cpu", dtype=torch.float64)
    for column in (0, 1):  # a slope and an end that are positive numbers
        if not 0 < float(seen_V[column]) < math.inf:
            raise ValueError(_refusal(name, f"turns {float(probe_V[column]):g} into {float(seen_V[column]):g}"))
    scale, top = float(seen_V[0] / probe_V[0]), float(seen_V[1])
    linear = abs(top - scale * _LARGE) <= _TOLERANCE * scale * _LARGE
    columns = len(seen_V) if len(seen_V) < len(probe_V) else None
    scaling = LogitScaling.of(_short(scale), None if linear else _short(top), columns)
    error_V = (scaling(probe_V) - seen_V).abs()
    wrong_V = ~(error_V <= _TOLERANCE * seen_V.abs())
    if bool(wrong_V.any()):
        column = int(wrong_V.nonzero()[0])
        raise ValueError(
            _refusal(name, f"turns {float(probe_V[column]):g} of column {column} into {float(seen_V[column]):g}")
        )
    return scaling


def poison(seen: Tensor, probe_V: Tensor, expected: LogitScaling, name: str) -> Tensor:
    """0 where `seen` is what `expected` makes of the probe, else NaN; no host synchronisation."""
    wanted_V = expected(probe_V)
    _check_shape(seen, probe_V, len(wanted_V), name)
    right = ((seen.reshape(-1).to(torch.float32) - wanted_V).abs() <= _TOLERANCE * wanted_V.abs()).all()
    return torch.where(right, 0.0, math.nan)


def _check_shape(seen: Tensor, probe_V: Tensor, columns: int, name: str) -> None:
    """Refuse a model that adds or reorders columns, or cuts or adds positions, between head and loss."""
    if seen.numel() != columns or seen.shape[-1] != columns:
        raise ValueError(_refusal(name, f"makes {tuple(seen.shape)} of logits {(1, 1, len(probe_V))}"))


def configured_scaling(model: Any) -> LogitScaling:
    """What the config says, as far as the code of the model's forward mentions it: a guess until measured."""
    used = {name for module in _language_models(model) for name in _names(type(module).forward)}
    config = model.config.get_text_config()

    def product(keys: tuple[str, ...]) -> float:
        values = [getattr(config, key, None) for key in keys if key in used]
        return math.prod(float(value) for value in values if value)

    def first(keys: tuple[str, ...]) -> Any:
        return next((value for key in keys if key in used and (value := getattr(config, key, None))), None)

    cap, columns = first(_CAPS), first(_COLUMNS)
    if columns is not None and columns >= model.get_output_embeddings().out_features:
        columns = None
    scale = product(_MULTIPLIERS) / product(_DIVISORS)
    return LogitScaling.of(scale, None if cap is None else float(cap), columns)


def calls_loss_function(model: Any) -> bool:
    """Whether the code of the model's forward, or that of a base class, mentions ``self.loss_function``."""
    forwards = (base.__dict__["forward"] for base in type(model).__mro__ if "forward" in base.__dict__)
    return any("loss_function" in _names(forward) for forward in forwards)


def _language_models(model: Any) -> Iterator[Any]:
    head = model.get_output_embeddings()
    for module in model.modules():
        accessor = getattr(module, "get_output_embeddings", None)
        if callable(accessor) and accessor() is head:
            yield module


def _names(function: Any) -> set[str]:
    """Attributes and strings in the code of a function, through decorators."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return set() if code is None else {*code.co_names, *(c for c in code.co_consts if isinstance(c, str))}


def _short(value: float) -> float:
    """A float32 measurement as the shortest decimal that float32 cannot tell from it: 0.1 rather than 0.100000001."""
    short = float(f"{value:.6g}")
    return short if abs(short - value) <= 2e-7 * abs(value) else value


def _refusal(name: str, what: str) -> str:
    return (
        f"model {name} cannot be patched: between its head and its loss it {what}, which is neither a positive scale "
        "nor a tanh soft-cap; train it with its own loss, or with task_cross_entropy on its logits"
    )
