"""Builds the wheel; everything declarative is in pyproject.toml.

Where torch and ninja can be imported (``pip install --no-build-isolation .``) the native library
is compiled ahead of time. Under build isolation they cannot: the wheel then carries the C++
sources alone and compiles them at first use. ``HYBRID_KERNELS_BUILD=cpu`` or ``cuda`` insists on
the former, ``none`` on the latter.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

if int(setuptools.__version__.split(".")[0]) < 77:  # older ones cannot read pyproject.toml
    sys.exit(f"setuptools {setuptools.__version__} is too old: run pip install -U setuptools")

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"


def _load_build_module():
    """python/hybrid_kernels/_build.py by path: the package itself imports torch."""
    path = ROOT / "python" / "hybrid_kernels" / "_build.py"
    spec = importlib.util.spec_from_file_location("hybrid_kernels_build", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


_build = _load_build_module()


def _ahead_of_time() -> bool:
    try:
        mode = _build.build_mode()
    except ValueError as error:
        sys.exit(str(error))
    importable = all(importlib.util.find_spec(name) is not None for name in ("torch", "ninja"))
    if mode in ("cpu", "cuda") and not importable:
        sys.exit(
            f"HYBRID_KERNELS_BUILD={mode} needs torch and ninja: "
            "use pip install --no-build-isolation ."
        )
    return mode != "none" and importable


class BuildWithSources(build_py):
    """Copies csrc/ into the package, for the build at first use."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return  # the checkout's own csrc/ is used
        target = Path(self.build_lib) / "hybrid_kernels" / "_csrc"
        shutil.rmtree(target, ignore_errors=True)
        for path in _build.SPEC.files(CSRC):
            copy = target / path.relative_to(CSRC)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


class BuildNative(build_ext):
    """Compiles the library with ninja and writes, beside it, the key of what it was built from."""

    def build_extension(self, ext: Extension) -> None:
        tools = _build.Toolchain.detect()
        objects = Path(self.build_temp).resolve()
        built = _build.compile_library(CSRC, objects, tools, self._show_progress)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(built, target)
        key = _build.binary_key(CSRC, tools.torch_version, cuda=tools.nvcc is not None)
        target.with_name("_C.key").write_text(key + "\n")

    def get_outputs(self) -> list[str]:
        libraries = super().get_outputs()
        return [*libraries, *(str(Path(library).with_name("_C.key")) for library in libraries)]

    def _show_progress(self, done: int, total: int) -> None:
        print(f"hybrid_kernels: {done}/{total} objects", flush=True)


extensions = [Extension(_build.SPEC.module, sources=[])] if _ahead_of_time() else []
setup(
    ext_modules=extensions,
    cmdclass={"build_py": BuildWithSources, "build_ext": BuildNative},
)
