"""Plays the model for a scheduler.

Every place of the cache holds (sample or prompt, position), so a wrong block table shows.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from hybrid_kernels import native_module

TILE = 64
Place = tuple[int, int]  # block, offset


@dataclass
class Cache:
    """What was written where: ("prompt", prompt, position) or ("sample", sample, position)."""

    places: dict[Place, tuple[str, int, int]] = field(default_factory=dict)
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


@dataclass
class Trace:
    """What a run did."""

    finished: list[int]  # samples in the order in which they ended
    started: list[int]  # prompts in the order of their prefill
    peak_live: int
    decode_steps: int
    prefill_rows: list[int]
    copies: int
    peak_blocks: int


def play(requests: list[Request], max_batch: int, max_prefill_rows: int, blocks: int) -> Trace:
    """Runs the queue to its end, checking every block table on every pass."""
    native = native_module()
    pool, cache = native.KvBlockPool(blocks), Cache()
    queue = [
        native.PromptRequest(r.prompt_length, r.max_new, r.samples, r.expected) for r in requests
    ]
    scheduler = native.Scheduler(queue, max_batch, max_prefill_rows, pool, cache.copy, cache.freed)
    player = _Player(requests, cache, max_batch, max_prefill_rows)
    while not scheduler.done:
        while chunks := scheduler.next_prefill():
            player.prefill(scheduler, chunks)
            assert 0 <= scheduler.promised <= pool.available
        if scheduler.live:
            player.decode(scheduler)
            assert 0 <= scheduler.promised <= pool.available
        else:
            assert scheduler.done, "nothing is live, nothing can be admitted"
    assert pool.used == 0
    assert scheduler.promised == 0
    assert not cache.places
    trace = player.trace
    trace.copies, trace.peak_blocks = cache.copies, pool.peak_used
    return trace


class _Player:
    def __init__(
        self, requests: list[Request], cache: Cache, max_batch: int, max_prefill_rows: int
    ) -> None:
        self.requests, self.cache = requests, cache
        self.max_batch, self.max_prefill_rows = max_batch, max_prefill_rows
        self.first = [sum(r.samples for r in requests[:i]) for i in range(len(requests))]
        self.drawn: dict[int, int] = {}  # tokens of each sample so far
        self.prefilled: dict[int, int] = {}
        self.trace = Trace([], [], 0, 0, [], 0, 0)

    def prefill(self, scheduler: object, chunks: list) -> None:
        rows = sum(chunk.rows for chunk in chunks)
        assert 0 < rows <= self.max_prefill_rows
        self.trace.prefill_rows.append(rows)
        for chunk in chunks:
            self._write_chunk(chunk)
        for chunk in chunks:
            if chunk.completes:
                scheduler.finish_prefill(chunk.prompt, self._first_tokens(chunk.prompt))
        self.trace.peak_live = max(self.trace.peak_live, scheduler.live)
        assert scheduler.live <= self.max_batch

    def _write_chunk(self, chunk: object) -> None:
        request = self.requests[chunk.prompt]
        assert chunk.start == self.prefilled.get(chunk.prompt, 0)
        if chunk.start == 0:
            self.trace.started.append(chunk.prompt)
        self.prefilled[chunk.prompt] = chunk.start + chunk.rows
        assert chunk.completes == (chunk.start + chunk.rows == request.prompt_length)
        for position in range(chunk.start, chunk.start + chunk.rows):
            place = (chunk.blocks[position // TILE], position % TILE)
            assert place not in self.cache.places
            self.cache.places[place] = ("prompt", chunk.prompt, position)

    def _first_tokens(self, prompt: int) -> list[int]:
        survivors = []
        for j, length in enumerate(self.requests[prompt].lengths):
            sample = self.first[prompt] + j
            self.drawn[sample] = 1
            survivors += [sample] if length > 1 else []
            self.trace.finished += [] if length > 1 else [sample]
        return survivors

    def decode(self, scheduler: object) -> None:
        live = scheduler.prepare_decode()
        assert 0 < len(live) <= self.max_batch
        self.trace.decode_steps += 1
        for sample in live:
            self._append(sample)
        finished = []
        for sample in live:
            self._check_table(sample)
            self.drawn[sample.sample] += 1
            length = self.requests[sample.prompt].lengths[sample.sample - self.first[sample.prompt]]
            finished.append(self.drawn[sample.sample] == length)
            self.trace.finished += [sample.sample] if finished[-1] else []
        scheduler.finish_decode(finished)
        self.trace.peak_live = max(self.trace.peak_live, scheduler.live)

    def _append(self, sample: object) -> None:
        position = sample.kv_len - 1
        assert (
            position == self.requests[sample.prompt].prompt_length + self.drawn[sample.sample] - 1
        )
        place = (sample.blocks[position // TILE], position % TILE)
        assert place not in self.cache.places, "a token is written over another one"
        self.cache.places[place] = ("sample", sample.sample, position)

    def _check_table(self, sample: object) -> None:
        prompt_length = self.requests[sample.prompt].prompt_length
        for position in range(sample.kv_len):
            own = ("sample", sample.sample, position)
            expected = ("prompt", sample.prompt, position) if position < prompt_length else own
            assert self.cache.places[sample.blocks[position // TILE], position % TILE] == expected


def random_requests(rng: random.Random, count: int) -> list[Request]:
    requests = []
    for _ in range(count):
        prompt_length = rng.choice([1, 5, 63, 64, 65, 128, rng.randrange(1, 200)])
        max_new = rng.choice([1, 2, 30, 64, 65, rng.randrange(1, 100)])
        samples = rng.choice([1, 1, 2, 3, 7])
        lengths = [rng.randint(1, max_new) for _ in range(samples)]
        requests.append(Request(prompt_length, max_new, samples, lengths, expected=rng.random()))
    return requests
