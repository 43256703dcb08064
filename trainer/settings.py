"""``KEY=VALUE`` settings of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from trainer.errors import UserError
from trainer.parsing import parse_yaml


def parse_settings(items: Sequence[str] | None) -> dict[str, Any]:
    """Values are read as YAML: ``a=1`` is an integer, ``b=[x, y]`` a list.

    Raises:
        UserError: an item has no ``=``, or its value is not YAML.
    """
    parsed: dict[str, Any] = {}
    for item in items or []:
        key, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"--set takes KEY=VALUE, got '{item}'")
        try:
            parsed[key] = parse_yaml(value)
        except yaml.YAMLError as error:
            raise UserError(f"--set {item}: the value is not valid YAML ({' '.join(str(error).split())})") from error
    return parsed
