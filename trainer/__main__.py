"""The command ``cotbal``, also ``python -m trainer``: its commands, or which package they lack."""

from __future__ import annotations

import sys


def main() -> None:
    """Console entry point. The loss needs torch alone, so the packages of the commands may not be there."""
    try:
        from trainer.cli import main as run

        run()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "trainer", "cotbal_kernels"):  # a defect of this project
            raise
        print(
            f"cotbal: the Python package '{package}' is missing; what the commands need comes with "
            "pip install 'cotbal[trainer]'",
            file=sys.stderr,
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
