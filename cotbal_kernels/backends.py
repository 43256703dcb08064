"""The registry through which the ops find a backend by name when they run, and the choice of "auto"."""

from . import portable
from .interface import Backend

BACKENDS: dict[str, Backend] = {}


def register_backend(name: str, backend: Backend) -> None:
    """Make ``backend="name"`` available to the public functions."""
    BACKENDS[name] = backend


def resolve_backend(name: str) -> str:
    """Return the name of a registered backend for ``name``, or raise ``ValueError`` naming those that exist.

    "auto" is "portable" as long as no GPU backend is part of the build. ("reference" never gets here.)
    """
    if name == "auto":
        return "portable"
    if name in BACKENDS:
        return name
    available = ", ".join(repr(known) for known in ("auto", "reference", *sorted(BACKENDS)))
    reason = "is not part of this build" if name in ("triton", "cuda") else "does not exist"
    raise ValueError(f"backend={name!r} {reason}; available backends: {available}")


register_backend("portable", portable)
