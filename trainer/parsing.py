"""JSON and YAML in which no key counts twice, and numbers of them."""

from __future__ import annotations

import json
import math
from typing import Any

import yaml


def parse_json(text: str) -> Any:
    """JSON in which no object has a key twice: ``json`` alone keeps the last of them without a word.

    Raises:
        ValueError: it is not JSON, or repeats a key.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the key '{key}' is there twice in one object")
            found[key] = value
        return found

    return json.loads(text, object_pairs_hook=unique)


def number(value: Any) -> float | None:
    """The value as a finite float; None for anything else, and for true, which Python counts as 1."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer beyond the largest float
        return None


class _Loader(yaml.SafeLoader):
    """YAML in which no mapping has a key twice, and no number is another one: PyYAML alone keeps the last key without a
    word, and reads 010 as 8 and 1:30 as 90."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        found = set()
        for key, _ in node.value:  # not yet those that `<<` brings, which may be overridden
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if (key.tag, key.value) in found:
                raise yaml.composer.ComposerError(
                    "while reading a mapping", node.start_mark, f"the key '{key.value}' is there twice", key.start_mark
                )
            found.add((key.tag, key.value))
        return node

    def _number(self, node: yaml.ScalarNode) -> float:
        digits = node.value.lstrip("+-").replace("_", "")
        octal = node.tag == "tag:yaml.org,2002:int" and digits[:1] == "0" and digits[1:].isdigit()
        if octal or ":" in digits:
            base = "8" if octal else "60"
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"{node.value} would be a number with base {base}; write it in decimal, or in quotes for a text",
                node.start_mark,
            )
        make = self.construct_yaml_int if node.tag == "tag:yaml.org,2002:int" else self.construct_yaml_float
        return make(node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader._number)


def parse_yaml(text: str) -> Any:
    """YAML in which no mapping has a key twice, and numbers are decimal or have a prefix that says otherwise (0x).

    Raises:
        yaml.YAMLError: it is not YAML, repeats a key, or has a number such as 010 or 1:30.
    """
    return yaml.load(text, Loader=_Loader)  # a SafeLoader
