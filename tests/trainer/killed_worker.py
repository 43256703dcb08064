"""Run once by test_balancing_loop.py: the tiny training of every method, killed with SIGKILL at the start of step 6.

python tests/trainer/killed_worker.py OUTPUT_DIR

Every training is a process of its own, forked before this one has computed anything.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from tiny_training import MOVING, make_trainer
from transformers import TrainerCallback

KILLED_AFTER = 5


class KillItself(TrainerCallback):
    """No handler runs, nothing is flushed: what survives is what was on the disk."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == KILLED_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    output = Path(sys.argv[1])
    torch.set_num_threads(1)  # the threads of OpenMP do not survive a fork
    for name, options in MOVING.items():
        child = os.fork()
        if child == 0:
            try:
                make_trainer(name, output / name, options, callbacks=[KillItself()]).train()
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        _, status = os.waitpid(child, 0)
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            sys.exit(f"{name}: the training was not killed, it ended with status {status}")


if __name__ == "__main__":
    main()
