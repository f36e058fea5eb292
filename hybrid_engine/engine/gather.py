"""ZeRO-3 shards made whole for generation: once a rollout, layer by layer, while it prefills.

`generation()` starts a thread on every rank that runs one all-gather a layer, in the order of the
forward pass, and lays the parameters into an arena. The decode program, bound to the arena, waits
at a gate for each layer of its first pass, so the first prefill and the gather overlap. Afterwards
everything is there, and generating sends nothing: ranks may generate as much or as little as they
like, or not at all.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from hybrid_engine.distributed.collectives import barrier, enter_phase, world_size
from hybrid_engine.distributed.device import compute_device, on_own_device, weights_backend
from hybrid_engine.distributed.process_group import initialise
from hybrid_engine.engine.arena import arena_on
from hybrid_engine.engine.gather_plan import GatherPlan, Part, plan_gather
from hybrid_engine.engine.slices import Slices
from hybrid_engine.models import CausalLM
from hybrid_kernels import native_module, ops

_PHASE = "gathering the weights for generation"
_AHEAD = 4  # parts on their way at a time


@dataclass(frozen=True)
class GatherCounters:
    """Of one generation phase, on this rank.

    Attributes:
        collectives: all-gathers.
        received_bytes: from other ranks: (ranks - 1) times the sum over parameters of
            ceil(elements / ranks) * bytes an element.
        arena_bytes: gathered weights, or the slices of them, held during the phase.
        staging_bytes: beside them while gathering.
        seconds: from the beginning until the last layer was there.
        waited_seconds: of that, how long the forward pass stood still.
    """

    collectives: int = 0
    received_bytes: int = 0
    arena_bytes: int = 0
    staging_bytes: int = 0
    seconds: float = 0.0
    waited_seconds: float = 0.0


class Staging:
    """What collectives work on: this rank's shard of a part, and every rank's; `_AHEAD` times over.

    So many parts are on their way at a time, because a message's way through the threads of Gloo
    takes milliseconds where all cores compute. Slot s serves parts s, s + _AHEAD, ...
    """

    def __init__(self, plan: GatherPlan, ranks: int) -> None:
        self.ranks = ranks
        slots = [plan.parts[first::_AHEAD] for first in range(_AHEAD)]
        self._widest = [max((part.shard_size for part in slot), default=0) for slot in slots]
        self.arena = arena_on(compute_device(), (1 + ranks) * sum(self._widest))

    def buffers(self, number: int, part: Part) -> tuple[Tensor, Tensor]:
        """(own [S], all [ranks * S]) bytes of part 0, 1, ..., of which S are on each rank."""
        slot = number % _AHEAD
        start = (1 + self.ranks) * sum(self._widest[:slot])
        both = self.arena.storage[start : start + (1 + self.ranks) * part.shard_size]
        return both[: part.shard_size], both[part.shard_size :]


class GatheredWeights:
    """The whole parameters of a module that ZeRO-3 keeps in shards, at fixed addresses.

    Making one is a collective, as is every phase. The module's own parameters are left alone:
    training finds them as it left them.

    Args:
        model: already partitioned by DeepSpeed.
        slices: what this rank keeps of them; None: everything.
    """

    def __init__(self, model: CausalLM, slices: Slices | None = None) -> None:
        self._plan = plan_gather(model, world_size(), slices)
        self._weights = arena_on(compute_device(), self._plan.size)
        self._staging = Staging(self._plan, world_size())
        # A group of its own: its collectives are ordered among themselves, whatever the main
        # thread sends meanwhile.
        self._group = dist.new_group(backend=weights_backend(), timeout=initialise().timeout)
        self.gate = native_module().WeightGate()
        self._failure = ""
        self.counters = GatherCounters()

    def tensors(self) -> dict[str, Tensor | list[Tensor]]:
        """Every parameter by name, as views of the arena: filled once :attr:`gate` opens.

        Except that the program on the CPU reads small bfloat16 parameters when it is bound, so
        where there are any everything is waited for here.
        """
        storage = self._weights.storage
        tensors = {name: piece.view(storage) for name, piece in self._plan.names.items()}
        on_cpu = storage.device.type == "cpu"
        if on_cpu and any(piece.dtype != torch.float32 for piece in self._plan.names.values()):
            self._thread.join()
            self._raise_failure()
        return tensors

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The weights are there inside, or on their way; every rank must enter.

        Raises:
            RankTimeout: a rank did not come.
            RuntimeError: a rank was lost on the way.
        """
        barrier(_PHASE)
        enter_phase("generating")
        self._failure = ""
        self._thread = threading.Thread(target=self._gather, name="gather-weights", daemon=True)
        self._thread.start()
        try:
            yield
        finally:
            self._thread.join()
            self.counters = replace(self.counters, waited_seconds=self.gate.waited_seconds)
            self.gate.close()
            self._weights.release()
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure:
            raise RuntimeError(self._failure)

    @torch.no_grad()
    def _gather(self) -> None:
        start = time.perf_counter()
        self.counters = GatherCounters(
            arena_bytes=self._weights.nbytes, staging_bytes=self._staging.arena.nbytes
        )
        try:
            with on_own_device():
                self._gather_parts()
        except Exception as error:  # the main thread raises it, which waits at the gate or joins
            self._failure = f"{_PHASE}: {error}; look at the other ranks' output for the cause"
            self.gate.fail(self._failure)
        finally:
            self._staging.arena.release()
        self.counters = replace(self.counters, seconds=time.perf_counter() - start)

    def _gather_parts(self) -> None:
        coming = deque(self._send(number) for number in range(_AHEAD))
        for number in range(len(self._plan.parts)):
            arriving = coming.popleft()
            if arriving is not None:
                arriving.wait()
                self._lay_out(number)
            self.gate.open(number)
            coming.append(self._send(number + _AHEAD))

    def _send(self, number: int) -> dist.Work | None:
        """Begin the collective of a part, if there is one and it has parameters."""
        if number >= len(self._plan.parts) or not self._plan.parts[number].pieces:
            return None
        part = self._plan.parts[number]
        own, everyone = self._staging.buffers(number, part)
        torch.cat([piece.shard() for piece in part.pieces], out=own)
        work = dist.all_gather_into_tensor(everyone, own, group=self._group, async_op=True)
        self.counters = replace(
            self.counters,
            collectives=self.counters.collectives + 1,
            received_bytes=self.counters.received_bytes + everyone.nbytes - own.nbytes,
        )
        return work

    def _lay_out(self, number: int) -> None:
        part = self._plan.parts[number]
        own, everyone = self._staging.buffers(number, part)
        ops.unshard_(
            self._weights.storage,
            everyone.view(-1, own.numel()),
            *part.runs,
        )
