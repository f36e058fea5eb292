"""Compiles every CUDA source for every GPU that the library names, and holds the result to a table.

For each kernel and architecture ``ptxas`` says how many registers and bytes of shared memory it
takes and whether it spills; the machine code says which instructions it has. Three checks:

* no kernel spills a register or keeps an array in local memory;
* every kernel has the instructions that ``machine_code.py`` names for it, on every architecture;
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
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import machine_code

ROOT = Path(__file__).resolve().parents[3]
CSRC = ROOT / "csrc"
TABLE = Path(__file__).with_name("kernel_resources.csv")
COLUMNS = ("kernel", "sm", "registers", "shared", "threads", "occupancy")

# What a multiprocessor has (CUDA programming guide, table of compute capabilities).
MAX_THREADS = {"80": 2048, "86": 1536, "89": 1536, "90": 2048, "100": 2048}
MAX_BLOCKS = {"80": 32, "86": 16, "89": 24, "90": 32, "100": 32}
SHARED_KIB = {"80": 164, "86": 100, "89": 100, "90": 228, "100": 228}
REGISTERS = 65536


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


build = load_build_module()


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


def compile_source(source: Path, sm: str, nvcc: str, folder: Path) -> tuple[list, Path]:
    """Records of a source's kernels on one architecture, and its machine code; from the cache where
    nothing changed."""
    command = [nvcc, *build.NVCC_FLAGS, "-arch", f"sm_{sm}", "-cubin", "-Xptxas", "-v", f"-I{CSRC}"]
    stem = folder / f"{source.stem}.sm_{sm}.{content_key(source, command)}"
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


def check(source: Path, sm: str, nvcc: str, cuobjdump: str, folder: Path) -> Checked:
    records, cubin = compile_source(source, sm, nvcc, folder)
    spilling = [r for r in records if r["spills"] or r["stack"]]
    faults = [
        f"{r['kernel']} sm_{sm}: {r['spills']} bytes spilt, {r['stack']} of stack" for r in spilling
    ]
    missing = machine_code.missing_instructions(records, sm, cubin, cuobjdump)
    meant = sum(len(machine_code.meant_for(r["kernel"]) or ()) for r in records)
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


def find_tools(nvcc: str | None) -> tuple[str, str]:
    """nvcc and cuobjdump, or an exit that says how to get them."""
    nvcc = nvcc or build.installed_nvcc()
    if nvcc is None:
        sys.exit(f"nvcc: {build.NO_NVCC}; pip install -c constraints.txt '.[proof]'")
    cuobjdump = machine_code.find_cuobjdump(nvcc)
    if cuobjdump is None:
        sys.exit("nvcc: no cuobjdump to read the machine code with; pip install triton")
    return nvcc, cuobjdump


def check_all(nvcc: str, cuobjdump: str, folder: Path, jobs: int) -> list[Checked]:
    sources = [CSRC / source for source in build.SPEC.cuda_sources(CSRC)]
    with ThreadPoolExecutor(jobs) as pool:
        running = [
            pool.submit(check, source, sm, nvcc, cuobjdump, folder)
            for source in sources
            for sm in build.CUDA_ARCHITECTURES
        ]
        return [job.result() for job in running]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, required=True, help="folder for what is compiled")
    parser.add_argument("--nvcc", help="by default $CUDA_HOME's, pip's or the path's")
    parser.add_argument("--jobs", type=int, default=build.usable_cores(), help="compilers at once")
    parser.add_argument(
        "--update", action="store_true", help="write the table instead of comparing"
    )
    options = parser.parse_args()
    options.build.mkdir(parents=True, exist_ok=True)
    nvcc, cuobjdump = find_tools(options.nvcc)
    parts = check_all(nvcc, cuobjdump, options.build, options.jobs)
    rows = [row for part in parts for row in part.rows]
    rows.sort(key=lambda row: (row[0], int(row[1])))
    if options.update:
        write_table(rows)
    known = set(read_table())
    faults = [fault for part in parts for fault in part.faults]
    faults += [f"not in {TABLE.name}: {', '.join(row)}" for row in rows if row not in known]
    faults += [f"only in {TABLE.name}: {', '.join(row)}" for row in sorted(known - set(rows))]
    for fault in faults:
        print(fault)
    print(
        f"nvcc {version_of(nvcc)}: {len({row[0] for row in rows})} kernels for "
        f"{len(build.CUDA_ARCHITECTURES)} architectures, "
        f"{sum(part.spilling for part in parts)} spill, "
        f"{sum(part.instructions for part in parts)} instructions found as meant, "
        f"{len(faults)} faults"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
