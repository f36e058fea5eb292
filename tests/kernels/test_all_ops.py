"""Every operator passes the same tests, from the reference match to thread counts."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid_kernels import native_module
from hybrid_kernels.ops._dispatch import native_operator
from hybrid_kernels.testing import (
    Args,
    OpCase,
    as_accurate,
    assert_same_bits,
    available_devices,
    outputs_of,
    to_device,
    to_double,
)

HERE = Path(__file__).parent
SCHEMA = HERE.parents[1] / "csrc" / "schema.cpp"


def _load_cases() -> list[OpCase]:
    cases: list[OpCase] = []
    for path in sorted(HERE.glob("cases_*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        cases += module.CASES
    return cases


CASES = _load_cases()
DIFFERENTIABLE = [case for case in CASES if case.differentiable]
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def _with_shapes(cases: list[OpCase]):
    pairs = [(case, shape) for case in cases for shape in case.shapes]
    names = [f"{case.name}-{shape}" for case, shape in pairs]
    return pytest.mark.parametrize("case, shape", pairs, ids=names)


def _factor(case: OpCase) -> float:
    """The generic copy rounds twice where plain torch, on this processor, fuses."""
    return case.factor * (2.0 if native_module().isa() == "generic" else 1.0)


def _first_shape(case: OpCase) -> str:
    return "odd" if "odd" in case.shapes else case.shapes[0]


FEW = 64  # outputs: plain float32 may hit the exact values of so few by luck, with one seed
SEEDS = 8


def _over_seeds(case: OpCase, shape: str, results: Callable[[Args], tuple[Any, ...]]) -> list[Any]:
    """``results(args)`` of the inputs of one seed; of few outputs, those of several, stacked."""
    found = [results(case.inputs(shape))]
    if all(output.numel() <= FEW for output in outputs_of(found[0][0])):
        found += [results(case.inputs(shape, seed)) for seed in range(1, SEEDS)]
    return [_stacked(same) for same in zip(*found, strict=True)]


def _stacked(results: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.stack(same) for same in zip(*map(outputs_of, results), strict=True))


@pytest.mark.parametrize("device", available_devices())
@_with_shapes(CASES)
def test_matches_reference(case: OpCase, shape: str, device: str) -> None:
    def results(args: Args) -> tuple[Any, Any, Any]:
        exact = case.reference(*to_double(args))
        return case.function(*to_device(args, device)), exact, case.reference(*args)

    case.compare(*_over_seeds(case, shape, results), _factor(case))


@_with_shapes(DIFFERENTIABLE)
def test_gradient_matches_reference(case: OpCase, shape: str) -> None:
    def results(args: Args) -> tuple[Any, Any, Any]:
        exact = case.gradients(case.reference, to_double(args))
        return case.gradients(case.function, args), exact, case.gradients(case.reference, args)

    as_accurate(*_over_seeds(case, shape, results), _factor(case))


OPERATORS = [(case, operator) for case in CASES for operator in case.operators]


@pytest.mark.parametrize(
    "case, operator", OPERATORS, ids=[f"{case.name}-{operator}" for case, operator in OPERATORS]
)
def test_opcheck(case: OpCase, operator: str) -> None:
    args = list(case.inputs(_first_shape(case)))
    for position in case.differentiable:
        args[position] = args[position].detach().requires_grad_()
    native_args = case.operators[operator](*args)
    if operator.endswith("_backward"):  # not differentiable again
        native_args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in native_args)
    torch.library.opcheck(native_operator(operator), native_args)


BAD_INPUTS = [(case, bad) for case in CASES for bad in case.bad_inputs]


@pytest.mark.parametrize(
    "case, bad", BAD_INPUTS, ids=[f"{case.name}-{bad.name}" for case, bad in BAD_INPUTS]
)
def test_bad_input_message(case: OpCase, bad) -> None:
    args = bad.spoil(*case.inputs(_first_shape(case)))
    with pytest.raises(ValueError, match=bad.message):
        case.function(*args)


@by_case
def test_is_deterministic(case: OpCase) -> None:
    args = case.inputs(case.shapes[-1])
    assert_same_bits(case.function(*args), case.function(*args))
    if case.differentiable:
        assert_same_bits(case.gradients(case.function, args), case.gradients(case.function, args))


@_with_shapes(CASES)
def test_does_not_depend_on_thread_count(case: OpCase, shape: str, threads) -> None:
    args = case.inputs(shape)
    results = []
    for count in (1, 3):
        threads(count)
        results.append(case.function(*args))
        if case.differentiable:
            results[-1] = (results[-1], case.gradients(case.function, args))
    assert_same_bits(*results)


def test_every_schema_operator_has_a_case() -> None:
    declared = re.findall(r'"(\w+)\(', SCHEMA.read_text())
    assert declared, "no operator found in csrc/schema.cpp"
    covered = {operator for case in CASES for operator in case.operators}
    assert sorted(set(declared) - covered) == []
    assert sorted(covered - set(declared)) == []


def test_every_operator_refuses_something() -> None:
    assert [case.name for case in CASES if not case.bad_inputs and ":" not in case.name] == []
