"""A gradient buffer that is moved, lent and taken back, with its parts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from hybrid_engine.engine.gradient_memory import GradientMemory, gradient_memory

SIZES = (3, 1, 6)


def buffer() -> tuple[Tensor, list[Tensor]]:
    flat = torch.arange(float(sum(SIZES)))
    return flat, list(flat.split(SIZES))


def memory_of(accumulating: bool) -> tuple[GradientMemory, Tensor, list[Tensor]]:
    flat, parts = buffer()
    return GradientMemory(flat, parts, lambda: accumulating), flat, parts


def test_moving_keeps_values_and_makes_the_parts_views_of_the_new_place() -> None:
    memory, flat, parts = memory_of(accumulating=False)
    place = torch.zeros(8 + memory.nbytes + 8, dtype=torch.uint8)
    memory.move_to(place[8 : 8 + memory.nbytes])
    assert torch.equal(flat, buffer()[0])
    assert [part.tolist() for part in parts] == [part.tolist() for part in buffer()[1]]
    assert flat.data_ptr() == parts[0].data_ptr() == place.data_ptr() + 8
    parts[2].fill_(-1.0)
    assert flat[4:].tolist() == [-1.0] * 6
    assert place[:8].sum() == place[-8:].sum() == 0


@pytest.mark.parametrize("accumulating", [False, True])
def test_what_waits_for_its_step_comes_back_and_nothing_else(accumulating: bool) -> None:
    memory, flat, parts = memory_of(accumulating)
    memory.lend()
    flat.fill_(float("nan"))
    memory.take_back()
    expected = buffer()[0] if accumulating else torch.zeros(sum(SIZES))
    assert torch.equal(flat, expected)
    assert torch.equal(torch.cat(parts), expected)


def test_a_phase_that_broke_off_loses_nothing() -> None:
    memory, flat, _ = memory_of(accumulating=True)
    memory.take_back()  # nothing was lent
    for _ in range(2):
        memory.lend()
        flat.fill_(float("nan"))
    memory.take_back()
    assert torch.equal(flat, buffer()[0])


def optimizer(**more: object) -> SimpleNamespace:
    flat, parts = buffer()
    named = {"_Stage3__param_id_to_grad_partition": dict(enumerate(parts))}
    fields = {"grad_partitions_flat_buffer": flat, "offload_optimizer": False, **named, **more}
    return SimpleNamespace(**fields)


def test_it_is_found_in_an_optimizer_of_the_known_form_alone() -> None:
    found = gradient_memory(optimizer(), lambda: False)
    assert found is not None
    assert found.nbytes == 4 * sum(SIZES)
    others = (
        optimizer(offload_optimizer=True),
        optimizer(grad_partitions_flat_buffer=torch.zeros(10)),  # the parts lie elsewhere
        optimizer(grad_partitions_flat_buffer=torch.zeros(10, device="meta")),
        SimpleNamespace(),
    )
    assert [gradient_memory(other, lambda: False) for other in others] == [None] * 4
