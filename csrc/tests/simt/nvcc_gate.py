"""Compiles every CUDA source for every GPU that the library names, and holds the result to a table.

For each kernel and architecture ``ptxas`` says how many registers and bytes of shared memory it
takes and whether it spills; the machine code says which instructions it has. Three checks:

* no kernel spills a register or keeps an array in local memory;
* every kernel has the instructions that ``MEANT`` names for it, on every architecture (read by a
  ``cuobjdump``: beside nvcc, on the path, or the one that triton's package carries);
* registers, shared memory and theoretical occupancy equal ``kernel_resources.csv``, so that a
  change of them is made on purpose: ``--update`` writes the table.

The table is that of one release of nvcc, which ``constraints.txt`` pins. Objects are cached by the
content of everything they include. The last line is the figure.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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

LOADS, STORES = r"\bLDG\.E[.\w]*\.128\b", r"\bSTG\.E[.\w]*\.128\b"  # 16 bytes at a time
COPIES = r"\bLDGSTS\.E[.\w]*\.128\b"  # cp.async
MATRICES = r"\bLDSM\b"  # ldmatrix
F16_PRODUCTS, BF16_PRODUCTS = r"\bHMMA\.16816\.F32 ", r"\bHMMA\.16816\.F32\.BF16 "  # mma.sync

# What the machine code of a kernel must have, by the beginning of its name. Every kernel is here:
# none of these instructions is meant where a thread reads single numbers.
MEANT: dict[str, tuple[str, ...]] = {
    "norm_kernel": (LOADS, STORES),
    "norm_backward_kernel": (LOADS, STORES),
    "bias_activation_kernel": (LOADS, STORES),
    "bias_activation_backward_kernel": (LOADS, STORES),
    "gated_activation_kernel": (LOADS, STORES),
    "gated_activation_backward_kernel": (LOADS, STORES),
    "lora_merge_kernel": (LOADS, STORES),
    "lora_merge_in_place_kernel": (LOADS, STORES),
    "lora_unmerge_kernel": (LOADS, STORES),
    "lora_count_kernel": (LOADS,),
    "lora_offsets_kernel": (),
    "lora_restore_kernel": (),
    "paged_attention_kernel<f16": (LOADS, F16_PRODUCTS),
    "paged_attention_kernel<bf16": (LOADS, BF16_PRODUCTS),
    "paged_attention_kernel<float": (LOADS,),
    "join_attention_kernel": (),
    "flash_attention_kernel<f16": (COPIES, MATRICES, F16_PRODUCTS, STORES),
    "flash_attention_kernel<bf16": (COPIES, MATRICES, BF16_PRODUCTS, STORES),
    "flash_attention_kernel<float": (LOADS,),
    "attention_delta_kernel": (LOADS,),
    "attention_grad_q_kernel<f16": (COPIES, MATRICES, F16_PRODUCTS),
    "attention_grad_q_kernel<bf16": (COPIES, MATRICES, BF16_PRODUCTS),
    "attention_grad_q_kernel<float": (LOADS,),
    "attention_grad_kv_kernel<f16": (COPIES, MATRICES, F16_PRODUCTS),
    "attention_grad_kv_kernel<bf16": (COPIES, MATRICES, BF16_PRODUCTS),
    "attention_grad_kv_kernel<float": (LOADS,),
    "rope_kernel": (LOADS, STORES),
    "kv_append_kernel": (LOADS, STORES),
    "skinny_linear_kernel<f16": (LOADS, F16_PRODUCTS),
    "skinny_linear_kernel<bf16": (LOADS, BF16_PRODUCTS),
    "skinny_linear_kernel<float": (LOADS,),
    "token_logprobs_kernel": (LOADS,),
    "token_logprobs_backward_kernel": (LOADS, STORES),
    "sample_kernel": (LOADS,),
    "unshard_kernel": (LOADS, STORES),
    "column_sum_kernel": (),
    "sum_chunks_kernel": (),
    "join_chunks_kernel": (),
    "gae_kernel": (),
    "masked_whiten_kernel": (),
}


@dataclass
class Checked:
    """What one source for one architecture has come to."""

    rows: list[tuple[str, ...]]  # of the table
    faults: list[str]
    spilling: int  # kernels
    instructions: int  # found as meant


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


def version_of(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V([\d.]+)", text)
    return found[1] if found else "of an unknown release"


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


def meant_for(kernel: str) -> tuple[str, ...] | None:
    for beginning, patterns in MEANT.items():
        if re.match(re.escape(beginning) + r"(?!\w)", kernel):
            return patterns
    return None


def missing_instructions(records: list[dict], sm: str, cubin: Path, cuobjdump: str) -> list[str]:
    """Kernels that lack an instruction which ``MEANT`` names, or are not named there."""
    command = [cuobjdump, "-sass", str(cubin)]
    dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code = dict(part.split("\n", 1) for part in re.split(r"Function : ", dump)[1:])
    missing = []
    for record in records:
        kernel, patterns = record["kernel"], meant_for(record["kernel"])
        if patterns is None:
            missing.append(f"{kernel}: say in MEANT which instructions it must have")
        missing += [
            f"{kernel} sm_{sm}: its machine code has no {wanted}"
            for wanted in patterns or ()
            if not re.search(wanted, code[record["mangled"]])
        ]
    return missing


def check(
    source: Path, sm: str, nvcc: str, cuobjdump: str, build: Path, flags: list[str]
) -> Checked:
    records, cubin = compile_source(source, sm, nvcc, flags, build)
    spilling = [r for r in records if r["spills"] or r["stack"]]
    faults = [
        f"{r['kernel']} sm_{sm}: {r['spills']} bytes spilt, {r['stack']} of stack" for r in spilling
    ]
    missing = missing_instructions(records, sm, cubin, cuobjdump)
    meant = sum(len(meant_for(r["kernel"]) or ()) for r in records)
    return Checked(
        table_rows(records, sm), faults + missing, len(spilling), max(meant - len(missing), 0)
    )


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
    parser.add_argument("--nvcc", help="by default $CUDA_HOME's, pip's or the path's")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at once")
    parser.add_argument(
        "--update", action="store_true", help="write the table instead of comparing"
    )
    options = parser.parse_args()
    options.build.mkdir(parents=True, exist_ok=True)
    build_module = load_build_module()
    nvcc = options.nvcc or build_module.installed_nvcc()
    if nvcc is None:
        sys.exit(f"nvcc: {build_module.NO_NVCC}; pip install -c constraints.txt '.[proof]'")
    cuobjdump = find_cuobjdump(nvcc)
    if cuobjdump is None:
        sys.exit("nvcc: no cuobjdump to read the machine code with; pip install triton")

    flags = list(build_module.NVCC_FLAGS)
    sources = [CSRC / source for source in build_module.SPEC.cuda_sources(CSRC)]
    targets = build_module.CUDA_ARCHITECTURES
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = [
            pool.submit(check, source, sm, nvcc, cuobjdump, options.build, flags)
            for source in sources
            for sm in targets
        ]
        parts = [job.result() for job in jobs]
    rows = sorted(
        (row for part in parts for row in part.rows), key=lambda row: (row[0], int(row[1]))
    )
    if options.update:
        write_table(rows)
    known = set(read_table())
    faults = [fault for part in parts for fault in part.faults]
    faults += [f"not in {TABLE.name}: {', '.join(row)}" for row in rows if row not in known]
    faults += [f"only in {TABLE.name}: {', '.join(row)}" for row in sorted(known - set(rows))]
    if faults:
        print("\n".join(faults))
    print(
        f"nvcc {version_of(nvcc)}: {len({row[0] for row in rows})} kernels for {len(targets)} "
        f"architectures, {sum(part.spilling for part in parts)} spill, "
        f"{sum(part.instructions for part in parts)} instructions found as meant, "
        f"{len(faults)} faults"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
