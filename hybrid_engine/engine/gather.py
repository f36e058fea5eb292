"""ZeRO-3 shards made whole for generation, layer by layer, while it computes.

`generation()` starts a thread on every rank that runs one all-gather a layer, in the order of the
forward pass, and lays the parameters into a copy (`engine.gathered_copy`). The decode program,
bound to the copy, waits at a gate for each layer of its first pass, so the first prefill and the
gather overlap. Where all layers fit, they stay: generating sends nothing from then on, and ranks
may generate as much or as little as they like, or not at all.

Where they do not, some are streamed: their places in the copy are a ring, and they come anew for
every pass, ahead of it by as many layers as the ring and the collectives on their way have room
for. Then the threads of all ranks go on together until nobody generates any more: what comes to a
rank that does not read it is dropped.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import repeat

import torch
from torch import Tensor

from hybrid_engine.distributed.collectives import all_gather_json, barrier, enter_phase, rank
from hybrid_engine.distributed.device import compute_device, on_own_device
from hybrid_engine.distributed.process_group import initialise
from hybrid_engine.distributed.standby import Standby
from hybrid_engine.engine.free_memory import free_memory
from hybrid_engine.engine.gather_plan import Piece, part_sizes, plan_gather
from hybrid_engine.engine.gather_policy import (
    GatherPolicy,
    Group,
    PartSizes,
    describe,
    pinning_all,
    solve_together,
)
from hybrid_engine.engine.gathered_copy import GatheredCopy, OwnCopy, SharedCopy
from hybrid_engine.engine.gradient_memory import GradientMemory
from hybrid_engine.engine.slices import Slices
from hybrid_engine.engine.staging import NOBODY, Arrival, StagedArrival, shards_group
from hybrid_engine.models import CausalLM
from hybrid_kernels import native_module

_PHASE = "gathering the weights for generation"
_PATIENCE_SECONDS = 0.2


@dataclass(frozen=True)
class _Coming:
    """A part on its way.

    Attributes:
        reader: the rollout that this rank was in when it was sent, or NOBODY.
        arrival: None where it has no parameters.
    """

    number: int
    reader: int
    arrival: Arrival | None


@dataclass(frozen=True)
class GatherCounters:
    """Of one generation phase, on this rank.

    Attributes:
        collectives: all-gathers of parts.
        rounds: of the layers that are streamed: one a pass of the rank that makes most, and one or
            two that were ahead when it ended.
        received_bytes: from other ranks: (ranks - 1) times the sum over parameters of
            ceil(elements / ranks) * bytes an element; those of streamed layers in every round. With
            layers streamed, 8 bytes more in each collective.
        arena_bytes: gathered weights, or the slices of them, held during the phase; of one copy for
            all ranks of the host this one's part, without what lies where gradients do in training.
        staging_bytes: beside them while gathering.
        seconds: from the beginning until the last layer was there; of a policy that streams, until
            nobody generated any more.
        waited_seconds: of that, how long the forward pass stood still.
    """

    collectives: int = 0
    rounds: int = 0
    received_bytes: int = 0
    arena_bytes: int = 0
    staging_bytes: int = 0
    seconds: float = 0.0
    waited_seconds: float = 0.0


class GatheredWeights:
    """The whole parameters of a module that ZeRO-3 keeps in shards, at fixed addresses.

    Making one is a collective, as is every phase. The module's own parameters are left alone:
    training finds them as it left them.

    Args:
        model: already partitioned by DeepSpeed.
        slices: what this rank reads of them; None: everything.
        weight_bytes: what gathered weights may take on this rank; 0: half of what is free beside
            ``kv_bytes``. The other half is for activations, for a cache without a limit, and for
            what the optimizer takes with its first step.
        gradients: memory that the gathered weights may take meanwhile.

    Raises:
        UserError: ``weight_bytes`` that no policy can keep to.
    """

    def __init__(
        self,
        model: CausalLM,
        slices: Slices | None = None,
        weight_bytes: int = 0,
        kv_bytes: int = 0,
        gradients: GradientMemory | None = None,
    ) -> None:
        group = shards_group(gradients.nbytes if gradients else 0)
        sizes = part_sizes(model, group.ranks, slices)
        if compute_device().type == "cpu":
            budget = weight_bytes or free_for_weights(kv_bytes)
            self.policy = _agree(sizes, group, budget, at_least=weight_bytes == 0)
        else:  # a recorded step reads all layers
            budget, self.policy = None, pinning_all(sizes.blocks)
        self.plan_line = describe(self.policy, sizes, group, budget, slices.ranks if slices else 1)
        self._slices = None  # of a copy that has all weights
        self._copy: GatheredCopy
        if self.policy.shares_copy(group):
            self._slices = slices
            self._plan = plan_gather(model, group.ranks, self.policy)
            self._copy = SharedCopy(self._plan, group, gradients)
        else:
            self._plan = plan_gather(model, group.ranks, self.policy, slices)
            self._copy = OwnCopy(self._plan, self.policy, sizes, group)
        self._slots = self.policy.slots()
        self._streamed = tuple(block + 1 for block in self._slots)
        first = rank() - (slices.rank if slices else 0)
        self._together = range(first, first + (slices.ranks if slices else 1))
        self.gate = native_module().WeightGate(set(self._streamed))
        self._leaving = threading.Event()
        self._last_in: dict[int, int] = {}  # each place of the ring
        self._failure = ""
        self.counters = GatherCounters()

    def tensors(self) -> dict[str, Tensor | list[Tensor]]:
        """Every parameter by name, as views of the copy: filled once :attr:`gate` opens."""
        storage = self._copy.storage
        return {name: self._view(name, piece, storage) for name, piece in self._plan.names.items()}

    def _view(self, name: str, piece: Piece, storage: Tensor) -> Tensor | list[Tensor]:
        if self._slices is None:
            return piece.view(storage)
        return self._slices.cut(name, piece.whole(storage))

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The weights are there inside, or on their way; every rank must enter. With layers
        streamed, or with one copy for all, ranks also leave together.

        Raises:
            RankTimeout: a rank did not come.
            RuntimeError: a rank was lost on the way.
        """
        self._copy.lend()  # before any rank writes there
        barrier(_PHASE)
        enter_phase("generating")
        self._failure = ""
        self._leaving.clear()
        self._last_in.clear()
        thread = threading.Thread(target=self._gather, name="gather-weights", daemon=True)
        thread.start()
        unhurt = False
        try:
            yield
            unhurt = True
        finally:
            self._leaving.set()
            self.gate.leave()
            thread.join()
            self.counters = replace(self.counters, waited_seconds=self.gate.waited_seconds)
            self.gate.close()
            with nullcontext() if unhurt else suppress(Exception):  # what happened inside counts
                self._copy.release(lost=bool(self._failure))
        if self._failure:
            raise RuntimeError(self._failure)

    # In the thread

    @torch.no_grad()
    def _gather(self) -> None:
        start = time.perf_counter()
        self.counters = GatherCounters(
            arena_bytes=self._copy.nbytes, staging_bytes=self._copy.staging_bytes
        )
        try:
            with on_own_device():
                self._gather_all()
            self._copy.end_gather()
        except Exception as error:  # the main thread raises it, which waits at the gate or joins
            self._failure = f"{_PHASE}: {error}; look at the other ranks' output for the cause"
            self.gate.fail(self._failure)
        self.counters = replace(self.counters, seconds=time.perf_counter() - start)

    def _gather_all(self) -> None:
        if not self.policy.streams:
            self._run(self._rounds())
            return
        standby, rounds = Standby("streamed generation"), self._rounds()
        while standby.next(self._reads, self._leaving.is_set):
            self._run(rounds)
            rounds = repeat(self._streamed)

    def _reads(self) -> bool:
        return self.gate.reader(0.0) != NOBODY

    def _rounds(self) -> Iterator[Sequence[int]]:
        """Parts by number: all of them, then what is streamed, for every pass."""
        yield range(len(self._plan.parts))
        if self.policy.streams:
            yield from repeat(self._streamed)

    def _run(self, rounds: Iterable[Sequence[int]]) -> None:
        """Whole rounds, as long as a rank wants another. All ranks send the same, because they go
        by what all of them said in the same collective, of some layers ago.
        """
        coming: deque[_Coming] = deque()
        for numbers in rounds:
            if not self._make_room(coming):
                break
            coming.append(self._send(numbers[0]))
            for number in numbers[1:]:
                self._make_room(coming)
                coming.append(self._send(number))
        for last in coming:
            self._receive(last)

    def _make_room(self, coming: deque[_Coming]) -> bool:
        """For one more on its way. Returns whether it is wanted."""
        return len(coming) < self.policy.ahead or self._receive(coming.popleft())

    def _send(self, number: int) -> _Coming:
        """Begins the collective of a part, if it has parameters."""
        begins = self._streamed[:1] == (number,)
        reader = self.gate.reader(self._patience() if begins else 0.0)
        part = self._plan.parts[number]
        if not part.pieces:
            return _Coming(number, reader, None)
        arrival = self._copy.send(number, part, reader)
        counters = self.counters
        self.counters = replace(
            counters,
            collectives=counters.collectives + 1,
            rounds=counters.rounds + begins,
            received_bytes=counters.received_bytes + arrival.received_bytes,
        )
        return _Coming(number, reader, arrival)

    def _patience(self) -> float:
        """A rank that comes to its first rollout a little later would miss a round."""
        late = self.counters.rounds == 0 and not self._leaving.is_set()
        return _PATIENCE_SECONDS if late else 0.0

    def _receive(self, coming: _Coming) -> bool:
        """Lays the part out where it belongs. Returns whether another round is wanted: whether any
        rank was in a rollout when it sent this.
        """
        if coming.arrival is None:
            self.gate.open(coming.number)
            return True
        coming.arrival.wait()
        words = [NOBODY]
        if self.policy.streams:
            assert isinstance(coming.arrival, StagedArrival)
            words = coming.arrival.words()
        if self._streamed[:1] == (coming.number,):
            # Ranks that compute a layer together read the same rounds of it, or none.
            together = all(words[r] == coming.reader for r in self._together)
            self.gate.begin_round(coming.reader if together else NOBODY)
        if coming.number not in self._streamed:
            self._lay_out(coming.number, coming.arrival)
        elif self.gate.delivering:
            slot = self._slots[coming.number - 1]
            self.gate.await_release(self._last_in.get(slot, coming.number))
            self._last_in[slot] = coming.number
            self._lay_out(coming.number, coming.arrival)
        return any(word != NOBODY for word in words)

    def _lay_out(self, number: int, arrival: Arrival) -> None:
        self._copy.lay_out(self._plan.parts[number], arrival)
        self.gate.open(number)


def free_for_weights(kv_bytes: int) -> int:
    """Half of this rank's share of what its host has, beside a cache of ``kv_bytes``."""
    share = free_memory() // initialise().env.local_world_size
    return max(0, share - kv_bytes) // 2


def _agree(sizes: PartSizes, group: Group, budget: int, at_least: bool) -> GatherPolicy:
    said = all_gather_json([sizes.kept, sizes.shards, budget])
    everyone = [PartSizes(tuple(kept), tuple(shards)) for kept, shards, _ in said]
    return solve_together(everyone, group, [theirs for *_, theirs in said], at_least=at_least)
