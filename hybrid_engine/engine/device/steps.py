"""One decode step for each batch bucket, recorded when it is first needed."""

from __future__ import annotations

from torch import Tensor

from .cache import DeviceCache
from .graphs import Recorder, Step
from .state import DecodeState
from .walk import LayerWalk


def bucket_for(rows: int, batch: int) -> int:
    """The power of two that holds so many rows, or the whole batch where that is smaller."""
    return min(1 << (rows - 1).bit_length(), batch)


class DecodeSteps:
    """Embedding, blocks and last norm of a batch's next rows.

    What is recorded has addresses and sizes in it, and nothing that changes from rollout to
    rollout: drawing, whose seed and temperature are arguments by value, comes behind it. So a step
    is recorded once for a bucket, as long as weights, cache and state stay where they are.
    """

    def __init__(self, walk: LayerWalk, cache: DeviceCache, state: DecodeState, recorder: Recorder):
        self._walk, self._cache, self._state = walk, cache, state
        self._record = recorder
        self._steps: dict[int, Step] = {}

    def __call__(self, bucket: int) -> Tensor:
        """Hidden states ``[bucket, embed_dim]``, valid until the next step."""
        return self._steps[bucket]()

    def prepare(self, bucket: int) -> None:
        """Records a bucket's step where that has not happened. The state's rows are lost: recording
        runs them, so they must be idle.
        """
        if bucket not in self._steps:
            self._state.set_rows([])
            self._steps[bucket] = self._record(lambda: self._step(bucket))

    @property
    def buckets(self) -> list[int]:
        return sorted(self._steps)

    def _step(self, bucket: int) -> Tensor:
        return self._walk.run(self._state.advance(bucket), self._cache.tensor)
