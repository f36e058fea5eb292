"""Which instructions the machine code of each CUDA kernel must have, and whether it does.

It is read by a ``cuobjdump``: beside nvcc, on the path, or the one that triton's package carries.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

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
    "rope_append_kernel": (LOADS, STORES),
    "skinny_linear_kernel<f16": (LOADS, F16_PRODUCTS),
    "skinny_linear_kernel<bf16": (LOADS, BF16_PRODUCTS),
    "skinny_linear_kernel<float": (LOADS,),
    "skinny_head_kernel<f16": (LOADS, F16_PRODUCTS),
    "skinny_head_kernel<bf16": (LOADS, BF16_PRODUCTS),
    "skinny_head_kernel<float": (LOADS,),
    "draw_head_kernel": (),
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
