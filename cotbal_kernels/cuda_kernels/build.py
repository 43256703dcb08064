"""Compiles csrc/ into one shared library: for every GPU from ``setup.py``, for the present one on first use.

The library has a plain C API and needs no torch headers, so neither does this module need torch: ``setup.py``
loads it by its path.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_PACKAGE = Path(__file__).parent.parent
# What a prebuilt library runs on: A100 and all Ampere and Ada (sm_80), H100 and H200, B200; newer ones through PTX.
PREBUILT = ("80", "90a", "100")
FLAGS = ("-std=c++17", "-O3", "-lineinfo", "-shared", "-Xcompiler", "-fPIC,-fvisibility=default")


class BuildError(RuntimeError):
    """The compiler refused; the message names the log."""


def source_directory() -> Path:
    """csrc/: inside the package in a wheel, beside it in a checkout or an editable installation."""
    for directory in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc"):
        if (directory / "api.cu").is_file():
            return directory
    raise FileNotFoundError(f"csrc/api.cu is neither in {_PACKAGE} nor in {_PACKAGE.parent}: reinstall cotbal")


def source_digest() -> str:
    """Identifies the source and the flags; a library compiled from others is not used."""
    digest = hashlib.sha256("\0".join(FLAGS).encode())
    for source in sorted(source_directory().glob("*.cu*")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:20]


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME or CUDA_PATH, of PATH, or of /usr/local/cuda, in this order; None if there is none."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for home in homes:
        found = shutil.which("nvcc", path=os.path.join(home, "bin"))
        if found:
            return found
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def known_architectures(nvcc: str) -> list[str]:
    """What this nvcc compiles for, without the ``compute_``, oldest first: 75, 80, ... 90, 90a, 100, ..."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout
    found = sorted(re.findall(r"compute_(\d+)\b", listed), key=int)
    # The list names no architecture with specific features; they exist from Hopper on.
    return [name for number in found for name in ([number, f"{number}a"] if int(number) >= 90 else [number])]


def architecture_flags(architectures: Iterable[str], known: Sequence[str]) -> list[str]:
    """Machine code for those of ``architectures`` that nvcc knows, and PTX of the newest for what comes later."""
    chosen = [name for name in architectures if name in known]
    if not chosen:
        raise BuildError(f"nvcc compiles for none of {', '.join(architectures)}, only for {', '.join(known)}")
    newest = max((name for name in chosen if name.isdigit()), key=int, default=None)
    flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in chosen]
    return flags + ([f"-gencode=arch=compute_{newest},code=compute_{newest}"] if newest else [])


def device_architecture(capability: tuple[int, int], known: Sequence[str]) -> str:
    """The name to compile for on a device: with the specific features of Hopper and later where nvcc knows them."""
    number = f"{capability[0]}{capability[1]}"
    for name in (f"{number}a", number):
        if name in known:
            return name
    older = [name for name in known if name.isdigit() and int(name) < int(number)]
    if not older:
        raise BuildError(f"nvcc knows no architecture up to compute_{number}, only {', '.join(known)}")
    return older[-1]  # its PTX is compiled further by the driver


def compile_library(nvcc: str, flags: Sequence[str], output: Path) -> None:
    """Run nvcc; what it says goes to ``output`` with the suffix ``.log``. An incomplete library never appears."""
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished, log = output.with_name(f"{output.name}.{os.getpid()}.tmp"), output.with_suffix(".log")
    digest = f'-DCOTBAL_SOURCE="{source_digest()}"'
    command = [nvcc, *FLAGS, digest, "-t", "0", *flags, "-o", str(unfinished), str(source_directory() / "api.cu")]
    try:
        with log.open("w") as stream:
            print(*command, file=stream, flush=True)
            code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
        if code != 0:
            raise BuildError(f"{nvcc} failed with exit status {code}; its output is in {log}")
        os.replace(unfinished, output)
    finally:
        unfinished.unlink(missing_ok=True)


def cache_directory() -> Path:
    """COTBAL_CACHE, else cotbal/ in the user's cache directory."""
    own = os.environ.get("COTBAL_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cotbal"


def cached_library(nvcc: str, capability: tuple[int, int]) -> Path:
    """The library for this source, this nvcc and this kind of device; compiled now if it is not in the cache.

    Safe for many processes at once: one compiles, the others wait for it.
    """
    release = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    known = known_architectures(nvcc)
    flags = architecture_flags([device_architecture(capability, known)], known)
    compiler = hashlib.sha256("\0".join([release, *flags]).encode()).hexdigest()[:8]
    directory = cache_directory() / "cuda" / f"{source_digest()}-{compiler}"
    library = directory / "_csrc.so"
    if not library.exists():
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory / "lock"):
            if not library.exists():  # another process may have been faster
                print(f"cotbal: compiling CUDA kernels into {library}, about a minute, once", file=sys.stderr)
                compile_library(nvcc, flags, library)
    return library


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
