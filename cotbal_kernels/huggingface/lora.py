"""A head inside PEFT's LoRA, exact through one product, dropout included:

    x W^T + s (dropout(x) A^T) B^T  =  [x, s dropout(x) A^T] [W, B]^T

It costs a copy of ``V x (D + r)`` in the dtype of W per step, and, since W and B are one operand, a gradient of
that size of which only the columns of B are kept. (Merging s B A into W would cost the same, and has no dropout.)
LoRA on the trunk costs nothing of this: there the frozen head has no gradient at all.

Imported only when a head comes from PEFT.
"""

# Shapes: B sequences, S positions, D hidden width, V vocabulary, r ranks.

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor

from .head import FusedHead

# Rows of the widened operands stay multiples of 16 bytes, which GPU kernels load by.
_ALIGNMENT = 16


class FusedLoraLinear(FusedHead, LoraLinear):  # type: ignore[misc]  # forward takes targets too
    """A patched ``peft.tuners.lora.Linear`` around an ``nn.Linear``."""

    plain_class = LoraLinear

    def operands(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The widened product of the module's docstring, for every active adapter."""
        base: Any = self.base_layer
        weight, bias = base.weight, base.bias
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return hidden, weight, bias
        adapters = [] if self.merged else [name for name in self.active_adapters if name in self.lora_A]
        features, columns = [hidden], [weight]
        for name in adapters:
            if name in self.lora_variant:
                kind = type(self.lora_variant[name]).__name__
                raise ValueError(
                    f"adapter {name!r} on the head is a variant of LoRA ({kind}), which the fused loss does not "
                    "support: leave the head out of target_modules, or use plain LoRA on it"
                )
            down: Any = self.lora_A[name]
            up: Any = self.lora_B[name]
            narrow = down(self.lora_dropout[name](self._cast_input_dtype(hidden, down.weight.dtype)))
            features.append((narrow * self.scaling[name]).to(hidden.dtype))
            columns.append(up.weight.to(weight.dtype))
            if up.bias is not None:
                extra = (up.bias * self.scaling[name]).to(weight.dtype)
                bias = extra if bias is None else bias + extra
        if len(columns) == 1:
            return hidden, weight, bias
        missing = -sum(column.shape[1] for column in columns) % _ALIGNMENT
        if missing:
            features.append(hidden.new_zeros(*hidden.shape[:-1], missing))
            columns.append(weight.new_zeros(weight.shape[0], missing))
        return torch.cat(features, dim=-1), torch.cat(columns, dim=1), bias
