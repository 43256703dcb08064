"""Runs Triton kernels on the CPU, in the process that also compiles them ahead of time.

``TRITON_INTERPRET=1`` has to be set before a kernel is decorated, for a whole process, and takes the compiler away
from it. Here the choice is made when a kernel is *called*::

    with interpreted():
        kernel[grid](tensor, 3, BLOCK=16)  # tensors on the CPU

Kernels called from kernels, and the parts of ``triton.language`` written in Triton (``tl.sum``), follow. Programs of
a grid run one after the other, so a race between them stays unseen. Triton 3.6 needs numpy < 2.4 for this (its
interpreter makes an int of an array of one element); Triton 3.9 does not.

bfloat16, which numpy lacks, is held in 16-bit integers. Triton's own interpreter multiplies those integers in
``tl.dot`` and rounds 1.999 to 1, so both are done here; arithmetic on bfloat16, which would add integers, is an error.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from launch_checks import checked
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle
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
    with checked(kernel.fn.__name__, {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}):
        _interpreted_function(kernel.fn).run(*args, grid=grid, warmup=warmup, **kwargs)


def _call(helper: JITFunction, *args: Any, **kwargs: Any) -> Any:
    function, module = _interpreted_function(helper.fn), id(helper.fn.__globals__)
    if module in _patched_for:
        return function.rewrite()(*args, **kwargs)
    _patched_for.add(module)
    return function(*args, **kwargs)  # patches the language as that module sees it


def _widened(value: TensorHandle) -> TensorHandle:
    if value.dtype.scalar != tl.bfloat16:
        return value
    bits = torch.from_numpy(np.ascontiguousarray(value.data))
    return TensorHandle(bits.view(torch.bfloat16).float().numpy(), tl.float32)


class _Bfloat16:
    """What stands in for the methods of ``InterpreterBuilder`` that are wrong for bfloat16."""

    dot, cast, binary = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl, InterpreterBuilder.binary_op
    convert = InterpreterBuilder.create_fp_to_fp

    @staticmethod
    def create_dot(builder: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return _Bfloat16.dot(builder, _widened(a), _widened(b), *rest)

    @staticmethod
    def cast_impl(builder: InterpreterBuilder, value: TensorHandle, to: Any) -> TensorHandle:
        if to.scalar != tl.bfloat16 or value.dtype.scalar == tl.bfloat16:
            return _Bfloat16.cast(builder, _widened(value), to)
        wide = torch.from_numpy(np.ascontiguousarray(value.data))
        return TensorHandle(wide.to(torch.bfloat16).view(torch.uint16).numpy(), tl.bfloat16)

    @staticmethod
    def create_fp_to_fp(builder: InterpreterBuilder, value: TensorHandle, to: Any, rounding: Any) -> TensorHandle:
        if tl.bfloat16 in (value.dtype.scalar, to.scalar):
            return _Bfloat16.cast_impl(builder, value, to)
        return _Bfloat16.convert(builder, value, to, rounding)

    @staticmethod
    def binary_op(builder: InterpreterBuilder, a: TensorHandle, b: TensorHandle, op: Any) -> TensorHandle:
        if tl.bfloat16 in (a.dtype.scalar, b.dtype.scalar):
            raise TypeError("arithmetic on bfloat16 values in the interpreter: widen them to float32 in the kernel")
        return _Bfloat16.binary(builder, a, b, op)


_BFLOAT16_METHODS = ("create_dot", "cast_impl", "create_fp_to_fp", "binary_op")


@contextmanager
def interpreted() -> Iterator[None]:
    """Let every ``@triton.jit`` function called inside the ``with`` block run in Triton's interpreter."""
    saved = [(namespace, dict(vars(namespace))) for namespace in _PATCHED_NAMESPACES]
    run, call, interpret = JITFunction.run, JITFunction.__call__, triton.knobs.runtime.interpret
    JITFunction.run, JITFunction.__call__, triton.knobs.runtime.interpret = _launch, _call, True
    builder = {name: vars(InterpreterBuilder)[name] for name in _BFLOAT16_METHODS}
    for name in _BFLOAT16_METHODS:
        setattr(InterpreterBuilder, name, getattr(_Bfloat16, name))
    try:
        yield
    finally:
        for name, method in builder.items():
            setattr(InterpreterBuilder, name, method)
        JITFunction.run, JITFunction.__call__, triton.knobs.runtime.interpret = run, call, interpret
        for namespace, attributes in saved:
            for name, value in vars(namespace).copy().items():
                if name not in attributes:
                    delattr(namespace, name)
                elif value is not attributes[name]:
                    setattr(namespace, name, attributes[name])
