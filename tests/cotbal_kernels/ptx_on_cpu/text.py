"""PTX as text, one operation a line, to a list of operations and what they refer to.

Reads what Triton and nvcc write: one entry per module, registers declared by class, blocks in braces with registers
and labels of their own.
"""

import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

WIDTHS = {
    ".pred": np.bool_,
    ".b16": np.uint16,
    ".b32": np.uint32,
    ".b64": np.uint64,
    ".f32": np.uint32,
    ".f64": np.uint64,
}
_SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}


@dataclass(frozen=True)
class Operation:
    """``@guard opcode operands;``"""

    opcode: str
    operands: tuple[str, ...]
    guard: str | None  # a predicate register
    negated: bool
    place: str  # source line, as the compiler noted it

    @cached_property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @cached_property
    def modifiers(self) -> tuple[str, ...]:
        return tuple(self.opcode.split(".")[1:])

    @property
    def type(self) -> str:
        return self.modifiers[-1]

    def __str__(self) -> str:
        return f"{self.place}: {self.opcode} {', '.join(self.operands)}"


@dataclass
class Entry:
    """One kernel."""

    name: str
    threads: int
    parameters: dict[str, int] = field(default_factory=dict)  # name to offset in the parameter space
    registers: dict[str, type] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)  # name to address
    shared_bytes: int = 0  # declared with a size; what has none begins behind them
    operations: list[Operation] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


class _Scopes:
    """Names of registers and labels that a block in braces declares anew."""

    def __init__(self) -> None:
        self.stack: list[tuple[int, dict[str, str]]] = []  # number, and names of registers
        self.made = 0

    def enter(self) -> None:
        self.made += 1
        self.stack.append((self.made, {}))

    def leave(self) -> None:
        self.stack.pop()

    def declare(self, name: str) -> str:
        """The name of a register of the innermost block."""
        if len(self.stack) < 2:
            return name
        number, names = self.stack[-1]
        return names.setdefault(name, f"{name}@{number}")

    def rename(self, text: str) -> str:
        for _, names in reversed(self.stack[1:]):
            for name, unique in names.items():
                text = re.sub(rf"(?<![\w%$]){re.escape(name)}(?![\w@])", unique, text)
        return text

    def labels(self, name: str) -> list[str]:
        """What ``name`` may be a label of, the innermost block first; labels may follow what leads to them."""
        return [f"{name}@{number}" for number, _ in reversed(self.stack)]


def parse(source: str, name: str | None = None) -> Entry:
    """The kernel called ``name``, by default the only one in ``source``."""
    files = {number: Path(path).name for number, path in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', source)}
    if name is not None:
        before, _, after = source.partition(f".entry {name}(")
        source = f"{before.partition('.visible')[0]}\n.visible .entry {name}(\n{after}"
    entry, scopes, place, offset = Entry("", 0), _Scopes(), "?", 0
    branches: list[tuple[int, list[str]]] = []
    for line in _lines(source):
        if line == "{":
            scopes.enter()
        elif line == "}":
            scopes.leave()
            if not scopes.stack:
                break  # debugging sections follow
        elif match := re.match(r"\.loc (\d+) (\d+) (\d+)", line):
            place = f"{files.get(match[1], '?')}:{match[2]}:{match[3]}"
        elif match := re.match(r"\.visible \.entry (\w+)", line):
            entry.name = match[1]
        elif match := re.match(r"\.param (?:\.align (\d+) )?\.[bfu](\d+)(?: \.ptr[\w. ]*)? (\w+)(?:\[(\d+)\])?", line):
            size = _SIZES[match[2]]
            align = int(match[1] or size)
            offset = -(-offset // align) * align
            entry.parameters[match[3]] = offset
            offset += size * int(match[4] or 1)
        elif match := re.match(r"\.(?:reqntid|maxntid) (\d+)", line):
            entry.threads = int(match[1])
        elif match := re.match(r"(?:\.extern )?\.shared \.align (\d+) \.b8 (\w+)\[(\d*)\]", line):
            at = -(-entry.shared_bytes // 1024) * 1024 if not match[3] else entry.shared_bytes
            at = -(-at // int(match[1])) * int(match[1])
            entry.shared[match[2]] = at
            entry.shared_bytes = at + int(match[3] or 0)
        elif match := re.match(r"\.reg (\.\w+) ([^;]+);", line):
            for name in match[2].split(","):
                _declare(entry, scopes, name.strip(), WIDTHS[match[1]])
        elif match := re.fullmatch(r"([\w$]+):", line):
            entry.labels[scopes.labels(match[1])[0]] = len(entry.operations)
        elif scopes.stack and not line.startswith("."):
            operation = _operation(scopes.rename(line), place)
            if operation.name == "bra":
                branches.append((len(entry.operations), scopes.labels(operation.operands[0])))
            entry.operations.append(operation)
    for at, labels in branches:
        label = next(label for label in labels if label in entry.labels)
        entry.operations[at] = replace(entry.operations[at], operands=(label,))
    return entry


def _declare(entry: Entry, scopes: _Scopes, name: str, kind: type) -> None:
    if match := re.fullmatch(r"(%?\w+)<(\d+)>", name):
        for index in range(int(match[2])):
            entry.registers[scopes.declare(f"{match[1]}{index}")] = kind
    else:
        entry.registers[scopes.declare(name)] = kind


def _lines(source: str) -> list[str]:
    """Statements, comments gone except the source lines that ``.loc`` has."""
    lines = []
    for raw in source.splitlines():
        text = raw.strip() if raw.strip().startswith(".loc") else raw.partition("//")[0].strip()
        text = re.sub(r"\s+", " ", text)
        if text in ("", ")", "("):
            continue
        if text.startswith(".loc"):
            lines.append(text)
            continue
        # Inline assembly may have several statements a line, and the braces of a block.
        while text.startswith("{"):
            lines.append("{")
            text = text[1:].strip()
        *statements, rest = text.split(";")
        lines += [statement.strip() + ";" for statement in statements]
        for piece in rest.replace("}", " } ").split() if "}" in rest else [rest.strip()]:
            if piece:
                lines.append(piece)
    return lines


def _operation(text: str, place: str) -> Operation:
    match = re.fullmatch(r"(?:@(!?)([\w%@]+) )?([\w.:]+) ?(.*?) ?;", text)
    if match is None:
        raise NotImplementedError(f"{place}: cannot read {text!r}")
    return Operation(match[3], tuple(_operands(match[4])), match[2], bool(match[1]), place)


def _operands(text: str) -> list[str]:
    """Split at commas outside brackets, spaces gone."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            parts.append("")
        elif letter != " ":
            parts[-1] += letter
    return parts if text else []
