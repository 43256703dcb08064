"""Where the packages are whose data the built-in tasks are made of."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def wheel(package: str) -> Path:
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent
