"""Reads machine code: registers, what spills in the loop that a kernel spends its time in, and stores of single values.

A product has one loop over the summed dimension inside the loop over tiles. What an epilogue spills costs a few loads
per tile; what that loop spills, it spills at every step.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import triton

# HMMA (mma.sync), HGMMA (wgmma), UTCHMMA (tcgen05.mma) and the same for other formats.
_MATRIX = re.compile(r"(UTC)?[A-Z]?G?MMA(\.|$)")
_LABEL = re.compile(r"^\s*(\.L\w*|\.text[\w.$]*):")
_INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?P<predicate>@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<rest>[^;]*);"
)
_TARGET = re.compile(r"`\((\.L\w+)\)")
_ALWAYS = ("PT", "UPT")  # predicates that are true


@dataclass
class Block:
    """Instructions that run one after the other, by the names of their operations, and where they lead."""

    operations: list[str] = field(default_factory=list)
    successors: set[int] = field(default_factory=set)


def used_by(cubin: bytes) -> dict[str, int]:
    """``registers`` and ``stack`` of the one kernel in a cubin, its ``instructions``, those of them that store one or
    two bytes (``narrow_stores``), and what :func:`spills_in` finds."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = _output(triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(file))
        code = _output(triton.knobs.nvidia.nvdisasm.path, "-c", str(file))
    found = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    if len(found) != 1:
        raise RuntimeError(f"expected the registers of one kernel, found {len(found)}:\n{usage}")
    registers, stack = map(int, found[0])
    operations = [name for block in parse(code) for name in block.operations]
    return {
        "registers": registers,
        "stack": stack,
        "instructions": sum(name != "NOP" for name in operations),
        "narrow_stores": sum(map(_is_narrow_store, operations)),
        **spills_in(code),
    }


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def spills_in(code: str) -> dict[str, int]:
    """Bytes that a thread stores to and loads from local memory: ``spills``, and of those ``loop_spills``.

    The latter in the ``main_loops``: the innermost loops that hold matrix instructions; without any (float32) those
    with the most multiply-adds, or more than half as many.
    """
    blocks = parse(code)
    loops = find_loops(blocks)

    def count(loop: frozenset[int], wanted: "re.Pattern[str]") -> int:
        return sum(bool(wanted.match(name)) for at in loop for name in blocks[at].operations)

    def innermost(wanted: "re.Pattern[str]") -> list[frozenset[int]]:
        holding = [loop for loop in loops if count(loop, wanted)]
        return [loop for loop in holding if not any(other < loop for other in holding)]

    main = innermost(_MATRIX)
    if not main:
        multiply_adds = {loop: count(loop, re.compile("FFMA")) for loop in innermost(re.compile("FFMA"))}
        main = [loop for loop, found in multiply_adds.items() if 2 * found > max(multiply_adds.values())]
    inside = frozenset().union(*main)
    return {
        "spills": sum(_spilled_bytes(name) for block in blocks for name in block.operations),
        "main_loops": len(main),
        "loop_spills": sum(_spilled_bytes(name) for at in inside for name in blocks[at].operations),
    }


def _is_narrow_store(operation: str) -> bool:
    """16-bit results of a tile leave in 16 bytes where their alignment is known, one by one where it is not."""
    name, *modifiers = operation.split(".")
    return name == "STG" and not {"U8", "S8", "U16", "S16"}.isdisjoint(modifiers)


def _spilled_bytes(operation: str) -> int:
    """Bytes of a load or store of local memory (``STL.64``), 0 of any other operation."""
    name, *modifiers = operation.split(".")
    if name not in ("STL", "LDL"):
        return 0
    widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
    return next((widths[modifier] for modifier in modifiers if modifier in widths), 4)


def parse(code: str) -> list[Block]:
    """Basic blocks of a kernel in the order of their addresses; the first is the entry."""
    blocks, labels, branches = [Block()], dict[str, int](), list[tuple[int, str]]()
    falls_through = True

    def begin() -> None:
        if blocks[-1].operations:
            blocks.append(Block())
            if falls_through:
                blocks[-2].successors.add(len(blocks) - 1)

    for line in code.splitlines():
        if label := _LABEL.match(line):
            begin()
            falls_through = True
            labels[label[1]] = len(blocks) - 1
            continue
        found = _INSTRUCTION.match(line)
        if found is None:
            continue
        if not falls_through:  # code that no label leads to
            begin()
            falls_through = True
        operation, rest = found["opcode"].split(".")[0], found["rest"]
        blocks[-1].operations.append(found["opcode"])
        if operation in ("BRA", "JMP", "CALL", "EXIT", "RET", "BRX", "JMX"):
            if target := _TARGET.search(rest):
                branches.append((len(blocks) - 1, target[1]))
            falls_through = operation == "CALL" or _conditional(found["predicate"], rest)
            begin()
            if falls_through:
                continue
    for source, label_name in branches:
        blocks[source].successors.add(labels[label_name])
    return blocks


def _conditional(predicate: str | None, rest: str) -> bool:
    """Whether a branch may not be taken: ``@P0 BRA``, or ``BRA.U UP0, ...`` and ``BRA P0, ...``."""
    if predicate is not None and predicate.strip().lstrip("@") not in _ALWAYS:
        return True
    operand = rest.split("`")[0].strip().rstrip(",").strip()
    return bool(re.match(r"^!?U?P(\d+|T)", operand)) and operand not in _ALWAYS


def find_loops(blocks: list[Block]) -> list[frozenset[int]]:
    """The blocks of every natural loop; loops with the same header are one."""
    predecessors: list[set[int]] = [set() for _ in blocks]
    for at, block in enumerate(blocks):
        for successor in block.successors:
            predecessors[successor].add(at)
    dominators = _dominators(blocks, predecessors)
    loops: dict[int, set[int]] = {}
    for at, block in enumerate(blocks):
        for header in block.successors & dominators.get(at, set()):
            body, waiting = loops.setdefault(header, {header}), [at]
            while waiting:
                inside = waiting.pop()
                if inside not in body:
                    body.add(inside)
                    waiting.extend(predecessors[inside] & dominators.keys())
    return [frozenset(body) for body in loops.values()]


def _dominators(blocks: list[Block], predecessors: list[set[int]]) -> dict[int, set[int]]:
    """Of every block that can be reached: the blocks that every way to it goes through, itself included."""
    reached, waiting = {0}, [0]
    while waiting:
        for successor in blocks[waiting.pop()].successors - reached:
            reached.add(successor)
            waiting.append(successor)
    found = {at: {0} if at == 0 else set(reached) for at in reached}
    changed = True
    while changed:
        changed = False
        for at in sorted(reached - {0}):
            new = {at} | set.intersection(*(found[before] for before in predecessors[at] & reached))
            changed |= new != found[at]
            found[at] = new
    return found
