"""Arithmetic, comparisons, conversions and moves between registers."""

from collections.abc import Callable
from typing import Any

import numpy as np

from .block import FLOATS, SIGNED, TYPES, Action, Block, Mask, decodes
from .text import Operation

_TINY = np.float32(2.0**-126)


def _divide(a: np.ndarray, b: np.ndarray, out: np.ndarray, where: Mask) -> None:
    if out.dtype.kind == "f":
        np.divide(a, b, out=out, where=where)
        return
    wide = np.trunc(np.float64(1) * a / np.where(b == 0, 1, b)) if out.dtype.itemsize < 8 else None
    if wide is None:
        quotient = np.floor_divide(np.abs(a), np.abs(np.where(b == 0, 1, b)))
        wide = np.where((a < 0) ^ (b < 0), -quotient, quotient)
    np.copyto(out, wide.astype(out.dtype), where=where)


def _remainder(a: np.ndarray, b: np.ndarray, out: np.ndarray, where: Mask) -> None:
    np.fmod(a, np.where(b == 0, 1, b), out=out, where=where)  # the sign of a, as in C


def _shift(ufunc: Any) -> Callable[..., None]:
    def shift(a: np.ndarray, b: np.ndarray, out: np.ndarray, where: Mask) -> None:
        bits = 8 * out.dtype.itemsize
        over = np.broadcast_to(b >= bits, out.shape)  # before out, which may be b, is written
        amount = np.minimum(b, bits - 1).astype(out.dtype)
        ufunc(a, amount, out=out, where=where)
        if over.any() and (ufunc is np.left_shift or out.dtype.kind == "u"):
            np.copyto(out, 0, where=over & where)

    return shift


_BINARY: dict[str, Any] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "div": _divide,
    "rem": _remainder,
    "shl": _shift(np.left_shift),
    "shr": _shift(np.right_shift),
}
_UNARY = {
    "neg": np.negative,
    "not": np.invert,
    "abs": np.abs,
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda a, out, where: np.divide(1, np.sqrt(a), out=out, where=where),
}
_KNOWN = {"rn", "f32", "lo", "hi", "approx", "full", "ftz", "wide"}
# Units in the last place by which results of the hardware may be off (PTX ISA); here they are, by a hash of their bits.
_UNITS = {"ex2": 2, "rcp": 1, "div": 2}


def _check(operation: Operation) -> None:
    unknown = set(operation.modifiers[:-1]) - _KNOWN
    if unknown:
        raise NotImplementedError(f"modifiers {sorted(unknown)}")


def _flushes(operation: Operation, action: Action, out: np.ndarray) -> Action:
    """Results too small for a normal number are 0 with ``.ftz``."""
    if "ftz" not in operation.modifiers:
        return action

    def flushed(mask: Mask) -> None:
        action(mask)
        np.copyto(out, np.copysign(np.float32(0), out), where=(np.abs(out) < _TINY) & mask)

    return flushed


def _approximates(operation: Operation, action: Action, out: np.ndarray) -> Action:
    """Results of ``.approx`` and ``.full`` are as inexact as the hardware's may be; powers of two stay exact."""
    if not {"approx", "full"} & set(operation.modifiers):
        return action
    units, bits = _UNITS[operation.name], out.view(np.int32)

    def approximate(mask: Mask) -> None:
        action(mask)
        moved = bits + ((bits.view(np.uint32) * np.uint32(2654435761)) >> np.uint32(29)).astype(np.int32) % (
            2 * units + 1
        )
        moved -= units
        normal = np.isfinite(out) & (np.abs(out) > 2 * _TINY) & (bits & 0x7FFFFF != 0)
        np.copyto(bits, moved, where=normal & mask)

    return approximate


@decodes(*_BINARY)
def _binary(block: Block, operation: Operation) -> Action:
    _check(operation)
    to, first, second = operation.operands
    kind, ufunc = operation.type, _BINARY[operation.name]
    if kind == "f32x2":
        return pairs(ufunc, block, operation)
    if operation.modifiers[-2:] == ("f32", "bf16"):  # mixed: the first operand is a bfloat16
        narrow, wide, out = block.read(first, "u16"), block.read(second, "f32"), block.write(to, "f32")
        return lambda mask: ufunc(from_bf16(narrow), wide, out=out, where=mask)
    if "wide" in operation.modifiers:
        double = kind[0] + str(2 * int(kind[1:]))
        a, b, out = block.read(first, kind), block.read(second, kind), block.write(to, double)
        return lambda mask: ufunc(a, b, out=out, where=mask, dtype=out.dtype)
    a, out = block.read(first, kind), block.write(to, kind)
    if "hi" in operation.modifiers:
        b, double, bits = block.read(second, kind), {"s32": np.int64, "u32": np.uint64}[kind], np.uint8(32)
        return lambda mask: np.copyto(out, (ufunc(a, b, dtype=double) >> bits).astype(out.dtype), where=mask)
    b = block.read(second, "u32" if operation.name in ("shl", "shr") else kind)
    return _flushes(operation, _approximates(operation, lambda mask: ufunc(a, b, out=out, where=mask), out), out)


