"""Arrows go one way: hybrid_engine -> hybrid_kernels -> csrc."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted((ROOT / "python" / "hybrid_kernels").rglob("*.py"))
ENGINE = sorted((ROOT / "hybrid_engine").rglob("*.py"))


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def _attributes(tree: ast.AST) -> Iterator[str]:
    return (ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute))


@pytest.mark.parametrize("path", KERNELS, ids=_name)
def test_kernels_do_not_know_the_engine(path: Path) -> None:
    imported = list(_imports(ast.parse(path.read_text())))
    assert [name for name in imported if name.split(".")[0] == "hybrid_engine"] == []


@pytest.mark.parametrize("path", ENGINE, ids=_name)
def test_engine_uses_public_kernels_only(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert [name for name in _attributes(tree) if name.startswith("torch.ops")] == []
    private = re.compile(r"hybrid_kernels(\.\w+)*\._")
    assert [name for name in _imports(tree) if private.match(name)] == []


def test_cpp_knows_neither_package() -> None:
    sources = [*(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "csrc").rglob("*.h")]
    assert sources
    code = {path: re.sub(r"//.*", "", path.read_text()) for path in sources}
    assert [_name(path) for path in sources if "hybrid_engine" in code[path]] == []


def test_importing_the_kernels_builds_nothing(tmp_path: Path) -> None:
    """``--help`` and the like must not wait for a compiler."""
    code = "import hybrid_kernels.ops, hybrid_kernels.nn"
    cache = tmp_path / "cache"
    environment = {**os.environ, "HYBRID_KERNELS_CACHE": str(cache)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert not cache.exists()
