"""How the native library is found, built, shared between processes, and done without."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hybrid_kernels import _build, _jit, _loader, native_module

BUILD_SCRIPT = Path(_build.__file__)


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HYBRID_KERNELS_")}
    if "HYBRID_KERNELS_CACHE" in os.environ:
        clean["HYBRID_KERNELS_CACHE"] = os.environ["HYBRID_KERNELS_CACHE"]
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**clean, **environment}
    )


@pytest.fixture
def tiny_csrc(tmp_path: Path) -> Path:
    """A library that compiles in a moment: one plain file, one per instruction set."""
    csrc = tmp_path / "csrc"
    (csrc / "tests").mkdir(parents=True)
    (csrc / "tests" / "a_test.cpp").write_text("not C++\n")
    (csrc / "schema.cpp").write_text("int schema() { return 1; }\n")
    (csrc / "hot.simd.cpp").write_text("namespace HYBRID_ISA { int hot() { return 2; } }\n")
    return csrc


# The list


def test_every_simd_file_is_compiled_once_per_instruction_set(tiny_csrc: Path) -> None:
    objects = [unit.object_name for unit in _build.SPEC.units(tiny_csrc)]
    levels = [isa.name for isa in _build.target_isas()]
    assert objects == ["schema.o", *(f"hot.simd.{level}.o" for level in levels)]


def test_cuda_sources_are_a_part_of_their_own(tiny_csrc: Path) -> None:
    (tiny_csrc / "foo.cu").write_text("int foo() { return 3; }\n")
    (tiny_csrc / "foo_cuda_op.cpp").write_text("int foo_op() { return 4; }\n")
    extra = {"foo.cu", "foo_cuda_op.cpp"}
    assert not extra & {unit.source for unit in _build.SPEC.units(tiny_csrc)}
    assert extra < {unit.source for unit in _build.SPEC.units(tiny_csrc, cuda=True)}
    key = _build.binary_key(tiny_csrc, "2.13.0")
    assert _build.binary_key(tiny_csrc, "2.13.0", cuda=True) != key


def test_nvcc_is_asked_for_where_torch_or_the_user_wants_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    found = {}
    for torch_cuda in (None, "13.0"):
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        for mode in ("auto", "cpu", "cuda"):
            monkeypatch.setenv("HYBRID_KERNELS_BUILD", mode)
            found[torch_cuda, mode] = _build.find_nvcc() == str(nvcc)
    wanted = {(None, "cuda"), ("13.0", "auto"), ("13.0", "cuda")}
    assert {case for case, is_found in found.items() if is_found} == wanted
    nvcc.unlink()
    with pytest.raises(_build.BuildError, match="needs nvcc: there is none in"):
        _build.find_nvcc()


def test_nvcc_is_taken_from_cuda_home_then_pip_then_the_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def install(folder: Path, name: str = "nvcc") -> str:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
        return str(folder / name)

    site, home = tmp_path / "site", tmp_path / "home"
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PATH", str(tmp_path / "system"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    on_path = install(tmp_path / "system")
    of_pip = install(site / "nvidia" / "cu13" / "bin")
    assert _build.installed_nvcc() == on_path  # pip's has no cicc: a part of something else
    install(site / "nvidia" / "cu13" / "nvvm" / "bin", "cicc")
    assert _build.installed_nvcc() == of_pip
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert _build.installed_nvcc() is None
    of_home = install(home / "bin")
    assert _build.installed_nvcc() == of_home


def test_the_gpus_compiled_for_can_be_chosen(
    monkeypatch: pytest.MonkeyPatch, tiny_csrc: Path
) -> None:
    monkeypatch.delenv("HYBRID_KERNELS_CUDA_ARCHITECTURES", raising=False)
    assert _build.cuda_architectures() == _build.CUDA_ARCHITECTURES
    keys = [_build.binary_key(tiny_csrc, "2.13.0", cuda) for cuda in (False, True)]
    monkeypatch.setenv("HYBRID_KERNELS_CUDA_ARCHITECTURES", "80, 90")
    assert _build.cuda_architectures() == ("80", "90")
    assert _build.binary_key(tiny_csrc, "2.13.0") == keys[0]
    assert _build.binary_key(tiny_csrc, "2.13.0", cuda=True) != keys[1]
    monkeypatch.setenv("HYBRID_KERNELS_CUDA_ARCHITECTURES", "75")
    with pytest.raises(ValueError, match="written for 80, .*, not for 75"):
        _build.cuda_architectures()


def test_other_processors_get_the_generic_copy_only() -> None:
    assert [isa.name for isa in _build.target_isas("aarch64")] == ["generic"]
    assert [isa.name for isa in _build.target_isas("x86_64")] == ["generic", "avx2", "avx512"]


def test_cmake_lists_need_no_installed_package() -> None:
    command = [sys.executable, "-S", str(BUILD_SCRIPT), "--cmake"]
    lists = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "csrc/norm/norm.simd.cpp" in re.search(r"set\(HYBRID_SIMD_SOURCES (.*)\)", lists)[1]
    plain = re.search(r"set\(HYBRID_PLAIN_SOURCES (.*)\)", lists)[1].split()
    assert "csrc/norm/norm.cpp" in plain
    assert "csrc/norm/norm_op.cpp" not in plain  # uses torch


def test_contraction_is_off_and_nothing_is_native() -> None:
    assert "-ffp-contract=off" in _build.FLAGS
    flags = [*_build.FLAGS, *(flag for isa in _build.target_isas() for flag in isa.flags)]
    assert [flag for flag in flags if "march=native" in flag or "fast-math" in flag] == []


# The key


def test_key_follows_sources_and_torch_but_not_tests(tiny_csrc: Path) -> None:
    key = _build.binary_key(tiny_csrc, "2.13.0")
    (tiny_csrc / "tests" / "a_test.cpp").write_text("changed\n")
    assert _build.binary_key(tiny_csrc, "2.13.0") == key
    assert _build.binary_key(tiny_csrc, "2.14.0") != key
    (tiny_csrc / "new.h").write_text("\n")
    assert _build.binary_key(tiny_csrc, "2.13.0") != key


def test_installed_library_is_used_only_while_it_fits(tmp_path: Path) -> None:
    library = tmp_path / "_C.so"
    library.touch()
    assert _loader.ahead_of_time_library(tmp_path, "abc") is None
    (tmp_path / "_C.key").write_text("abc\n")
    assert _loader.ahead_of_time_library(tmp_path, "abc") == library
    assert _loader.ahead_of_time_library(tmp_path, "after-an-edit") is None


# The build


def test_build_is_published_once(tiny_csrc: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.setenv("HYBRID_KERNELS_CACHE", str(tmp_path / "cache"))
    key = _build.binary_key(tiny_csrc, torch.__version__)
    library = _jit.cached_library(tiny_csrc, key)
    assert library.is_file()
    assert "building native kernels (once, about" in capfd.readouterr().err
    assert _jit.cached_library(tiny_csrc, key) == library
    assert capfd.readouterr().err == ""
    assert [path.name for path in library.parent.iterdir()] == ["_C.so"]  # no partial file left


def test_an_edit_rebuilds_its_own_object_only(tiny_csrc: Path, tmp_path: Path) -> None:
    tools = _build.Toolchain.detect()
    built: list[int] = []
    _build.compile_library(
        tiny_csrc, tmp_path / "b", tools, lambda done, total: built.append(total)
    )
    assert built[-1] == len(_build.SPEC.units(tiny_csrc)) + 1
    source = tiny_csrc / "schema.cpp"
    source.write_text("int schema() { return 3; }\n")
    later = source.stat().st_mtime + 10
    os.utime(source, (later, later))
    built.clear()
    _build.compile_library(
        tiny_csrc, tmp_path / "b", tools, lambda done, total: built.append(total)
    )
    assert built[-1] == 2  # that object and the link


def test_compile_error_shows_the_compilers_line(tiny_csrc: Path, tmp_path: Path) -> None:
    (tiny_csrc / "broken.cpp").write_text("int f() {\n  return nonsense;\n}\n")
    with pytest.raises(_build.BuildError, match=r"broken\.cpp:2:\d+: error: .*nonsense"):
        _build.compile_library(tiny_csrc, tmp_path, _build.Toolchain.detect(), lambda *_: None)


def test_missing_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        _build.BuildError, match=r"no C\+\+ compiler \(no-such-compiler\); install g\+\+"
    ):
        _build.Toolchain.detect()


@pytest.mark.multi_process
def test_second_process_waits_and_says_so(tiny_csrc: Path, tmp_path: Path, monkeypatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("HYBRID_KERNELS_CACHE", str(cache))
    home = cache / _jit.configuration(tiny_csrc, _build.Toolchain.detect())
    home.mkdir(parents=True)
    code = (
        "import sys, torch; from pathlib import Path; from hybrid_kernels import _build, _jit\n"
        "csrc = Path(sys.argv[1])\n"
        "print(_jit.cached_library(csrc, _build.binary_key(csrc, torch.__version__)))"
    )
    with _jit.locked(home / "lock"):
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(tiny_csrc)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        said = child.stderr.readline()
        assert "another process is building the native kernels; waiting" in said
        assert child.poll() is None
    output, _ = child.communicate(timeout=120)
    assert Path(output.strip()).is_file()


# Doing without


def test_unknown_build_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRID_KERNELS_BUILD", "gpu")
    with pytest.raises(ValueError, match="HYBRID_KERNELS_BUILD=gpu: expected one of auto, cpu"):
        _loader.build_mode()


WITHOUT_LIBRARY = """
import torch, warnings
from hybrid_kernels import _loader, ops
_loader.ahead_of_time_library = lambda package, key: None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    x = torch.randn(3, 5)
    for _ in range(2):
        y = ops.rms_norm(x, torch.ones(5), 1e-6)
torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (5,), eps=1e-6))
print(*(str(w.message) for w in caught), sep="\\n")
"""


def test_without_a_library_the_reference_runs_with_one_warning() -> None:
    result = _python(WITHOUT_LIBRARY, HYBRID_KERNELS_BUILD="none")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.strip().splitlines()
    assert len(lines) == 1
    assert "using the slower PyTorch reference" in lines[0]
    assert "HYBRID_KERNELS_BUILD=none" in lines[0]


def test_without_a_library_require_native_is_an_error() -> None:
    result = _python(
        WITHOUT_LIBRARY, HYBRID_KERNELS_BUILD="none", HYBRID_KERNELS_REQUIRE_NATIVE="1"
    )
    assert result.returncode != 0
    assert "RuntimeError: hybrid_kernels: no native kernels" in result.stderr


# What was built


def test_a_lower_instruction_set_can_be_forced() -> None:
    code = "from hybrid_kernels import native_module; print(native_module().isa())"
    assert _python(code, HYBRID_KERNELS_ISA="generic").stdout.strip() == "generic"
    assert "expected generic, avx2, avx512 or amx" in _python(code, HYBRID_KERNELS_ISA="sse").stderr


@pytest.mark.slow
@pytest.mark.parametrize("level", ["generic", "avx2"])
def test_operators_are_accurate_on_a_lower_instruction_set(level: str) -> None:
    """The walk over all operators again, as an older processor would run it."""
    if level not in [isa.name for isa in _build.target_isas()]:
        pytest.skip(f"{level} is not compiled for this processor family")
    walk = Path(__file__).with_name("test_all_ops.py")
    command = [sys.executable, "-m", "pytest", "-q", str(walk), "-k", "reference"]
    environment = {**os.environ, "HYBRID_KERNELS_ISA": level}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout[-2000:]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime_and_torch_sets_its_threads(threads) -> None:
    library = native_module().__file__
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    runtimes = [name for name in mapped if re.search(r"lib(g|i|)omp[\w.-]*\.so", name)]
    assert len(runtimes) == 1, runtimes
    threads(3)
    assert ctypes.CDLL(library).omp_get_max_threads() == 3


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_vector_objects_share_no_inline_function() -> None:
    """An inline function outside the ISA namespace could be AVX-512 code on an old processor."""
    csrc, tools = _build.find_csrc(), _build.Toolchain.detect()
    native_module()
    objects = _jit.cache_root() / _jit.configuration(csrc, tools) / "objects"
    levels = (_build.AVX512, _build.AMX)
    units = [unit for unit in _build.SPEC.units(csrc) if unit.isa in levels]
    if not all((objects / unit.object_name).is_file() for unit in units):
        pytest.skip("the library was built ahead of time: no object files to look at")
    for unit in units:
        command = ["nm", "-C", "--defined-only", str(objects / unit.object_name)]
        symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        shared = re.findall(r"^\w+ [WVu] (.*)$", symbols, re.MULTILINE)
        # c++filt leaves the names of some lambdas mangled: a length before each part.
        own = (f"hybrid::{unit.isa.name}::", f"{len(unit.isa.name)}{unit.isa.name}")
        strays = [name for name in shared if not any(part in name for part in own)]
        assert [name for name in strays if not name.startswith("DW.ref.")] == [], unit.source
