"""Compiles every CUDA source for every GPU that the library names, and holds the result to a table.

For each kernel and architecture ``ptxas`` says how many registers and bytes of shared memory it
takes and whether it spills; the machine code says which memory instructions it has. Three checks:

* no kernel spills a register or keeps an array in local memory;
* every kernel that ``EXPECTED_CODE`` names has the instructions meant for it (checked where a
  ``cuobjdump`` is found: beside nvcc, on the PATH, or in an installed triton);
* registers, shared memory and theoretical occupancy equal ``kernel_resources.csv``, so that a
  change of them is made on purpose: ``--update`` writes the table.

Objects are cached by the content of everything they include. The last line is the figure.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
CSRC = ROOT / "csrc"
TABLE = Path(__file__).with_name("kernel_resources.csv")
COLUMNS = ("kernel", "sm", "registers", "shared", "threads", "occupancy")

# What a multiprocessor has (CUDA programming guide, table of compute capabilities).
MAX_THREADS = {"80": 2048, "86": 1536, "89": 1536, "90": 2048, "100": 2048}
MAX_BLOCKS = {"80": 32, "86": 16, "89": 24, "90": 32, "100": 32}
SHARED_KIB = {"80": 164, "86": 100, "89": 100, "90": 228, "100": 228}
REGISTERS = 65536

# Kernels whose name contains the key have an instruction that matches: 16-byte loads and stores,
# matrix instructions of the 16-bit types (the mangled name of a format is its length and itself).
EXPECTED_CODE = {
    "norm_kernel": (r"LDG\.E[.\w]*\.128", r"STG\.E[.\w]*\.128"),
    "norm_backward_kernel": (r"LDG\.E[.\w]*\.128", r"STG\.E[.\w]*\.128"),
    "activation": (r"LDG\.E[.\w]*\.128", r"STG\.E[.\w]*\.128"),
    "lora_merge": (r"LDG\.E[.\w]*\.128", r"STG\.E[.\w]*\.128"),
    "lora_unmerge": (r"LDG\.E[.\w]*\.128", r"STG\.E[.\w]*\.128"),
    "22paged_attention_kernelINS_3f16E": (r"LDG\.E[.\w]*\.128", r"HMMA\.16816\.F32"),
    "22paged_attention_kernelINS_4bf16E": (r"LDG\.E[.\w]*\.128", r"HMMA\.16816\.F32\.BF16"),
    "22flash_attention_kernelINS_3f16E": (r"LDGSTS\.E[.\w]*\.128", r"LDSM", r"HMMA\.16816\.F32"),
    "22flash_attention_kernelINS_4bf16E": (r"LDGSTS\.E[.\w]*\.128", r"HMMA\.16816\.F32\.BF16"),
    "23attention_grad_q_kernelINS_4bf16E": (r"LDGSTS\.E[.\w]*\.128", r"HMMA\.16816\.F32\.BF16"),
    "24attention_grad_kv_kernelINS_4bf16E": (r"LDGSTS\.E[.\w]*\.128", r"HMMA\.16816\.F32\.BF16"),
    "unshard_kernel": (r"LDG\.E[.\w]*\.128", r"STG\.E[.\w]*\.128"),
    "20skinny_linear_kernelINS_3f16E": (r"LDG\.E[.\w]*\.128", r"HMMA\.16816\.F32"),
    "20skinny_linear_kernelINS_4bf16E": (r"LDG\.E[.\w]*\.128", r"HMMA\.16816\.F32\.BF16"),
    "rope_kernel": (r"LDG\.E[.\w]*\.128", r"STG\.E[.\w]*\.128"),
    "rope_append_kernel": (r"LDG\.E[.\w]*\.128", r"STG\.E[.\w]*\.128"),
    "kv_append_kernel": (r"LDG\.E[.\w]*\.128", r"STG\.E[.\w]*\.128"),
    "token_logprobs": (r"LDG\.E[.\w]*\.128",),
    "sample_kernel": (r"LDG\.E[.\w]*\.128",),
}


def load_build_module():
    """python/hybrid_kernels/_build.py by path: the package itself imports torch."""
    path = ROOT / "python" / "hybrid_kernels" / "_build.py"
    spec = importlib.util.spec_from_file_location("hybrid_kernels_build", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def included_files(source: Path, seen: set[Path] | None = None) -> set[Path]:
    """The source and every file of csrc that it includes, however deep."""
    seen = set() if seen is None else seen
    if source not in seen:
        seen.add(source)
        for name in re.findall(r'^#include "([^"]+)"', source.read_text(), re.MULTILINE):
            if (CSRC / name).is_file():
                included_files(CSRC / name, seen)
    return seen


def content_key(source: Path, command: list[str]) -> str:
    digest = hashlib.sha256(" ".join(command).encode())
    for path in sorted(included_files(source)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def demangled(names: list[str]) -> list[str]:
    """Kernel names as ``norm_kernel<bf16, false>``."""
    asked = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    short = []
    for name in asked.stdout.splitlines():
        name = name.replace("hybrid::cuda::", "").replace("hybrid::", "").removeprefix("void ")
        depth, end = 0, len(name)
        for i, character in enumerate(name):  # the arguments begin at the first bare parenthesis
            depth += (character == "<") - (character == ">")
            if character == "(" and depth == 0:
                end = i
                break
        short.append(name[:end])
    return short


def parse_ptxas(log: str) -> list[dict[str, str | int]]:
    """One record a kernel from ``-Xptxas -v``."""
    records = []
    pattern = re.compile(
        r"Compiling entry function '(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers([^\n]*)",
        re.DOTALL,
    )
    for match in pattern.finditer(log):
        shared = re.search(r"(\d+) bytes smem", match[6])
        records.append(
            {
                "mangled": match[1],
                "stack": int(match[2]),
                "spills": int(match[3]) + int(match[4]),
                "registers": int(match[5]),
                "shared": int(shared[1]) if shared else 0,
            }
        )
    return records


def find_cuobjdump(nvcc: str) -> str | None:
    beside = Path(nvcc).resolve().with_name("cuobjdump")
    if beside.is_file():
        return str(beside)
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        carried = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if carried.is_file():
            return str(carried)
    return None


def launch_bounds(ptx: str) -> dict[str, int]:
    """Threads of a full block, of each kernel: its launch bound."""
    found = re.findall(r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)", ptx)
    return {name: int(threads) for name, threads in found}


def occupancy(sm: str, threads: int, registers: int, shared: int) -> float:
    """Resident threads over the most that a multiprocessor holds, for full blocks.

    Registers are given to a warp in units of 256; a block takes 1 KiB of shared memory beside its
    own.
    """
    warps = -(-threads // 32)
    a_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // a_warp // warps
    by_shared = SHARED_KIB[sm] * 1024 // (shared + 1024)
    blocks = min(MAX_BLOCKS[sm], MAX_THREADS[sm] // threads, by_registers, by_shared)
    return blocks * threads / MAX_THREADS[sm]


def compile_source(
    source: Path, sm: str, nvcc: str, flags: list[str], build: Path
) -> tuple[list, Path]:
    """Records of a source's kernels on one architecture, and its machine code; from the cache where
    nothing changed."""
    command = [nvcc, *flags, "-arch", f"sm_{sm}", "-cubin", "-Xptxas", "-v", f"-I{CSRC}"]
    stem = build / f"{source.stem}.sm_{sm}.{content_key(source, command)}"
    report, cubin = Path(f"{stem}.json"), Path(f"{stem}.cubin")
    if report.is_file() and cubin.is_file():
        return json.loads(report.read_text()), cubin
    with tempfile.TemporaryDirectory() as kept:
        run = subprocess.run(
            [*command, "--keep", "--keep-dir", kept, str(source), "-o", str(cubin)],
            capture_output=True,
            text=True,
        )
        if run.returncode != 0:
            sys.exit(f"nvcc failed on {source} for sm_{sm}:\n{run.stderr}")
        threads = launch_bounds("".join(path.read_text() for path in Path(kept).glob("*.ptx")))
    records = parse_ptxas(run.stderr + run.stdout)
    names = demangled([record["mangled"] for record in records])
    for record, name in zip(records, names, strict=True):
        record["kernel"] = name
        record["threads"] = threads[record["mangled"]]
    report.write_text(json.dumps(records))
    return records, cubin


def missing_instructions(cubin: Path, cuobjdump: str) -> list[str]:
    """Kernels that lack an instruction which ``EXPECTED_CODE`` wants."""
    dump = subprocess.run(
        [cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, check=True
    )
    missing = []
    for part in re.split(r"Function : ", dump.stdout)[1:]:
        mangled, code = part.split("\n", 1)
        for key, patterns in EXPECTED_CODE.items():
            if key in mangled:
                missing += [
                    f"{mangled}: no {wanted}" for wanted in patterns if not re.search(wanted, code)
                ]
    return missing


def table_rows(records: list[dict], sm: str) -> list[tuple[str, ...]]:
    rows = []
    for r in records:
        share = occupancy(sm, r["threads"], r["registers"], r["shared"])
        values = (r["kernel"], sm, r["registers"], r["shared"], r["threads"], f"{share:.2f}")
        rows.append(tuple(map(str, values)))
    return rows


def read_table() -> list[tuple[str, ...]]:
    if not TABLE.is_file():
        return []
    with TABLE.open(newline="") as file:
        return [tuple(row) for row in csv.reader(file)][1:]


def write_table(rows: list[tuple[str, ...]]) -> None:
    with TABLE.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, required=True, help="folder for what is compiled")
    parser.add_argument("--nvcc", default="nvcc")
    parser.add_argument(
        "--update", action="store_true", help="write the table instead of comparing"
    )
    options = parser.parse_args()
    options.build.mkdir(parents=True, exist_ok=True)
    build_module = load_build_module()
    cuobjdump = find_cuobjdump(options.nvcc)

    rows, faults = [], []
    spilling = 0
    for sm in build_module.CUDA_ARCHITECTURES:
        for source in build_module.SPEC.cuda_sources(CSRC):
            flags = list(build_module.NVCC_FLAGS)
            records, cubin = compile_source(CSRC / source, sm, options.nvcc, flags, options.build)
            rows += table_rows(records, sm)
            for r in records:
                if r["spills"] or r["stack"]:
                    spilling += 1
                    faults.append(
                        f"{r['kernel']} sm_{sm}: {r['spills']} bytes spilt, {r['stack']} of stack"
                    )
            if cuobjdump:
                faults += missing_instructions(cubin, cuobjdump)
    rows.sort(key=lambda row: (row[0], int(row[1])))
    if options.update:
        write_table(rows)
    known = set(read_table())
    faults += [f"not in {TABLE.name}: {', '.join(row)}" for row in rows if row not in known]
    faults += [f"only in {TABLE.name}: {', '.join(row)}" for row in sorted(known - set(rows))]
    print("\n".join(faults))
    code = "machine code checked" if cuobjdump else "machine code not checked: no cuobjdump"
    kernels = len({row[0] for row in rows})
    targets = len(build_module.CUDA_ARCHITECTURES)
    print(
        f"nvcc: {kernels} kernels for {targets} architectures, {spilling} spill, {code}, "
        f"{len(faults)} faults"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
