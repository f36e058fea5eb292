"""Compiles every Triton kernel for every GPU that the package names, without one.

For each instance ``cuobjdump`` (of the Triton wheel) reads from the machine code how many registers
and bytes of shared and local memory it takes. A spill, or an array in local memory, is an error; so
is a 16-bit product without tensor-core instructions. The last line is the figure.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hybrid_kernels.triton_kernels import linear

TARGETS = (80, 90, 100)
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TENSOR_CORES = r"\b(HMMA|HGMMA|UTCHMMA|UTCMMA|UTCQMMA)\b"


@dataclass(frozen=True)
class Instance:
    """A kernel with the types and constants that a launcher gives it."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    multiplies_halves: bool
    warps: int
    stages: int


def instances() -> list[Instance]:
    """What the launchers can ask for."""
    found = []
    for dtype in TYPES:
        for bias, lora, wide in ((False, False, True), (True, False, False), (True, True, False)):
            found.append(_linear(dtype, bias, lora, wide))
    return found


def _linear(dtype: str, bias: bool, lora: bool, wide: bool) -> Instance:
    pointers = dict.fromkeys(("x", "weight", "bias", "lora_b"), f"*{dtype}")
    pointers |= {"inner": f"*{dtype}", "y": "*fp32" if wide else f"*{dtype}"}
    sizes = ("M", "N", "K", "x_stride", "weight_stride", "inner_stride", "y_stride", "rank")
    constants = {"HAS_BIAS": bias, "HAS_LORA": lora, "CHAINS": dtype == "fp32", "PROGRAMS": 132}
    name = f"linear<{dtype}{', bias' * bias}{', low rank' * lora}{', fp32 out' * wide}>"
    return Instance(
        name,
        linear.linear_kernel,
        {**pointers, **dict.fromkeys(sizes, "i32"), "scale": "fp32"},
        {**constants, **linear.tile_for(TYPES[dtype]), "RANKS": linear.RANKS},
        dtype != "fp32",
        linear.WARPS,
        linear.STAGES,
    )


@dataclass(frozen=True)
class Resources:
    registers: int
    shared: int  # bytes
    local: int  # bytes: spills and arrays
    tensor_cores: bool


def compile_for(instance: Instance, capability: int) -> Resources:
    """The machine code's own account. Pointers and widths are multiples of 16, as torch's are."""
    names = instance.kernel.arg_names
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in instance.types.items()
        if kind.startswith("*") or name == "K" or name.endswith("_stride")
    }
    signature = {**instance.types, **dict.fromkeys(instance.constants, "constexpr")}
    source = ASTSource(
        fn=instance.kernel,
        signature={name: signature[name] for name in names},
        constexprs=instance.constants,
        attrs=aligned,
    )
    options = {
        "num_warps": instance.warps,
        "num_stages": instance.stages,
        "enable_fp_fusion": True,
    }
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return _read(compiled.asm["cubin"], compiled.metadata.shared)


def _read(cubin: bytes, dynamic_shared: int) -> Resources:
    binary = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(option: str) -> str:
            command = [str(binary), option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, code = dump("-res-usage"), dump("-sass")
    counts = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if counts is None:
        raise RuntimeError(f"cuobjdump -res-usage says nothing of registers:\n{usage}")
    registers, stack, shared, local = map(int, counts.groups())
    memory = re.findall(r"\b(?:LDL|STL)\b", code)
    return Resources(
        registers,
        shared + dynamic_shared,
        stack + local + len(memory),
        re.search(TENSOR_CORES, code) is not None,
    )


def main() -> int:
    problems, most = [], 0
    all_instances = instances()
    print(f"{'kernel':44} {'sm':>4} {'registers':>9} {'shared':>7} {'local':>6}")
    for instance in all_instances:
        for capability in TARGETS:
            used = compile_for(instance, capability)
            most = max(most, used.registers)
            row = f"{instance.name:44} {capability:>4} {used.registers:>9}"
            print(f"{row} {used.shared:>7} {used.local:>6}", flush=True)
            if used.local:
                problems.append(f"{instance.name} on sm_{capability} spills")
            if instance.multiplies_halves and not used.tensor_cores:
                problems.append(f"{instance.name} on sm_{capability} uses no tensor cores")
    for problem in problems:
        print(problem, file=sys.stderr)
    compiled = len(all_instances) * len(TARGETS)
    print(
        f"triton: {compiled} kernels compiled, {len(problems)} problems, {most} registers at most"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
