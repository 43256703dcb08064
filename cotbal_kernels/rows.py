"""The rows that are computed: their values, from values of all positions, and where the host knows their number."""

# Shapes: M positions, N rows that may be computed.

from torch import Tensor


def at_rows(values_M: Tensor, rows_N: Tensor) -> Tensor:
    """Values at the positions ``rows_N``, 0 where there is none (M), whatever the other positions hold."""
    last = values_M.shape[0] - 1
    return values_M.index_select(0, rows_N.clamp(max=last)).masked_fill_(rows_N > last, 0)


def on_cpu(tensor: Tensor) -> bool:
    """Whether the host can read values, the number of rows among them, without waiting for a device."""
    return tensor.device.type == "cpu"
