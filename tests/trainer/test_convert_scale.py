"""Memory of a conversion does not grow with the file: measured in a process of its own.

The full size (2,000,000 records) is ``python tests/trainer/convert_scale.py 2000000 FOLDER``, with ``--merge`` for
questions that are merged by image.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["--merge"]])
def test_peak_memory_is_bounded(arguments, tmp_path):
    script = Path(__file__).with_name("convert_scale.py")
    count = 40_000
    command = [sys.executable, str(script), str(count), str(tmp_path), *arguments]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert result["questions"] == count
    # The interpreter and its modules take 60 MB, SQLite's page cache 32 MB: nothing is left to hold the records.
    assert result["peak_bytes"] < 180e6
