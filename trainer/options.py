"""What every group of options has in common."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidatorFunctionWrapHandler, field_validator

MOST_EPOCHS = 1e6  # whose steps can still be counted
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # of tasks and comparisons: usable in file names
SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")  # of test sets, where "+" is usual: testA_refcoco+


class Options(BaseModel):
    """Base of option groups: unknown keys, numbers that are not finite, and a yes or no for a number are errors."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="wrap")
    @classmethod
    def _yes_is_no_number(cls, given: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        """To pydantic it is 1."""
        valid = validate(given)
        for before, after in _single_values(given, valid):
            if isinstance(before, bool) and not isinstance(after, bool):
                raise ValueError("must be a number, not a yes or no")
        return valid


def _single_values(given: Any, valid: Any) -> list[tuple[Any, Any]]:
    """What was given beside what it became, by key in a mapping of numbers."""
    if isinstance(given, dict) and isinstance(valid, dict):
        return [(given[key], valid[key]) for key in valid if key in given]
    return [(given, valid)]
