"""The choice of a device, with GPUs that are not there."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hybrid_engine.config import ModelConfig, RunConfig
from hybrid_engine.distributed import device
from hybrid_engine.engine.arena import Arena, DeviceArena, arena_on
from hybrid_engine.errors import UserError
from hybrid_engine.models import ForeignCausalLM, placed
from hybrid_engine.preflight import check_dtype


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Two GPUs; the list says which were made current."""
    current: list[int] = []
    monkeypatch.setattr(device, "_chosen", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


def be_rank(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {"RANK": rank, "WORLD_SIZE": 4, "LOCAL_RANK": rank, "MASTER_PORT": 1234}
    for name, value in ranks.items():
        monkeypatch.setenv(name, str(value))


def test_the_cpu_needs_nothing(gpus: list[int]) -> None:
    assert device.use_device("cpu") == device.compute_device() == torch.device("cpu")
    assert (device.group_backend(), device.weights_backend(), gpus) == ("gloo", "gloo", [])


def test_every_rank_has_the_gpu_of_its_local_number(
    gpus: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    be_rank(1, monkeypatch)
    assert device.use_device("cuda") == device.compute_device() == torch.device("cuda", 1)
    assert gpus == [1]
    assert (device.group_backend(), device.weights_backend()) == ("cpu:gloo,cuda:nccl", "nccl")
    assert isinstance(arena_on(device.compute_device(), 10), DeviceArena)
    assert isinstance(arena_on(torch.device("cpu"), 10), Arena)


def test_a_rank_without_a_gpu_is_told_how_many_there_are(
    gpus: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    be_rank(2, monkeypatch)
    with pytest.raises(UserError, match=r"rank 2 .* of which there are 2; .*--num-gpus 2"):
        device.use_device("cuda")


def test_no_gpu_and_other_devices_are_errors(
    gpus: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch finds no GPU"):
        device.use_device("cuda")
    with pytest.raises(UserError, match="give cpu or cuda"):
        device.use_device("tpu")
    assert device.compute_device() == torch.device("cpu")


def test_the_group_and_deepspeed_are_told(gpus: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid_engine.distributed import process_group

    asked: list[str] = []
    monkeypatch.setattr(process_group, "_world", None)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(
        process_group.dist, "init_process_group", lambda backend, **_: asked.append(backend)
    )
    monkeypatch.setattr(process_group.atexit, "register", lambda function: None)
    device.use_device("cuda")
    process_group.initialise()
    assert asked == ["cpu:gloo,cuda:nccl"]
    assert process_group.os.environ["DS_ACCELERATOR"] == "cuda"


def test_models_without_a_decoder_of_ours_stay_on_the_cpu(gpus: list[int]) -> None:
    device.use_device("cuda")
    foreign = ForeignCausalLM.__new__(ForeignCausalLM)
    with pytest.raises(UserError, match="run on the CPU alone"):
        placed(foreign)


def test_models_move_and_parameters_may_be_half(gpus: list[int]) -> None:
    device.use_device("cuda")
    asked = []
    stand_in = SimpleNamespace(to=asked.append)
    assert placed(stand_in) is stand_in  # type: ignore[type-var]
    assert asked == [torch.device("cuda", 0)]
    check_dtype(RunConfig(model=ModelConfig(device="cuda", dtype="float16")))
    check_dtype(RunConfig(model=ModelConfig(dtype="bfloat16")))
    with pytest.raises(UserError, match="float16 cannot be trained on a CPU"):
        check_dtype(RunConfig(model=ModelConfig(dtype="float16")))


def test_an_arena_keeps_its_address_until_it_is_released() -> None:
    arena = DeviceArena(100, torch.device("cpu"))
    storage = arena.storage
    assert arena.storage.data_ptr() == storage.data_ptr()
    assert arena.nbytes == storage.nbytes == 100
    arena.release()
    assert arena.storage is not storage
