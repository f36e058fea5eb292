"""The rows of one step, as examples that are read and tokenised when they are asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar, overload

import numpy as np

from hybrid_engine.config import DataConfig
from hybrid_engine.data.checked import CheckedSource, check_mapping_is_used
from hybrid_engine.data.encode import Encoder
from hybrid_engine.data.examples import ExampleMaker, NotForThisStep
from hybrid_engine.data.records import STEPS, BadRow
from hybrid_engine.data.schema import parse_columns
from hybrid_engine.data.sources import open_source
from hybrid_engine.data.split import (
    ORDER,
    blend_counts,
    first_by_order,
    split_heldout,
    step_rows,
)
from hybrid_engine.errors import UserError

Example = TypeVar("Example")


@dataclass(frozen=True)
class Plan:
    """Examples by the places of their rows.

    ``rows [n, 2]``: positions in the source, the second -1 unless the example pairs two rows;
    ``keys [n, 3]``: the random numbers of the first row; ``source [n]``.
    """

    source: np.ndarray
    rows: np.ndarray
    keys: np.ndarray

    def __len__(self) -> int:
        return len(self.source)

    def take(self, index: np.ndarray) -> Plan:
        return Plan(self.source[index], self.rows[index], self.keys[index])

    def sample(self, count: int) -> Plan:
        """A random ``count`` of the examples, in their order."""
        return self.take(np.sort(first_by_order(self.keys, count)))


class Examples(Sequence[Example], Generic[Example]):
    """Examples made at each access: a rank holds the places of rows, and no text."""

    def __init__(
        self, sources: list[CheckedSource], plan: Plan, make: Callable[..., Example]
    ) -> None:
        self._sources = sources
        self._source, self._rows = plan.source, plan.rows
        self._make = make

    def __len__(self) -> int:
        return len(self._source)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        source = self._sources[self._source[index]]
        return self._make(*(source.record(row) for row in self._rows[index] if row >= 0))


@dataclass(frozen=True)
class StageData:
    """What a step trains on, what it is evaluated on, and how many rows it left out, by reason."""

    train: Sequence[Any]
    heldout: Sequence[Any]
    left_out: dict[str, int]


def load_stage(
    config: DataConfig, stage: str, tokenizer: Any, seed: int, eos_token_id: int | Sequence[int]
) -> StageData:
    """The examples of a step: SFTExample ("sft"), PairExample ("reward"), PromptExample ("rlhf").

    All rows of all sources are checked in one pass. The result depends on (config, stage, seed) and
    the rows alone, so every rank that calls this has the same plan. ``eos_token_id`` may be several
    ids: each ends an answer, the first is appended to answers without one. Raises UserError for
    malformed rows and when nothing is left to train on.
    """
    if stage not in STEPS:
        raise ValueError(f"load_stage: stage is {stage!r}; give one of {', '.join(STEPS)}")
    check_context(config, tokenizer)
    mapping = parse_columns(config.columns)
    opened = [open_source(spec) for spec in config.path]
    check_mapping_is_used(mapping, opened)
    sources = [CheckedSource(source, mapping, seed, config.max_rows) for source in opened]
    encoder = Encoder(tokenizer, config, eos_token_id)
    if stage != "rlhf":
        encoder.end()  # answers are to end with it: say so before the first of them
    maker = ExampleMaker(encoder, config)
    left_out: Counter[str] = Counter()
    plans = [
        plan_source(at, source, stage, config, maker, left_out) for at, source in enumerate(sources)
    ]
    train = blend([train for train, _ in plans], config.weights)
    heldout = blend([heldout for _, heldout in plans], config.weights).sample(config.max_heldout)
    if len(train) == 0:
        raise UserError(nothing_left(stage, config, sources, left_out))
    makers: dict[str, Callable[..., Any]] = {
        "sft": maker.sft,
        "reward": partial(make_pair, maker),
        "rlhf": maker.prompt,
    }
    make = makers[stage]
    return StageData(
        Examples(sources, train, make), Examples(sources, heldout, make), dict(left_out)
    )


def make_pair(maker: ExampleMaker, *records: Any) -> Any:
    return maker.pair(*records) if len(records) == 1 else maker.labelled_pair(*records)


def plan_source(
    at: int,
    source: CheckedSource,
    stage: str,
    config: DataConfig,
    maker: ExampleMaker,
    left_out: Counter[str],
) -> tuple[Plan, Plan]:
    """(train, held-out) of one source; adds the rows that the step cannot use to ``left_out``."""
    if stage not in source.kind.steps:
        left_out[f"{source.name}: rows of kind '{source.kind.name}' do not serve this step"] += len(
            source.rows
        )
    rows = step_rows(source.keys, source.kind, config.split, stage)
    rows = usable_rows(source, rows, stage, maker, left_out)
    if stage == "reward" and source.kind.labelled:
        return plan_labelled_pairs(at, source, rows, config.heldout_fraction, left_out)
    heldout = split_heldout(source.keys[rows], config.heldout_fraction)
    return single_rows(at, source, rows[~heldout]), single_rows(at, source, rows[heldout])


def usable_rows(
    source: CheckedSource, rows: np.ndarray, stage: str, maker: ExampleMaker, left_out: Counter[str]
) -> np.ndarray:
    keep = np.ones(len(rows), dtype=bool)
    for at, row in enumerate(rows):
        record = source.record(row)
        try:
            maker.check(record, stage)
        except NotForThisStep as reason:
            left_out[str(reason)] += 1
            keep[at] = False
        except BadRow as error:
            raise UserError(f"{record.origin}: {error}") from None
    return rows[keep]


def single_rows(at: int, source: CheckedSource, rows: np.ndarray) -> Plan:
    pairs = np.stack([rows, np.full_like(rows, -1)], axis=1)
    return Plan(np.full(len(rows), at), pairs, source.keys[rows])


def plan_labelled_pairs(
    at: int, source: CheckedSource, rows: np.ndarray, fraction: float, left_out: Counter[str]
) -> tuple[Plan, Plan]:
    """Rows labelled 1 against rows labelled 0, matched in the random order of their hashes.

    Each label is split into training and held-out rows on its own. Where one label has fewer rows,
    they are used again, so that every row of the other takes part.
    """
    sides = []
    for label in (1, 0):
        side = rows[source.labels[rows] == label]
        side = side[np.argsort(source.keys[side, ORDER], kind="stable")]
        heldout = split_heldout(source.keys[side], fraction)
        sides.append((side[~heldout], side[heldout]))
    plans = []
    for good, bad in zip(*sides, strict=True):
        count = max(len(good), len(bad)) if len(good) and len(bad) else 0
        if count == 0:
            left_out["no row of the other label to pair with"] += len(good) + len(bad)
        pairs = np.stack([np.resize(good, count), np.resize(bad, count)], axis=1)
        plans.append(Plan(np.full(count, at), pairs, source.keys[pairs[:, 0]]))
    return plans[0], plans[1]


def blend(plans: list[Plan], weights: tuple[float, ...]) -> Plan:
    counts = blend_counts([len(plan) for plan in plans], weights)
    parts = [plan.sample(count) for plan, count in zip(plans, counts, strict=True)]
    return Plan(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("source", "rows", "keys")
        )
    )


def check_context(config: DataConfig, tokenizer: Any) -> None:
    longest = tokenizer.model_max_length  # a huge number where the tokenizer does not know
    if config.max_length > longest:
        raise UserError(
            f"data.max_length ({config.max_length}) is more than the model's context of "
            f"{longest} tokens; lower it"
        )


def nothing_left(
    stage: str, config: DataConfig, sources: list[CheckedSource], left_out: Counter[str]
) -> str:
    number = STEPS.index(stage) + 1
    total = sum(len(source.rows) for source in sources)
    reasons = "; ".join(f"{count} left out: {reason}" for reason, count in left_out.most_common())
    if not reasons:
        share = config.split[number - 1]
        reasons = f"data.split gives it a share of {share:g} in {list(config.split)}"
    return (
        f"step {number} ({stage}) has no rows to train on, of {total} in "
        f"{', '.join(config.path)} ({reasons}); "
        "give more rows, another data.split, or rows that this step can use (a longer "
        "data.max_prompt_tokens?)"
    )
