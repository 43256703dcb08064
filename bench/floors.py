"""What no implementation gets below: the bare matrix products of a case, and a copy on the device.

Both run in the same rounds as the peers. Legend: N supervised positions, D hidden width, V vocabulary.
"""

from __future__ import annotations

import torch

from bench.cases import DTYPES, LinearCase, LogitsCase
from bench.timing import Variant

PRODUCTS, COPY = "floor: products", "floor: copy"


def product_floor(case: LinearCase, device: torch.device) -> Variant | None:
    """The products that the mode needs, over the supervised rows only, into memory that exists: F each.

    Alone, the forward pass needs the logits only, and the backward pass has no floor: what is left for it is each
    algorithm's choice.
    """
    if case.mode == "backward":
        return None
    dtype = DTYPES[case.dtype]
    hidden_ND = torch.randn(case.N, case.D, dtype=dtype, device=device)
    weight_VD = torch.randn(case.V, case.D, dtype=dtype, device=device)
    logits_NV = torch.empty(case.N, case.V, dtype=dtype, device=device)
    grad_hidden_ND = torch.empty_like(hidden_ND) if case.mode in ("frozen_head", "train") else None
    grad_weight_VD = torch.empty_like(weight_VD) if case.mode == "train" else None

    def run(_: None) -> None:
        torch.mm(hidden_ND, weight_VD.t(), out=logits_NV)
        if grad_hidden_ND is not None:
            torch.mm(logits_NV, weight_VD, out=grad_hidden_ND)
        if grad_weight_VD is not None:
            torch.mm(logits_NV.t(), hidden_ND, out=grad_weight_VD)

    return Variant(run)


def copy_floor(numbers: int, dtype: torch.dtype, device: torch.device) -> tuple[Variant, int]:
    """A copy of ``numbers`` numbers; the bytes that it reads and writes."""
    source = torch.ones(numbers, dtype=dtype, device=device)
    target = torch.empty_like(source)

    def run(_: None) -> None:
        target.copy_(source)

    return Variant(run), 2 * numbers * dtype.itemsize


def copy_size(case: LinearCase | LogitsCase) -> int:
    """As many numbers as the weight has, or the logits: large enough to miss every cache at the sizes of a preset."""
    return case.V * case.D if isinstance(case, LinearCase) else case.M * case.V
