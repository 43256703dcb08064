"""No training process outlives the one that started it, not even one whose parent is gone before it can ask."""

import os
import subprocess
import sys

import pytest

from trainer.launching import PARENT


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel is asked, and only Linux can be")
@pytest.mark.parametrize("parent", ["here", "gone", "not said"])
def test_a_process_whose_parent_is_gone_ends_at_once(parent: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != PARENT}
    if parent != "not said":
        # Not the parent: the process that started this one.
        environment[PARENT] = str(os.getpid() if parent == "here" else os.getppid())
    script = "from trainer.launching import die_with_parent; die_with_parent(); print('lives')"
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == ((1, "") if parent == "gone" else (0, "lives\n")), found.stderr
