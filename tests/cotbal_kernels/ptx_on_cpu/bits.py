"""Integers as bits: parts of them taken, put, counted and permuted."""

import numpy as np

from .block import Action, Block, Mask, decodes
from .text import Operation


@decodes("bfe")
def _extract_bits(block: Block, operation: Operation) -> Action:
    to, source, start, length = operation.operands
    first, bits = int(start, 0), int(length, 0)
    if operation.type not in ("u32", "s32") or first + bits > 32:
        raise NotImplementedError(operation.opcode)
    value, out = block.read(source, operation.type), block.write(to, operation.type)
    up, down = out.dtype.type(32 - first - bits), out.dtype.type(32 - bits)
    return lambda mask: np.copyto(out, (value << up) >> down, where=mask)


@decodes("bfi")
def _insert_bits(block: Block, operation: Operation) -> Action:
    to, source, base, start, length = operation.operands
    if operation.type not in ("b32", "b64"):
        raise NotImplementedError(operation.opcode)
    kind = "u" + operation.type[1:]
    inserted, into, out = block.read(source, kind), block.read(base, kind), block.write(to, kind)
    first, bits = out.dtype.type(int(start, 0)), out.dtype.type(2 ** int(length, 0) - 1)
    return lambda mask: np.copyto(out, (into & ~(bits << first)) | ((inserted & bits) << first), where=mask)


@decodes("clz")
def _leading_zeros(block: Block, operation: Operation) -> Action:
    if operation.type != "b32":
        raise NotImplementedError(operation.opcode)
    value, out = block.read(operation.operands[1], "u32"), block.write(operation.operands[0], "u32")
    # frexp of a float64 is exact: the exponent is the number of digits.
    return lambda mask: np.copyto(out, (32 - np.frexp(value.astype(np.float64))[1]).astype(np.uint32), where=mask)


@decodes("popc")
def _population(block: Block, operation: Operation) -> Action:
    if operation.type != "b32":
        raise NotImplementedError(operation.opcode)
    value, out = block.read(operation.operands[1], "u32"), block.write(operation.operands[0], "u32")
    return lambda mask: np.copyto(out, np.bitwise_count(value).astype(np.uint32), where=mask)


@decodes("prmt")
def _permute_bytes(block: Block, operation: Operation) -> Action:
    to, first, second, selector = operation.operands
    if operation.modifiers != ("b32",):
        raise NotImplementedError(operation.opcode)
    a, b, out = block.read(first, "u32"), block.read(second, "u32"), block.write(to, "u32")
    order = int(selector.rstrip("U"), 0)
    places = [(order >> (4 * byte)) & 15 for byte in range(4)]
    if any(place > 7 for place in places):
        raise NotImplementedError("prmt with a sign")

    def permute(mask: Mask) -> None:
        result = np.zeros(block.threads, dtype=np.uint32)
        for byte, place in enumerate(places):
            source = a if place < 4 else b
            result |= ((source >> np.uint32(8 * (place % 4))) & np.uint32(0xFF)) << np.uint32(8 * byte)
        np.copyto(out, result, where=mask)

    return permute
