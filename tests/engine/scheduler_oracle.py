"""Plays the model for a scheduler.

Every place of the cache remembers which token of which sequence was written there, so a wrong block
table, a stale row of a draft and a block freed too early all show.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from hybrid_kernels import native_module

TILE = 64
WHOLE_PROMPT = -1
Place = tuple[int, int]  # block, offset
Written = tuple[str, int, int, int]  # "prompt" or "sample", which, position, token


@dataclass
class Cache:
    """What was written where."""

    places: dict[Place, Written] = field(default_factory=dict)
    copies: int = 0

    def copy(self, source: int, target: int) -> None:
        assert not any(block == target for block, _ in self.places), (
            "a block is copied over live data"
        )
        for (block, offset), value in list(self.places.items()):
            if block == source:
                self.places[target, offset] = value
        self.copies += 1

    def freed(self, block: int) -> None:
        self.places = {place: value for place, value in self.places.items() if place[0] != block}


@dataclass
class Request:
    prompt_length: int
    max_new: int
    samples: int
    lengths: list[int]  # true response length of every sample, at most max_new
    expected: float = 0.0
    # Of every sample: how many leading tokens of its draft are right, and how many the draft has.
    drafts: list[tuple[int, int]] | None = None

    def native(self) -> Any:
        drafts = [length for _, length in self.drafts or []]
        return native_module().PromptRequest(
            self.prompt_length, self.max_new, self.samples, self.expected, drafts
        )

    def draft_token(self, sample: int, position: int) -> int:
        """0 is the token that the sample will draw, 1 is wrong."""
        assert self.drafts is not None
        right, length = self.drafts[sample]
        assert position < length, "a row of a draft that has ended"
        return 0 if position < right else 1


@dataclass
class Trace:
    """What a run did."""

    finished: list[int] = field(default_factory=list)  # samples in the order in which they ended
    started: list[int] = field(default_factory=list)  # prompts in the order of their first row
    rows: list[int] = field(default_factory=list)  # of each pass
    prompt_rows: int = 0  # first computations
    recomputed: int = 0
    decode_rows: int = 0
    draft_rows: int = 0
    peak_samples: int = 0
    copies: int = 0
    peak_blocks: int = 0
    preemptions: int = 0

    @property
    def passes(self) -> int:
        return len(self.rows)


def play(requests: list[Request], max_batch: int, max_prefill_rows: int, blocks: int) -> Trace:
    """Runs the queue to its end, checking every row and every block table on every pass."""
    native = native_module()
    pool, cache = native.KvBlockPool(blocks), Cache()
    scheduler = native.Scheduler(
        [r.native() for r in requests], max_batch, max_prefill_rows, pool, cache.copy, cache.freed
    )
    player = _Player(requests, cache, pool, max_batch, max_prefill_rows)
    while not scheduler.done:
        assert scheduler.slots_taken <= max_batch
        scheduler.finish_pass(player.play_pass(scheduler.next_pass()))
    assert pool.used == 0
    assert not cache.places
    trace = player.trace
    trace.copies, trace.peak_blocks = cache.copies, pool.peak_used
    trace.preemptions = scheduler.preemptions
    return trace


class _Player:
    def __init__(
        self,
        requests: list[Request],
        cache: Cache,
        pool: Any,
        max_batch: int,
        max_prefill_rows: int,
    ) -> None:
        self.requests, self.cache, self.pool = requests, cache, pool
        self.max_batch, self.max_prefill_rows = max_batch, max_prefill_rows
        self.first = [sum(r.samples for r in requests[:i]) for i in range(len(requests))]
        self.drawn: dict[int, int] = {}  # tokens of each sample so far
        self.prompt_rows_done: dict[int, int] = {}
        self.trace = Trace()

    def play_pass(self, items: list[Any]) -> list[Any]:
        assert items
        decoding = sum(self._decodes(item) for item in items)
        rows = sum(item.rows for item in items)
        assert decoding <= self.max_batch
        assert rows - decoding <= self.max_prefill_rows
        samples = sum(item.sample != WHOLE_PROMPT for item in items)
        self.trace.peak_samples = max(self.trace.peak_samples, samples)
        self.trace.rows.append(rows)
        for item in items:
            self._write(item)
        for item in items:
            self._check_table(item)
        return [outcome for item in items for outcome in self._draw(item)]

    def _known(self, item: Any) -> int:
        drawn = 0 if item.sample == WHOLE_PROMPT else self.drawn[item.sample]
        return self.requests[item.prompt].prompt_length + drawn

    def _decodes(self, item: Any) -> bool:
        return item.sample != WHOLE_PROMPT and item.start + item.rows >= self._known(item)

    def _write(self, item: Any) -> None:
        stop = item.start + item.rows
        assert item.first_draw == min(stop, max(item.start, self._known(item) - 1))
        for position in range(item.start, stop):
            block = item.blocks[position // TILE]
            assert self.pool.references(block) == 1, "a shared block is written"
            self.cache.places[block, position % TILE] = self._written(item, position)
        self._count(item, stop)

    def _count(self, item: Any, stop: int) -> None:
        trace = self.trace
        trace.recomputed += item.recomputed
        if item.sample != WHOLE_PROMPT:
            trace.decode_rows += self._decodes(item)
            trace.draft_rows += max(0, stop - self._known(item))
            assert item.recomputed == max(0, min(stop, self._known(item) - 1) - item.start)
            return
        done = self.prompt_rows_done.get(item.prompt, 0)
        if done == 0:
            trace.started.append(item.prompt)
        assert item.recomputed == max(0, min(done, stop) - item.start)
        trace.prompt_rows += max(0, stop - done)
        self.prompt_rows_done[item.prompt] = max(done, stop)

    def _written(self, item: Any, position: int) -> Written:
        """What the place of the cache must hold for this sequence."""
        request = self.requests[item.prompt]
        if position < request.prompt_length:
            return ("prompt", item.prompt, position, 0)
        if position < self._known(item):
            return ("sample", item.sample, position, 0)
        sample = item.sample - self.first[item.prompt]
        token = request.draft_token(sample, position - request.prompt_length)
        return ("sample", item.sample, position, token)

    def _check_table(self, item: Any) -> None:
        for position in range(item.start + item.rows):
            place = (item.blocks[position // TILE], position % TILE)
            assert self.cache.places[place] == self._written(item, position)

    def _draw(self, item: Any) -> list[Any]:
        draws = item.start + item.rows - item.first_draw
        if item.sample != WHOLE_PROMPT:
            return [self._advance(item.prompt, item.sample, draws)] if draws else []
        samples = self.requests[item.prompt].samples if draws else 0
        return [
            self._advance(item.prompt, self.first[item.prompt] + j, draws) for j in range(samples)
        ]

    def _advance(self, prompt: int, sample: int, draws: int) -> Any:
        """Appends what the drafts allow of `draws` tokens."""
        request, place = self.requests[prompt], sample - self.first[prompt]
        right = request.drafts[place][0] if request.drafts else 0
        drawn, on_draft, tokens = self.drawn.get(sample, 0), True, 0
        while tokens < draws and on_draft and drawn < request.lengths[place]:
            on_draft = drawn < right
            drawn, tokens = drawn + 1, tokens + 1
        self.drawn[sample] = drawn
        finished = drawn == request.lengths[place]
        self.trace.finished += [sample] if finished else []
        return native_module().Outcome(tokens, finished, on_draft)


def random_requests(rng: random.Random, count: int, drafts: bool = False) -> list[Request]:
    requests = []
    for _ in range(count):
        prompt_length = rng.choice([1, 5, 63, 64, 65, 128, rng.randrange(1, 200)])
        max_new = rng.choice([1, 2, 30, 64, 65, rng.randrange(1, 100)])
        samples = rng.choice([1, 1, 2, 3, 7])
        lengths = [rng.randint(1, max_new) for _ in range(samples)]
        request = Request(prompt_length, max_new, samples, lengths, expected=rng.random() * 80)
        if drafts:
            sizes = [rng.choice([0, 1, rng.randint(0, max_new), max_new]) for _ in range(samples)]
            request.drafts = [(rng.choice([size, rng.randint(0, size)]), size) for size in sizes]
        requests.append(request)
    return requests
