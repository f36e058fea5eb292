"""docs/kernels.md against the table that the nvcc gate keeps: registers and shared memory."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# The kernels that each row's operators launch; those that only help are not what a row states.
KERNELS = {
    "rms_norm": ("norm_kernel",),
    "rms_norm_backward": ("norm_backward_kernel",),
    "layer_norm": ("norm_kernel",),
    "layer_norm_backward": ("norm_backward_kernel",),
    "bias_activation": ("bias_activation_kernel",),
    "bias_activation_backward": ("bias_activation_backward_kernel",),
    "gated_activation": ("gated_activation_kernel",),
    "gated_activation_backward": ("gated_activation_backward_kernel",),
    "lora_merge": ("lora_merge_kernel",),
    "lora_merge_": ("lora_count_kernel", "lora_merge_in_place_kernel", "lora_unmerge_kernel"),
    "linear": ("skinny_linear_kernel",),
    "linear_activation": ("skinny_linear_kernel",),
    "paged_attention": ("paged_attention_kernel",),
    "attention": ("flash_attention_kernel",),
    "attention_backward": ("attention_grad_q_kernel", "attention_grad_kv_kernel"),
    "rope": ("rope_kernel",),
    "kv_append": ("kv_append_kernel",),
    "rope_append": ("rope_append_kernel",),
    "token_logprobs": ("token_logprobs_kernel",),
    "token_logprobs_backward": ("token_logprobs_backward_kernel",),
    "sample": ("sample_kernel",),
    "linear_sample": ("skinny_head_kernel",),
    "unshard_": ("unshard_kernel",),
    "gae": ("gae_kernel",),
    "masked_moments": ("sum_chunks_kernel<Kept", "join_chunks_kernel<Kept", "masked_whiten_kernel"),
    "ppo_policy_loss": ("sum_chunks_kernel<PolicyTerm", "join_chunks_kernel<PolicyTerm"),
    "ppo_value_loss": ("sum_chunks_kernel<ValueTerm", "join_chunks_kernel<ValueTerm"),
}
HELPERS = {
    "attention_delta_kernel",
    "column_sum_kernel",
    "draw_head_kernel",
    "join_attention_kernel",
    "lora_offsets_kernel",
    "lora_restore_kernel",
}


def resources() -> list[tuple[str, int, int]]:
    """Kernel, registers and static shared memory on sm_90."""
    with (ROOT / "csrc/tests/simt/kernel_resources.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["sm"] == "90"]
    return [(row["kernel"], int(row["registers"]), int(row["shared"])) for row in rows]


def table() -> Iterator[tuple[str, str, str]]:
    """First operator, registers and shared memory of each row that states them."""
    section = (ROOT / "docs/kernels.md").read_text().split("\n## Operators\n")[1].split("\n## ")[0]
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) > 6 and cells[5].isdigit():
            yield re.findall(r"`(\w+)`", cells[0])[0], cells[5], cells[6]


ROWS = list(table())


@pytest.mark.parametrize("operator,registers,shared", ROWS, ids=[row[0] for row in ROWS])
def test_a_row_states_the_largest_instance(operator: str, registers: str, shared: str) -> None:
    assert operator in KERNELS, "add the row's kernels to KERNELS"
    own = [
        (used, held)
        for kernel, used, held in resources()
        if any(re.match(re.escape(name) + r"(?!_)", kernel) for name in KERNELS[operator])
    ]
    assert own
    assert int(registers) == max(used for used, _ in own)
    static = int(re.match(r"\d+", shared)[0])
    assert static == max(held for _, held in own)


def test_every_kernel_belongs_to_a_row() -> None:
    stated = {row[0] for row in ROWS}
    assert stated == set(KERNELS)
    known = {name.split("<")[0] for names in KERNELS.values() for name in names} | HELPERS
    compiled = {kernel.split("<")[0] for kernel, _, _ in resources()}
    assert compiled == known
