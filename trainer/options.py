"""What every group of options has in common."""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # of tasks and comparisons: usable in file names
SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")  # of test sets, where "+" is usual: testA_refcoco+


class Options(BaseModel):
    """Base of option groups: unknown keys and numbers that are not finite are errors."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)