@decodes("min", "max")
def _extremum(block: Block, operation: Operation) -> Action:
    to, *inputs = operation.operands
    nan = "NaN" in operation.modifiers
    if set(operation.modifiers[:-1]) - {"NaN"}:
        raise NotImplementedError(operation.opcode)
    a, b, *third = (block.read(text, operation.type) for text in inputs)  # a third one from sm_100 on
    out = block.write(to, operation.type)
    if operation.type in FLOATS and not nan:
        ufunc = np.fmin if operation.name == "min" else np.fmax  # a number, where one of the two is NaN
    else:
        ufunc = np.minimum if operation.name == "min" else np.maximum
    if third:
        return lambda mask: ufunc(ufunc(a, b), third[0], out=out, where=mask)
    return lambda mask: ufunc(a, b, out=out, where=mask)


@decodes(*_UNARY)
def _unary(block: Block, operation: Operation) -> Action:
    _check(operation)
    to, first = operation.operands
    a, out, ufunc = block.read(first, operation.type), block.write(to, operation.type), _UNARY[operation.name]
    return _flushes(operation, _approximates(operation, lambda mask: ufunc(a, out=out, where=mask), out), out)


@decodes("fma", "mad")
def _multiply_add(block: Block, operation: Operation) -> Action:
    down = operation.opcode == "fma.rm.f32"  # towards minus infinity
    if not down:
        _check(operation)
    to, *inputs = operation.operands
    kind = operation.type
    if kind == "f32x2":
        return pairs(np.add, block, operation)  # the ufunc does not matter
    if kind in FLOATS:
        a, b, c = (block.read(text, kind) for text in inputs)
        out = block.write(to, kind)
        # Rounded once (hardly ever twice): twice the digits hold the product of two float32, nearly of two float64.
        wide = np.empty(block.threads, dtype={"f32": np.float64, "f64": np.longdouble}[kind])

        def fused(mask: Mask) -> None:
            np.multiply(a, b, out=wide, dtype=wide.dtype)
            np.add(wide, c, out=wide)
            result = wide.astype(out.dtype)
            if down:
                result = np.where(result > wide, np.nextafter(result, result.dtype.type(-np.inf)), result)
            np.copyto(out, result, where=mask)

        return _flushes(operation, fused, out)
    wide = kind[0] + str(2 * int(kind[1:])) if "wide" in operation.modifiers else kind
    a, b = (block.read(text, kind) for text in inputs[:2])
    c, out = block.read(inputs[2], wide), block.write(to, wide)
    return lambda mask: np.add(np.multiply(a, b, dtype=out.dtype), c, out=out, where=mask)


_COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


@decodes("setp")
def _compare(block: Block, operation: Operation) -> Action:
    comparison, *rest = operation.modifiers[:-1]
    if rest or len(operation.operands) != 3:
        raise NotImplementedError(operation.opcode)
    to, first, second = operation.operands
    kind = "u16" if operation.type == "bf16" else operation.type
    a, b = block.read(first, kind), block.read(second, kind)
    out = block.write(to, "pred")
    if operation.type not in FLOATS and operation.type != "bf16":
        ufunc = _COMPARISONS[comparison]
        return lambda mask: ufunc(a, b, out=out, where=mask)
    unordered = comparison.endswith("u")
    ufunc = _COMPARISONS[comparison[:2]]

    def compare(mask: Mask) -> None:
        x, y = (from_bf16(a), from_bf16(b)) if operation.type == "bf16" else (a, b)
        nan = np.isnan(x) | np.isnan(y)
        found = ufunc(x, y)
        np.copyto(out, (found | nan) if unordered else (found & ~nan), where=mask)

    return compare


def pairs(ufunc: Callable[..., np.ndarray], block: Block, operation: Operation) -> Action:
    """An operation on two float32 in every 64-bit register."""
    if set(operation.modifiers) - {"rn", "f32x2"}:
        raise NotImplementedError(operation.opcode)
    to, *inputs = operation.operands
    values, out = [block.registers[name].view(np.float32) for name in inputs], block.registers[to].view(np.float32)

    def apply(mask: Mask) -> None:
        where = True if mask is True else np.repeat(mask, 2)
        if operation.name == "fma":
            a, b, c = values
            np.copyto(out, (a.astype(np.float64) * b + c).astype(np.float32), where=where)
        else:
            ufunc(*values, out=out, where=where)

    return apply


@decodes("copysign")
def _copy_sign(block: Block, operation: Operation) -> Action:
    to, sign, magnitude = operation.operands
    a, b, out = block.read(sign, operation.type), block.read(magnitude, operation.type), block.write(to, operation.type)
    return lambda mask: np.copysign(b, a, out=out, where=mask)


