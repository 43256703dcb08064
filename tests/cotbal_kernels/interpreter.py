"""Runs Triton kernels on the CPU, in the process that also compiles them ahead of time.

``TRITON_INTERPRET=1`` has to be set before a kernel is decorated, for a whole process, and takes the compiler away
from it. Here the choice is made when a kernel is *called*::

    with interpreted():
        kernel[grid](tensor, 3, BLOCK=16)  # tensors on the CPU

Kernels called from kernels, and the parts of ``triton.language`` written in Triton (``tl.sum``), follow. Programs of
a grid run one after the other, so a race between them stays unseen; ``tl.dot`` on bfloat16 is wrong. Triton 3.6 needs
numpy < 2.4 for this (its interpreter makes an int of an array of one element); Triton 3.9 does not.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

# What the interpreter replaces while a kernel runs. It does not put all of it back after nested calls, so we do.
_PATCHED_NAMESPACES = (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base)


# Modules as whose code the language has been patched during the launch under way: patching takes milliseconds.
_patched_for: set[int] = set()


@cache
def _interpreted_function(function: Callable[..., Any]) -> InterpretedFunction:
    return InterpretedFunction(function)


def _launch(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    _patched_for.clear()  # a launch takes its own patches back
    _interpreted_function(kernel.fn).run(*args, grid=grid, warmup=warmup, **kwargs)


def _call(helper: JITFunction, *args: Any, **kwargs: Any) -> Any:
    function, module = _interpreted_function(helper.fn), id(helper.fn.__globals__)
    if module in _patched_for:
        return function.rewrite()(*args, **kwargs)
    _patched_for.add(module)
    return function(*args, **kwargs)  # patches the language as that module sees it


@contextmanager
def interpreted() -> Iterator[None]:
    """Let every ``@triton.jit`` function called inside the ``with`` block run in Triton's interpreter."""
    saved = [(namespace, dict(vars(namespace))) for namespace in _PATCHED_NAMESPACES]
    run, call, interpret = JITFunction.run, JITFunction.__call__, triton.knobs.runtime.interpret
    JITFunction.run, JITFunction.__call__, triton.knobs.runtime.interpret = _launch, _call, True
    try:
        yield
    finally:
        JITFunction.run, JITFunction.__call__, triton.knobs.runtime.interpret = run, call, interpret
        for namespace, attributes in saved:
            for name, value in vars(namespace).copy().items():
                if name not in attributes:
                    delattr(namespace, name)
                elif value is not attributes[name]:
                    setattr(namespace, name, attributes[name])
