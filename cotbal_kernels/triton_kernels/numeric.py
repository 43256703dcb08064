"""The exponential and the soft cap of logits, in float32."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exponential(x):
    """``exp(x)`` with 0 for results below 2^-126; ``tl.exp`` takes three more instructions for those."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def softcapped(z, softcap):
    """``softcap * tanh(z / softcap)``; tanh as 1 - 2 / (1 + exp(2x)), off by at most 1e-7 of the cap."""
    # The quotient is the same for all: a division is eight instructions.
    return softcap - 2 * softcap / (1 + tl.exp2(z * (2 * LOG2_E / softcap)))


@triton.jit
def cap_slope(z, softcap):
    """The derivative of :func:`softcapped`, from what it returned; not negative, however 1 / softcap is rounded."""
    capped = z * (1 / softcap)
    return tl.maximum(1 - capped * capped, 0.0)
