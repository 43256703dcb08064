"""Runs PTX, the assembly that a GPU's machine code is made from, on the CPU: numpy, one element a thread.

``text`` reads it, ``block`` steps through it, ``arithmetic``, ``bits``, ``transfers``, ``warps``, ``hopper`` and
``blackwell`` say what each operation does, ``memory`` checks every access, ``races`` its order, ``driver`` is the
device that Triton launches on. An operation that is not known is an error. Slow, and no measure of speed; what it shows
is what a compiled kernel computes, that it stays inside its tensors, that its threads do not race and that it waits for
what it has begun.
"""

from .driver import compute_capability

__all__ = ["compute_capability"]
