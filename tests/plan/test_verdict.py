"""Fits, or does not: what is said, what is named, and that it helps."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from hybrid_engine import cli
from hybrid_engine.config import RunConfig
from hybrid_engine.errors import UserError
from hybrid_engine.plan import RunPlan, checked, limits, out_of_memory, plan_run
from hybrid_engine.plan.__main__ import main
from hybrid_engine.plan.verdict import at_least, at_most
from tests.tiny import make_tiny_model


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("model")
    model = make_tiny_model(directory / "tiny")
    out = str(directory / "out")
    return ["--actor-model", str(model), "--data-path", "rows.jsonl", "--output-dir", out]


def planned(config: RunConfig, gigabytes: float, ranks: int = 1) -> RunPlan:
    plan = plan_run(dataclasses.replace(config, memory_limit=gigabytes), ranks)
    assert plan is not None
    return plan


def test_a_knob_that_is_named_makes_it_fit(arguments: list[str]) -> None:
    config = cli.parse(arguments)
    most, least = (of(planned(config, 100).steps)[2] for of in (at_most, at_least))
    assert least < most
    plan = planned(config, (most + least) / 2e9)
    assert plan.tight
    assert not plan.impossible
    assert plan.knobs
    options = [word for knob in plan.knobs for word in str(knob).split()]
    turned = planned(cli.parse([*arguments, *options]), (most + least) / 2e9)
    assert not turned.tight
    assert f"turn {' and '.join(map(str, plan.knobs))}, with which it fits" in plan.complaint()


def test_what_is_certain_not_to_fit_is_refused(arguments: list[str]) -> None:
    config = cli.parse(arguments)
    plan = planned(config, at_least(planned(config, 100).steps)[2] / 1e9 - 1e-3)
    warnings: list[str] = []
    with pytest.raises(UserError, match=r"needs at least .* --memory-check warn"):
        checked(plan, "refuse", warnings.append)
    checked(plan, "warn", warnings.append)
    assert len(warnings) == 1


def test_what_may_not_fit_is_a_warning(arguments: list[str]) -> None:
    config = cli.parse(arguments)
    warnings: list[str] = []
    checked(planned(config, at_most(planned(config, 100).steps)[2] / 1e9 - 1e-3), "refuse",
            warnings.append)  # fmt: skip
    assert len(warnings) == 1
    assert "needs up to" in warnings[0]


def test_the_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    assert capsys.readouterr().out.endswith("fits\n")
    assert main([*arguments, "--memory-limit", "0.01"]) == 3
    assert "does not fit" in capsys.readouterr().out
    assert not Path(arguments[-1]).exists()  # it only reads


def test_ranks_share_what_zero_shares_out(arguments: list[str]) -> None:
    alone = planned(cli.parse(arguments), 100)
    shared = planned(cli.parse([*arguments, "--zero-stage", "2"]), 100, ranks=4)
    of = [
        {h.name: h.bytes_at("train.policy step") for h in plan.steps[2].holdings}
        for plan in (alone, shared)
    ]
    moments = "policy: AdamW's moments"
    assert of[1][moments] == -(-of[0][moments] // 4)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_out_of_memory_names_phase_holders_and_knob(arguments: list[str], error: Exception) -> None:
    plan = planned(cli.parse(arguments), 100)
    said = str(out_of_memory(error, plan, "rlhf", "train"))
    assert "out of memory in rlhf, phase train" in said
    assert "policy: activations of a pass" in said
    assert "--rlhf.max-tokens-per-pass" in said


def test_other_errors_are_left_alone(arguments: list[str]) -> None:
    plan = planned(cli.parse(arguments), 100)
    assert out_of_memory(RuntimeError("size mismatch"), plan, "rlhf", "train") is None


def test_a_container_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [(3_000_000_000, 1_000_000_000), (2_000_000_000, 1_900_000_000)]
    monkeypatch.setattr(limits, "control_groups", lambda: iter(groups))
    own = SimpleNamespace(rss=300_000_000, vms=0)
    monkeypatch.setattr(psutil.Process, "memory_info", lambda _: own)
    found = limits.memory_limits(local_ranks=2)
    assert (found.hard, found.source) == (1_000_000_000, "the container's memory limit")
    assert found.free == 50_000_000 + own.rss


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as a plan is concerned."""
    monkeypatch.setattr(limits, "compute_device", lambda: SimpleNamespace(type="cuda"))


def test_frozen_models_are_offloaded_where_they_do_not_fit(
    arguments: list[str], on_a_gpu: None
) -> None:
    def plan(gigabytes: float, *more: str) -> RunPlan:
        return planned(cli.parse([*arguments, "--device", "cuda", *more]), gigabytes)

    def held(found: RunPlan, moment: str) -> int:
        rlhf = found.step("rlhf")
        assert rlhf is not None
        frozen = ("reference: weights", "reward model: weights")
        return sum(h.bytes_at(moment) for h in rlhf.holdings if h.name in frozen)

    roomy = plan(100)
    rlhf = roomy.step("rlhf")
    assert rlhf is not None
    most = at_most([rlhf])[2] / 1e9
    assert roomy.decided(roomy.config).rlhf.frozen_models == "auto"  # resident
    assert held(roomy, "train.policy step") == held(roomy, "score.forward") > 0
    narrow = plan(most - 1e-6)
    assert narrow.decided(roomy.config).rlhf.frozen_models == "offload"
    assert held(narrow, "score.forward") == held(roomy, "score.forward")
    assert held(narrow, "train.policy step") == 0
    offloading = narrow.step("rlhf")
    assert offloading is not None
    assert offloading.peak("train") == rlhf.peak("train") - held(roomy, "train.policy step")
    refused = plan(most - 1e-6, "--rlhf.frozen-models", "resident")
    assert held(refused, "train.policy step") > 0
    assert refused.tight


def test_on_a_cpu_there_is_nothing_to_offload(arguments: list[str]) -> None:
    config = cli.parse(arguments)
    plan = planned(config, at_most(planned(config, 100).steps)[2] / 1e9 - 1e-3)
    assert plan.tight
    assert plan.decided(config) == config