@decodes("selp")
def _select(block: Block, operation: Operation) -> Action:
    to, first, second, condition = operation.operands
    a, b = block.read(first, operation.type), block.read(second, operation.type)
    out, chosen = block.write(to, operation.type), block.read(condition, "pred")
    return lambda mask: np.copyto(out, np.where(chosen, a, b), where=mask)


@decodes("mov")
def _move(block: Block, operation: Operation) -> Action:
    to, source = operation.operands
    kind = operation.type
    if source.startswith("{"):  # several to one, the lowest bits first
        parts = block.vector(source)
        bits = 8 * np.dtype(TYPES[kind]).itemsize // len(parts)
        values, out = [block.read(part, f"u{bits}") for part in parts], block.write(to, f"u{bits * len(parts)}")

        def pack(mask: Mask) -> None:
            whole = sum(value.astype(out.dtype) << out.dtype.type(bits * at) for at, value in enumerate(values))
            np.copyto(out, whole, where=mask)

        return pack
    if to.startswith("{"):
        parts = block.vector(to)
        bits = 8 * np.dtype(TYPES[kind]).itemsize // len(parts)
        value, outs = block.read(source, f"u{bits * len(parts)}"), [block.write(part, f"u{bits}") for part in parts]

        def unpack(mask: Mask) -> None:
            for at, out in enumerate(outs):
                if out is not None:
                    np.copyto(out, (value >> value.dtype.type(bits * at)).astype(out.dtype), where=mask)

        return unpack
    value, out = block.read(source, kind), block.write(to, kind)
    return lambda mask: np.copyto(out, value, where=mask)


@decodes("cvta")
def _convert_address(block: Block, operation: Operation) -> Action:
    value, out = block.read(operation.operands[1], "u64"), block.write(operation.operands[0], "u64")
    return lambda mask: np.copyto(out, value, where=mask)


def to_bf16(value: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, to nearest even."""
    bits = value.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), 0x7FFF, rounded).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def widened(bits: np.ndarray, kind: str) -> np.ndarray:
    """16-bit patterns as float32."""
    return from_bf16(bits) if kind == "bf16" else bits.view(np.float16).astype(np.float32)


def _narrow(value: np.ndarray, kind: str) -> np.ndarray:
    if kind == "bf16":
        return to_bf16(value)
    return value.astype(np.float16).view(np.uint16)


@decodes("cvt")
def _convert(block: Block, operation: Operation) -> Action:
    *how, to_kind, from_kind = operation.modifiers
    if set(how) - {"rn", "sat"}:
        raise NotImplementedError(operation.opcode)
    to, *inputs = operation.operands
    if to_kind in ("bf16x2", "f16x2", "bf16", "f16") and (how != ["rn"] or from_kind != "f32"):
        raise NotImplementedError(operation.opcode)
    if to_kind in ("bf16x2", "f16x2"):
        high, low = (block.read(text, "f32") for text in inputs)
        out = block.write(to, "u32")

        def pack(mask: Mask) -> None:
            bits = [_narrow(np.broadcast_to(half, out.shape), to_kind[:-2]).astype(np.uint32) for half in (low, high)]
            np.copyto(out, bits[0] | (bits[1] << np.uint32(16)), where=mask)

        return pack
    (text,) = inputs
    if to_kind in ("bf16", "f16"):
        value, out = block.read(text, from_kind), block.write(to, "u16")
        return lambda mask: np.copyto(out, _narrow(value, to_kind), where=mask)
    if from_kind in ("bf16", "f16"):
        if to_kind not in ("f32", "f64") or how:
            raise NotImplementedError(operation.opcode)
        value, out = block.read(text, "u16"), block.write(to, to_kind)
        return lambda mask: np.copyto(out, widened(value, from_kind), where=mask)
    value = block.read(text, from_kind)
    if how == ["sat"] and to_kind == from_kind == "f32":
        out = block.write(to, "f32")
        return lambda mask: np.copyto(out, np.where(np.isnan(value), 0, np.clip(value, 0, 1)), where=mask)
    if "sat" in how:
        raise NotImplementedError(operation.opcode)
    register = block.registers[to]
    # A result narrower than its register is extended.
    wide = {2: "16", 4: "32", 8: "64"}[register.dtype.itemsize]
    out = block.write(to, to_kind if to_kind in FLOATS else ("s" if to_kind in SIGNED else "u") + wide)
    if from_kind in FLOATS and (to_kind not in FLOATS or how not in ([], ["rn"])):
        raise NotImplementedError(operation.opcode)
    return lambda mask: np.copyto(out, value.astype(TYPES[to_kind]).astype(out.dtype), where=mask)


@decodes("fence", "membar", "nanosleep", "griddepcontrol")
def _nothing(block: Block, operation: Operation) -> Action:
    """What orders accesses: here every one is done before the next begins."""
    return lambda mask: None
