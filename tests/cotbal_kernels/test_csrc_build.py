"""csrc/ compiles for every GPU without warnings or spills, ships in a wheel, and says why where it cannot run."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cuda_on_cpu import compile_for_cpu, find_compiler

from cotbal_kernels.cuda_kernels import build, library

ROOT = Path(__file__).parents[2]
needs_nvcc = pytest.mark.skipif(build.find_nvcc() is None, reason="no nvcc: CUDA_HOME, PATH, /usr/local/cuda")

# Registers per thread that leave room for the threads of a block: 65536 / 1024 where a row takes 1024 of them.
MOST_REGISTERS = {
    **dict.fromkeys(
        ("chunk_gradient", "saved_gradient", "scale_gradient", "compact", "gather_rows", "scatter_rows"), 64
    ),
    **dict.fromkeys(("task_sums", "task_scales"), 128),
}


def test_only_known_architectures_are_asked_for() -> None:
    known = ["75", "80", "86", "90", "90a", "100", "100a", "120", "120a"]
    flags = build.architecture_flags(build.PREBUILT, known)
    assert flags == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",  # PTX for what comes later
    ]
    older = build.architecture_flags(build.PREBUILT, known[:4])  # no Hopper yet: PTX of Ampere
    assert older == ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_80,code=compute_80"]
    with pytest.raises(build.BuildError, match="compiles for none of 80, 90a, 100, only for 75"):
        build.architecture_flags(build.PREBUILT, ["75"])
    for capability, name in (((8, 0), "80"), ((8, 9), "86"), ((9, 0), "90a"), ((10, 3), "100"), ((13, 0), "120")):
        assert build.device_architecture(capability, known) == name
    with pytest.raises(build.BuildError, match="no architecture up to compute_70"):
        build.device_architecture((7, 0), known)


@needs_nvcc
def test_compiles_for_every_gpu(tmp_path: Path) -> None:
    """Warnings are errors; no kernel spills or needs more registers than its block may have."""
    nvcc = str(build.find_nvcc())
    flags = build.architecture_flags(build.PREBUILT, build.known_architectures(nvcc))
    strict = ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror", "-Xptxas", "-v,--warn-on-spills"]
    build.compile_library(nvcc, [*flags, *strict], tmp_path / "_csrc.so")
    report = (tmp_path / "_csrc.log").read_text()
    kernels = re.findall(
        r"Compiling entry function '(\w+)' for '(sm_\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        report,
        flags=re.DOTALL,
    )
    assert {architecture for _, architecture, *_ in kernels} == {"sm_80", "sm_90a", "sm_100"}
    # Five pairs of formats, plain and general, of kernels A and C; nine of D; B, E and F; two of G, six of H.
    assert len(kernels) == 3 * (10 + 10 + 9 + 3 + 2 + 6)
    for name, architecture, stack, stored, loaded, registers in kernels:
        most = next(limit for kernel, limit in MOST_REGISTERS.items() if f"{kernel}_kernel" in name)
        assert (int(stack), int(stored), int(loaded)) == (0, 0, 0), f"{name} spills on {architecture}"
        assert int(registers) <= most, f"{name} takes {registers} registers on {architecture}"
    assert library.KernelLibrary(tmp_path / "_csrc.so").source == build.source_digest()


# --- where the library comes from ---------------------------------------------------------------------------


GPU = torch.device("cuda", 0)


def forget_libraries() -> None:
    library.load.cache_clear()
    library._load.cache_clear()


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A machine with a GPU as far as torch says, nvcc as this one has it, an empty cache, nothing installed."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(library, "_prebuilt", lambda: None)
    monkeypatch.setattr(library, "_build_failure", None)
    monkeypatch.setattr(build, "find_nvcc", lambda: "/cuda/bin/nvcc")
    monkeypatch.setenv("COTBAL_CACHE", str(tmp_path / "cache"))
    forget_libraries()
    yield SimpleNamespace(patch=monkeypatch)
    forget_libraries()


def test_every_reason_names_its_remedy(fake_gpu) -> None:
    assert library.unavailable_reason(GPU) is None
    fake_gpu.patch.setattr(build, "find_nvcc", lambda: None)
    reason = library.unavailable_reason(GPU)
    assert "nvcc is not found: install the CUDA toolkit and set CUDA_HOME" in reason
    fake_gpu.patch.setattr(library, "_prebuilt", lambda: object())
    assert library.unavailable_reason(GPU) is None
    fake_gpu.patch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 7.5: the kernels need 8.0" in library.unavailable_reason(GPU)
    fake_gpu.patch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device is visible: check the driver" in library.unavailable_reason(GPU)
    fake_gpu.patch.setattr(torch.version, "cuda", None)
    reason = library.unavailable_reason(GPU)
    assert "was built without CUDA: install a CUDA build of torch" in reason
    with pytest.raises(RuntimeError, match="built without CUDA"):
        library.load(GPU)


def write_compiler(path: Path, compiles: str) -> str:
    """An nvcc that answers questions as nvcc does and compiles as told."""
    path.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        "  --list-gpu-arch) echo compute_80; echo compute_100; echo compute_90; exit 0;;\n"
        "  --version) echo release 13.0; exit 0;;\n"
        "esac\n"
        'while [ "$1" != -o ]; do shift; done\n' + compiles
    )
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler: CXX, g++, c++")
def test_compiled_once_on_first_use(fake_gpu, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """One line on stderr, then the cache; another source is another library; many processes compile once."""
    compile_for_cpu(tmp_path / "ready.so")
    calls = tmp_path / "calls"
    script = f'echo "$*" >> {calls}\nsleep 0.3\ncp {tmp_path / "ready.so"} "$2"\n'
    nvcc = write_compiler(tmp_path / "nvcc", script)
    fake_gpu.patch.setattr(build, "find_nvcc", lambda: nvcc)
    first = library.load(GPU)
    assert capfd.readouterr().err.count("compiling CUDA kernels") == 1
    assert library.load(GPU) is first
    forget_libraries()  # another process
    assert library.load(GPU).path == first.path
    assert capfd.readouterr().err == ""
    assert len(calls.read_text().splitlines()) == 1
    assert sorted(path.name for path in first.path.parent.iterdir()) == ["_csrc.log", "_csrc.so", "lock"]
    fake_gpu.patch.setattr(build, "source_digest", lambda: "other")
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import build;"
        "build.source_digest = lambda: 'other'; print(build.cached_library(sys.argv[2], (9, 0)))"
    )
    command = [sys.executable, "-c", program, str(ROOT / "cotbal_kernels" / "cuda_kernels"), nvcc]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {rank.communicate()[0].strip() for rank in ranks}
    assert len(paths) == 1
    assert paths != {str(first.path)}
    assert len(calls.read_text().splitlines()) == 2


def test_a_failed_build_names_its_log(fake_gpu, tmp_path: Path) -> None:
    nvcc = write_compiler(tmp_path / "nvcc", "echo error: no such thing\nexit 2\n")
    fake_gpu.patch.setattr(build, "find_nvcc", lambda: nvcc)
    with pytest.raises(RuntimeError, match=r"compiling the CUDA kernels failed: .*exit status 2") as raised:
        library.load(GPU)
    log = re.search(r"its output is in (\S+)", str(raised.value)).group(1)
    assert "error: no such thing" in Path(log).read_text()
    assert str(raised.value) == library.unavailable_reason(GPU)
    assert not list(Path(log).parent.glob("*.so*"))


# --- packaging ----------------------------------------------------------------------------------------------


def build_wheel(tmp_path: Path, kind: str = "wheel", **environment: str) -> tuple[Path, str]:
    """Build from a copy, so that nothing is left in the checkout; returns the wheel and what the build said."""
    checkout = tmp_path / "checkout"
    if not checkout.exists():
        checkout.mkdir()
        for name in ("cotbal_kernels", "csrc"):
            shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "NOTICE"):
            shutil.copy2(ROOT / name, checkout)
    program = f"import setuptools.build_meta as backend, sys; backend.build_{kind}(sys.argv[1])"
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=checkout,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return next(tmp_path.glob("*.whl")), result.stdout + result.stderr


def test_a_wheel_has_the_sources_and_finds_them(tmp_path: Path) -> None:
    wheel, _ = build_wheel(tmp_path, COTBAL_BUILD_CUDA="0")
    assert wheel.name.endswith("-none-any.whl")
    sources = {path.name for path in build.source_directory().glob("*.cu*")}
    with zipfile.ZipFile(wheel) as archive:
        shipped = {Path(name).name for name in archive.namelist() if name.startswith("cotbal_kernels/csrc/")}
        archive.extractall(tmp_path / "installed")
    assert shipped == sources
    assert "api.cu" in shipped
    program = "import build; print(build.source_directory()); print(build.source_digest())"
    package = tmp_path / "installed" / "cotbal_kernels"
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=package / "cuda_kernels", capture_output=True, text=True, check=True
    ).stdout.split()
    assert found == [str(package / "csrc"), build.source_digest()]


def test_a_wheel_has_the_library_where_one_was_compiled(tmp_path: Path) -> None:
    """With a compiler that only pretends: for every GPU, under a name that does not depend on Python's version."""
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    write_compiler(home / "bin" / "nvcc", 'echo library > "$2"\n')
    wheel, _ = build_wheel(tmp_path, COTBAL_BUILD_CUDA="1", CUDA_HOME=str(home))
    assert "linux" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("cotbal_kernels/cuda_kernels/_csrc.so") == b"library\n"
    wheel.unlink()
    wheel, _ = build_wheel(tmp_path, "editable", COTBAL_BUILD_CUDA="1", CUDA_HOME=str(home))
    package = tmp_path / "checkout" / "cotbal_kernels"
    assert (package / "cuda_kernels" / "_csrc.so").read_text() == "library\n"
    assert not (package / "csrc").exists()  # the checkout's own is found
    wheel.unlink()
    write_compiler(home / "bin" / "nvcc", "exit 1\n")
    with pytest.raises(AssertionError, match="failed with exit status 1; its output is in"):
        build_wheel(tmp_path, COTBAL_BUILD_CUDA="1", CUDA_HOME=str(home))
