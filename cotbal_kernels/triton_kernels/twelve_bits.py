"""Exponentials that wait in 12 bits each: three quarters of their bytes in bfloat16, none of its precision lost.

An exponential relative to its tile's maximum is in [0, 1]. It has no sign, and of bfloat16's exponents those of
[2^-32, 1] are enough: 5 bits, beside the same 7 of the fraction. What is smaller becomes 0.

    code = max(0, bits of the bfloat16 - bits of 1 + 4095)

Four quarters of a block of columns lie in three 16-bit words: the codes of the first three, each with a third of the
code of the fourth in its upper 4 bits.
"""

import triton
import triton.language as tl

from .tiles import left_half, right_half

_BELOW = tl.constexpr(0x3F80 - 4095)  # 0x3F80 is 1 in bfloat16; 4095 the largest code
_TOP = tl.constexpr(-(1 << 28))  # the upper 4 of 32 bits


@triton.jit
def _encode(exp):
    """Codes of float32 values in [0, 1], rounded to nearest, from bit 16 on. NaN becomes anything: its sum is NaN."""
    return tl.maximum(exp.to(tl.int32, bitcast=True) + (0x8000 - (_BELOW << 16)), 0)


@triton.jit
def decode(code):
    """The float32 value of a code."""
    return tl.where(code > 0, (code + _BELOW) << 16, 0).to(tl.float32, bitcast=True)


@triton.jit
def pack(exp, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Three int16 ``[ROWS, COLS / 4]`` of float32 values ``[ROWS, COLS]`` in [0, 1]."""
    code = _encode(exp)
    left, right = left_half(code, ROWS, COLS), right_half(code, ROWS, COLS)
    first, second = left_half(left, ROWS, COLS // 2), right_half(left, ROWS, COLS // 2)
    third, fourth = left_half(right, ROWS, COLS // 2), right_half(right, ROWS, COLS // 2)
    # In the upper halves until the end, where one instruction moves two words down.
    return (
        ((first | ((fourth << 12) & _TOP)) >> 16).to(tl.int16),
        ((second | ((fourth << 8) & _TOP)) >> 16).to(tl.int16),
        ((third | ((fourth << 4) & _TOP)) >> 16).to(tl.int16),
    )


@triton.jit
def unpack(first, second, third):
    """The codes of the four quarters, from int16 words of any shape."""
    a, b, c = first.to(tl.int32), second.to(tl.int32), third.to(tl.int32)
    fourth = ((a >> 12) & 15) | (((b >> 12) & 15) << 4) | (((c >> 12) & 15) << 8)
    return a & 4095, b & 4095, c & 4095, fourth
