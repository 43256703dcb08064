"""Ships csrc/ inside the package, and compiles it where CUDA is there; everything else is in pyproject.toml.

COTBAL_BUILD_CUDA=1 compiles or fails, =0 does not compile. Unset: if nvcc is found and the torch that is importable
here has CUDA. Without a compiled library the kernels are compiled on first use.
"""

import importlib.util
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent


def load_recipe() -> Any:
    """cotbal_kernels/cuda_kernels/build.py by its path: importing the package would need torch."""
    spec = importlib.util.spec_from_file_location("build_csrc", HERE / "cotbal_kernels" / "cuda_kernels" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wanted() -> bool:
    choice = os.environ.get("COTBAL_BUILD_CUDA", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"COTBAL_BUILD_CUDA must be 0 or 1 (or unset), got {choice!r}")
    if choice:
        return choice == "1"
    if load_recipe().find_nvcc() is None:
        return False
    try:
        import torch
    except ImportError:  # an isolated build
        return False
    return torch.version.cuda is not None


class BuildLibrary(build_ext):
    """nvcc in place of the C compiler; the name does not depend on the version of Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        recipe = load_recipe()
        try:
            nvcc = recipe.find_nvcc()
            if nvcc is None:
                raise recipe.BuildError("nvcc was not found: set CUDA_HOME to the CUDA toolkit")
            flags = recipe.architecture_flags(recipe.PREBUILT, recipe.known_architectures(nvcc))
            compiled = Path(self.build_temp).resolve() / "_csrc.so"
            recipe.compile_library(nvcc, flags, compiled)
        except recipe.BuildError as error:
            if os.environ.get("COTBAL_BUILD_CUDA") == "1":
                raise
            ext.optional = True
            warnings.warn(f"installing without compiled CUDA kernels: {error}", stacklevel=1)
            return
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(compiled, output)


class ShipSources(build_py):
    """csrc/ becomes cotbal_kernels/csrc/ in a wheel; an editable installation finds the checkout."""

    def run(self) -> None:
        super().run()
        if not getattr(self, "editable_mode", False):
            for source in sorted((HERE / "csrc").glob("*.cu*")):
                target = Path(self.build_lib) / "cotbal_kernels" / "csrc" / source.name
                target.parent.mkdir(parents=True, exist_ok=True)
                self.copy_file(str(source), str(target))


setup(
    ext_modules=[Extension("cotbal_kernels.cuda_kernels._csrc", sources=["csrc/api.cu"])] if wanted() else [],
    cmdclass={"build_ext": BuildLibrary, "build_py": ShipSources},
)
