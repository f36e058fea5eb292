"""Finds the native library: built ahead of time, else built now into a user cache, else absent.

Environment variables (these six are all that the kernel library reads):

``HYBRID_KERNELS_BUILD``
    ``auto`` (default), ``cpu`` and ``cuda`` allow a build at first use, ``none`` forbids it.
    ``auto`` compiles the CUDA kernels where torch runs on CUDA and nvcc is found, ``cpu`` leaves
    them out, ``cuda`` insists on them. In ``setup.py``, ``cpu`` and ``cuda`` also make a build
    ahead of time obligatory.
``HYBRID_KERNELS_CUDA_ARCHITECTURES``
    The GPUs to compile for, such as ``80,90``: all of 80, 86, 89, 90 and 100 by default.
``HYBRID_KERNELS_REQUIRE_NATIVE``
    ``1`` makes it an error when the native library, or a native kernel for given tensors, is
    missing.
``HYBRID_KERNELS_CACHE``
    Where libraries are built; by default ``$XDG_CACHE_HOME/hybrid_kernels`` or
    ``~/.cache/hybrid_kernels``.
``HYBRID_KERNELS_ISA``
    ``generic``, ``avx2``, ``avx512`` or ``amx``: run on a lower instruction set than the
    processor's best.
``HYBRID_KERNELS_EXACT``
    ``1``: on a GPU, `linear` keeps one order of sums whatever the number of rows, by way of Triton
    (`ops._exact`). On the CPU that is always so.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType

import torch

from hybrid_kernels import _jit
from hybrid_kernels._build import (
    SPEC,
    BuildError,
    binary_key,
    build_mode,
    find_csrc,
    find_nvcc,
)


def require_native() -> bool:
    """Whether a missing native kernel is an error rather than a reason to use the reference."""
    return os.environ.get("HYBRID_KERNELS_REQUIRE_NATIVE", "0") not in ("", "0")


@functools.cache
def load() -> ModuleType | None:
    """The native extension module, or None (with one warning) where there is none to be had.

    Raises:
        RuntimeError: none to be had and ``HYBRID_KERNELS_REQUIRE_NATIVE=1``.
    """
    try:
        return _import(_locate())
    except (BuildError, ImportError, OSError) as error:
        if require_native():
            raise RuntimeError(f"hybrid_kernels: no native kernels: {error}") from error
        warnings.warn(
            f"hybrid_kernels: no native kernels, using the slower PyTorch reference: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def native_available() -> bool:
    """Whether the native kernels are there; builds and loads them if that has not happened yet."""
    return load() is not None


def native_module() -> ModuleType:
    """The native extension module ``hybrid_kernels._C``; RuntimeError where it is missing."""
    module = load()
    if module is None:
        raise RuntimeError("hybrid_kernels: the native library is missing (see the warning above)")
    return module


def _locate() -> Path:
    """The library file, built if need be."""
    csrc = find_csrc()
    for cuda in (True, False):  # built ahead: with what that machine had
        key = binary_key(csrc, torch.__version__, cuda)
        ahead = ahead_of_time_library(Path(__file__).parent, key)
        if ahead is not None:
            return ahead
    if build_mode() == "none":
        raise BuildError(
            "none was built ahead of time and HYBRID_KERNELS_BUILD=none forbids building one"
        )
    key = binary_key(csrc, torch.__version__, cuda=find_nvcc() is not None)
    return _jit.cached_library(csrc, key)


def ahead_of_time_library(package: Path, key: str) -> Path | None:
    """The installed library, if it was built from these sources for this torch and Python.

    After an upgrade of torch, or an edit in a source checkout, the installed one no longer fits:
    its key, written beside it by ``setup.py``, says so before it is loaded.
    """
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        library = package / f"_C{suffix}"
        key_file = package / "_C.key"
        if library.is_file() and key_file.is_file() and key_file.read_text().strip() == key:
            return library
    return None


def _import(library: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(SPEC.module, str(library))
    spec = importlib.util.spec_from_file_location(SPEC.module, library, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules[SPEC.module] = module
    return module
