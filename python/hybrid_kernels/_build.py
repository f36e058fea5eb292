"""What the native library is made of, and how to compile it.

``SPEC`` is the one list that all three builds read: ``setup.py`` (ahead of time), the loader
(just in time, ``_jit.py``) and CMake (``python _build.py --cmake``). This file imports neither
torch nor the rest of the package, so that it can be run where torch is absent.

A source ``*.simd.cpp`` becomes one object per instruction set, each with its own flags and with
``HYBRID_ISA`` naming its namespace; the choice among them is made when the library runs. Nothing is
compiled with ``-march=native``: the same binary serves every x86-64 processor. ``*.amx.cpp``
becomes one object, for those of them that have a matrix unit.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

WARNINGS = ("-Wall", "-Wextra", "-Wno-unknown-pragmas")

# -ffp-contract=off: GCC's default fuses a*b+c wherever it happens to see both operations, which
#   depends on inlining and vectorisation. A token must get the same bits in training, prefill and
#   decode, so a multiply-add is fused where the source says fma(), and nowhere else.
# -fno-math-errno, -fno-trapping-math: no value changes; loops with sqrt and selects vectorise.
# Nothing of -ffast-math that changes a value: sums keep the order they are written in.
FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
)

CUDA_ARCHITECTURES = ("80", "86", "89", "90", "100")  # Ampere (two), Ada, Hopper, Blackwell

# -fmad=false: as -ffp-contract=off above.
NVCC_FLAGS = ("-std=c++20", "-O3", "-fmad=false", "-expt-relaxed-constexpr")

BUILD_MODES = ("auto", "cpu", "cuda", "none")


@dataclass(frozen=True)
class Isa:
    """An instruction set: the namespace and the flags of its copy of a ``*.simd.cpp`` file."""

    name: str
    flags: tuple[str, ...]


GENERIC = Isa("generic", ())
AVX2 = Isa("avx2", ("-mavx2", "-mfma", "-mf16c"))
AVX512 = Isa(
    "avx512",
    (
        *AVX2.flags,
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mprefer-vector-width=512",
    ),
)
# Its own instructions are written out: the assembler has to know them (binutils 2.35), not the
# compiler.
AMX = Isa("amx", AVX512.flags)


def target_isas(machine: str | None = None) -> tuple[Isa, ...]:
    """The levels compiled for a processor family (this one's by default), plainest first."""
    return (GENERIC, AVX2, AVX512) if is_x86(machine) else (GENERIC,)


def is_x86(machine: str | None = None) -> bool:
    return (machine or platform.machine()).lower() in ("x86_64", "amd64")


@dataclass(frozen=True)
class Unit:
    """One object file: a source (relative to csrc) and how it is compiled."""

    source: str
    isa: Isa | None
    uses_torch: bool

    @property
    def is_cuda(self) -> bool:
        return self.source.endswith(".cu")

    @property
    def object_name(self) -> str:
        stem = self.source.removesuffix(".cpp").removesuffix(".amx").replace("/", "__")
        return f"{stem}.{self.isa.name}.o" if self.isa else f"{stem}.o"

    @property
    def flags(self) -> tuple[str, ...]:
        return (f"-DHYBRID_ISA={self.isa.name}", *self.isa.flags) if self.isa else ()


@dataclass(frozen=True)
class KernelSpec:
    """A native extension: every ``*.cpp`` under csrc except the excluded folders.

    CUDA is a part of its own: kernels in ``*.cu``, their tensor functions in ``*_cuda_op.cpp``.
    """

    module: str
    excluded: tuple[str, ...] = ()

    def sources(self, csrc: Path, cuda: bool = False) -> list[str]:
        found = self._found(csrc, "*.cpp")
        if cuda:
            return found + self.cuda_sources(csrc)
        return [source for source in found if not source.endswith("_cuda_op.cpp")]

    def cuda_sources(self, csrc: Path) -> list[str]:
        return self._found(csrc, "*.cu")

    def _found(self, csrc: Path, pattern: str) -> list[str]:
        found = sorted(path.relative_to(csrc).as_posix() for path in csrc.rglob(pattern))
        return [source for source in found if source.split("/")[0] not in self.excluded]

    def units(self, csrc: Path, cuda: bool = False) -> list[Unit]:
        """The objects in link order.

        Of an inline function that several objects define, the linker keeps the first: plain
        objects come before AVX2 and AVX-512 ones, so that a shared function never carries
        instructions that the processor may lack.
        """
        sources = self.sources(csrc, cuda)
        units = [
            Unit(source, None, _uses_torch(csrc / source))
            for source in sources
            if not source.endswith((".simd.cpp", ".amx.cpp"))
        ]
        for isa in target_isas():
            units += [
                Unit(source, isa, False) for source in sources if source.endswith(".simd.cpp")
            ]
        if is_x86():
            units += [Unit(source, AMX, False) for source in sources if source.endswith(".amx.cpp")]
        return units

    def files(self, csrc: Path) -> list[Path]:
        """Everything that decides the binary: sources and headers."""
        suffixes = (".cpp", ".h", ".cu", ".cuh")
        found = (path for path in csrc.rglob("*") if path.suffix in suffixes)
        return sorted(p for p in found if p.relative_to(csrc).parts[0] not in self.excluded)


SPEC = KernelSpec("hybrid_kernels._C", excluded=("tests",))


def _uses_torch(source: Path) -> bool:
    if source.suffix == ".cu":
        return False
    include = r'^#include <(torch|ATen|c10|pybind11)/|^#include "common/dims\.h"'
    return re.search(include, source.read_text(), re.MULTILINE) is not None


def find_csrc() -> Path:
    """The C++ sources: the wheel's own copy, or csrc/ of the checkout."""
    package = Path(__file__).resolve().parent
    for candidate in (package / "_csrc", package.parents[1] / "csrc"):
        if (candidate / "schema.cpp").is_file():
            return candidate
    raise BuildError(f"no C++ sources beside {package}; reinstall hybrid-engine")


class BuildError(RuntimeError):
    """The native library could not be built; the message says why and what to do."""


def build_mode() -> str:
    """The value of ``HYBRID_KERNELS_BUILD``, checked."""
    mode = os.environ.get("HYBRID_KERNELS_BUILD", "auto")
    if mode not in BUILD_MODES:
        raise ValueError(f"HYBRID_KERNELS_BUILD={mode}: expected one of {', '.join(BUILD_MODES)}")
    return mode


def find_nvcc() -> str | None:
    """nvcc where the library gets CUDA kernels, None where it does not.

    By default it gets them if torch runs on CUDA and nvcc is there (`installed_nvcc`).
    ``HYBRID_KERNELS_BUILD=cpu`` leaves them out; ``cuda`` compiles them for any torch, and a
    missing nvcc is a `BuildError`.
    """
    import torch

    mode = build_mode()
    if mode == "cpu" or (mode != "cuda" and torch.version.cuda is None):
        return None
    nvcc = installed_nvcc()
    if nvcc is None and mode == "cuda":
        raise BuildError(f"HYBRID_KERNELS_BUILD=cuda needs nvcc: {NO_NVCC}")
    return nvcc


NO_NVCC = (
    "there is none in $CUDA_HOME/bin, among this Python's packages (nvidia-cuda-nvcc, nvidia-nvvm, "
    "nvidia-cuda-crt, nvidia-cuda-runtime, nvidia-cuda-cccl) or on the path"
)


def installed_nvcc() -> str | None:
    """nvcc in ``$CUDA_HOME`` where that is set; else pip's, which has this environment's version;
    else the one on the path."""
    if home := os.environ.get("CUDA_HOME"):
        return shutil.which("nvcc", path=f"{home}/bin")
    nvidia = importlib.util.find_spec("nvidia")
    for folder in (nvidia and nvidia.submodule_search_locations) or ():
        for nvcc in sorted(Path(folder).glob("cu*/bin/nvcc")):
            if (nvcc.parents[1] / "nvvm" / "bin" / "cicc").is_file():  # a package of its own
                return str(nvcc)
    return shutil.which("nvcc")


def cuda_architectures() -> tuple[str, ...]:
    """The GPUs compiled for: ``HYBRID_KERNELS_CUDA_ARCHITECTURES``, such as ``80,90``, or all."""
    asked = os.environ.get("HYBRID_KERNELS_CUDA_ARCHITECTURES")
    if not asked:
        return CUDA_ARCHITECTURES
    chosen = tuple(sm.strip() for sm in asked.split(","))
    if unknown := set(chosen) - set(CUDA_ARCHITECTURES):
        raise ValueError(
            f"HYBRID_KERNELS_CUDA_ARCHITECTURES={asked}: the kernels are written for "
            f"{', '.join(CUDA_ARCHITECTURES)}, not for {', '.join(sorted(unknown))}"
        )
    return chosen


@dataclass(frozen=True)
class Toolchain:
    """The compilers and the torch they build against."""

    cxx: str
    cxx_version: str
    torch_version: str
    torch_root: Path
    torch_flags: tuple[str, ...]
    nvcc: str | None = None  # None: no CUDA kernels

    @classmethod
    def detect(cls) -> Toolchain:
        """The compiler ``$CXX`` (default ``g++``) and the installed torch, or a `BuildError`."""
        import torch

        cxx = os.environ.get("CXX", "g++")
        if shutil.which(shlex.split(cxx)[0]) is None:
            raise BuildError(
                f"no C++ compiler ({cxx}); install g++ 11 or newer, e.g. apt-get install g++"
            )
        asked = subprocess.run([*shlex.split(cxx), "--version"], capture_output=True, text=True)
        if asked.returncode != 0:
            raise BuildError(f"{cxx} --version failed: {asked.stderr.strip()}; check $CXX")
        version = asked.stdout.splitlines()[0]
        abi = int(torch._C._GLIBCXX_USE_CXX11_ABI)
        return cls(
            cxx=cxx,
            cxx_version=version,
            torch_version=torch.__version__,
            torch_root=Path(torch.__file__).parent,
            torch_flags=(f"-D_GLIBCXX_USE_CXX11_ABI={abi}",),
            nvcc=find_nvcc(),
        )

    def includes(self) -> list[Path]:
        include = self.torch_root / "include"
        paths = [
            include,
            include / "torch/csrc/api/include",
            Path(sysconfig.get_paths()["include"]),
        ]
        if not (include / "pybind11").is_dir():  # torch usually carries the one it was built with
            import pybind11

            paths.append(Path(pybind11.get_include()))
        return paths

    def link_flags(self) -> tuple[str, ...]:
        """torch's libraries, and the OpenMP runtime that torch itself loaded.

        Two OpenMP runtimes in one process would mean two thread pools, and torch.set_num_threads
        would reach only one. A wheel that renames its copy (libgomp-<hash>.so.1) is linked by
        that file.
        """
        lib = self.torch_root / "lib"
        bundled = sorted(lib.glob("libgomp*.so*")) or sorted(
            (self.torch_root.parent / "torch.libs").glob("libgomp*.so*")
        )
        openmp = str(bundled[0]) if bundled else "-lgomp"
        torch = (f"-L{lib}", "-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10", openmp)
        return torch + self._cuda_link_flags()

    def _cuda_link_flags(self) -> tuple[str, ...]:
        """The CUDA runtime, linked in: torch's own, if any, may have another version."""
        if self.nvcc is None:
            return ()
        dry = subprocess.run([self.nvcc, "--dryrun", "x.cu"], capture_output=True, text=True)
        found = re.search(r"^#\$ LIBRARIES=(.*)", dry.stderr, re.MULTILINE)
        folders = shlex.split(found[1].replace('"', "")) if found else []
        folders.append(f"-L{Path(self.nvcc).resolve().parents[1] / 'lib'}")  # pip's has no lib64
        return (*folders, "-lcudart_static", "-lrt", "-lpthread", "-ldl")


def binary_key(csrc: Path, torch_version: str, cuda: bool = False) -> str:
    """Names the binary that these sources give for this torch and Python: 16 hex digits."""
    digest = hashlib.sha256()
    abi = sysconfig.get_config_var("EXT_SUFFIX") or ""
    gpus = f"cuda={','.join(cuda_architectures()) if cuda else ''}"
    for part in (torch_version, gpus, abi, *FLAGS, *WARNINGS, *NVCC_FLAGS):
        digest.update(part.encode() + b"\0")
    for isa in (*target_isas(), AMX):
        digest.update(" ".join((isa.name, *isa.flags)).encode() + b"\0")
    for path in SPEC.files(csrc):
        digest.update(path.relative_to(csrc).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def write_ninja(csrc: Path, build_dir: Path, tools: Toolchain) -> Path:
    """Writes build.ninja in ``build_dir``; returns the library that it makes."""
    library = build_dir / "_C.so"
    includes = " ".join(f"-isystem {_escape(path)}" for path in tools.includes())
    flags = " ".join((*FLAGS, *WARNINGS, f"-I{_escape(csrc)}"))
    # Files that use torch check and call; -O3 would buy nothing there.
    torch_flags = " ".join((includes, *tools.torch_flags, "-O2"))
    units = SPEC.units(csrc, cuda=tools.nvcc is not None)
    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {tools.cxx}",
        *_cuda_rule(csrc, tools),
        "rule compile",
        f"  command = $cxx {flags} $unit_flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx -shared -o $out $in {' '.join(map(_escape, tools.link_flags()))}",
    ]
    for unit in units:
        unit_flags = " ".join((*unit.flags, *((torch_flags,) if unit.uses_torch else ())))
        rule = "compile_cuda" if unit.is_cuda else "compile"
        lines += [
            f"build {unit.object_name}: {rule} {_escape(csrc / unit.source)}",
            f"  unit_flags = {unit_flags}",
        ]
    lines.append(f"build {library.name}: link {' '.join(unit.object_name for unit in units)}")
    _write_if_changed(build_dir / "build.ninja", "\n".join(lines) + "\n")
    return library


def _cuda_rule(csrc: Path, tools: Toolchain) -> list[str]:
    """Machine code for every GPU asked for that this nvcc knows, and PTX of the last for later
    ones."""
    if tools.nvcc is None:
        return []
    asked = subprocess.run([tools.nvcc, "--list-gpu-code"], capture_output=True, text=True)
    wanted = cuda_architectures()
    known = [sm for sm in wanted if f"sm_{sm}" in asked.stdout.split()]
    if not known:
        raise BuildError(f"{tools.nvcc} compiles for none of sm_{', sm_'.join(wanted)}")
    codes = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in known]
    codes.append(f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}")
    flags = " ".join((*NVCC_FLAGS, "-Xcompiler=-fPIC,-fvisibility=hidden", *codes))
    return [
        "rule compile_cuda",
        f"  command = {tools.nvcc} {flags} -I{_escape(csrc)} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]


def compile_library(
    csrc: Path, build_dir: Path, tools: Toolchain, progress: Callable[[int, int], None]
) -> Path:
    """Builds (only what changed) in ``build_dir`` and returns the library; `BuildError` with the
    compiler's own lines when it fails. ``progress(done, total)`` is called after each object."""
    build_dir.mkdir(parents=True, exist_ok=True)
    library = write_ninja(csrc, build_dir, tools)
    command = [_ninja(), "-C", str(build_dir), f"-j{usable_cores()}", "-k0"]
    environment = {**os.environ, "NINJA_STATUS": "[%f/%t] "}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    assert process.stdout is not None
    output = []
    for line in process.stdout:
        output.append(line.rstrip())
        if match := re.match(r"\[(\d+)/(\d+)\]", line):
            progress(int(match[1]), int(match[2]))
    if process.wait() != 0:
        compilers = tools.cxx if tools.nvcc is None else f"{tools.cxx} or {tools.nvcc}"
        hint = "" if tools.nvcc is None else "\n(HYBRID_KERNELS_BUILD=cpu builds without CUDA)"
        raise BuildError(
            f"{compilers} failed ({tools.cxx_version}):\n" + "\n".join(_errors(output)) + hint
        )
    return library


def usable_cores() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _errors(output: list[str], limit: int = 20) -> Iterator[str]:
    """The compiler's error lines and where they point, or the last lines when there are none."""
    marked = [line for line in output if re.search(r"\berror\b|undefined reference|FAILED", line)]
    yield from (marked or output)[:limit]


def _ninja() -> str:
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        if (found := shutil.which("ninja")) is None:
            raise BuildError("ninja is not installed; run: pip install ninja") from None
        return found


def _escape(path: Path | str) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def cmake_lists() -> str:
    """The same lists as CMake ``set()`` commands: the torch-free sources, which CTest links."""
    csrc = find_csrc()
    units = [unit for unit in SPEC.units(csrc) if not unit.uses_torch]
    plain = [f"csrc/{unit.source}" for unit in units if unit.isa is None]
    simd = sorted({f"csrc/{unit.source}" for unit in units if unit.isa in target_isas()})
    amx = [f"csrc/{unit.source}" for unit in units if unit.isa is AMX]
    lines = [
        f"set(HYBRID_FLAGS {' '.join(flag for flag in FLAGS if flag != '-O3')})",
        f"set(HYBRID_WARNINGS {' '.join(WARNINGS)})",
        f"set(HYBRID_PLAIN_SOURCES {' '.join(plain)})",
        f"set(HYBRID_SIMD_SOURCES {' '.join(simd)})",
        f"set(HYBRID_AMX_SOURCES {' '.join(amx)})",
        f"set(HYBRID_ISAS {' '.join(isa.name for isa in target_isas())})",
    ]
    isas = (*target_isas(), AMX)
    lines += [f"set(HYBRID_FLAGS_{isa.name} {' '.join(isa.flags)})" for isa in isas]
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:] != ["--cmake"]:
        sys.exit("usage: python _build.py --cmake")
    print(cmake_lists())
