"""What DeepSpeed's engines hold of a trained model, by ZeRO stage.

P are the model's parameters, T the trained ones, R the ranks. Elements (m: bytes of a stored
parameter; masters, moments and sums are float32):

    stage             0, fp32      0, half     1              2              3
    parameters        P m          P m         P m            P m            P m / R
    masters           -            4 T         4 T / R        4 T / R        4 T / R
    moments           8 T          8 T         8 T / R        8 T / R        8 T / R
    gradients         T m          T m         T m            T m / R        T m / R, at all times

Moments come with the first step. Beside these there are the buckets that gradients are reduced
in, what a step converts, and under stage 3 the parameters that are gathered during a pass: those
that DeepSpeed keeps from forward to backward, once it has recorded such a pass (before, one after
the other).
Measured with DeepSpeed 0.19.8: tests/plan/test_peaks.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .activations import Activations
from .holdings import ALWAYS, Holding
from .models import ModelSize

_REUSE = 1_000_000_000  # DeepSpeed's stage3_max_reuse_distance
_PERSISTENT = 100_000  # and its stage3_param_persistence_threshold


@dataclass(frozen=True)
class Zero:
    """How DeepSpeed shares a model out.

    Attributes:
        bucket: elements of a reduction bucket.
        reuse: a parameter is kept if, in elements of others, its next use is no farther away.
        prefetched: elements that are gathered before their use.
        persistent: smaller parameters stay whole.
        optimizer_on_host, parameters_on_host: they are offloaded.
    """

    stage: int = 0
    ranks: int = 1
    bucket: int = 20_000_000
    reuse: int = _REUSE
    prefetched: int = 0
    persistent: int = _PERSISTENT
    optimizer_on_host: bool = False
    parameters_on_host: bool = False

    @staticmethod
    def of(settings: dict[str, Any], ranks: int) -> Zero:
        """From a DeepSpeed configuration that `deepspeed_config.complete` made."""
        zero = settings["zero_optimization"]

        def offloaded(what: str) -> bool:
            return (zero.get(f"offload_{what}") or {}).get("device", "none") != "none"

        return Zero(
            zero["stage"],
            ranks,
            int(zero["reduce_bucket_size"]),
            int(zero.get("stage3_max_reuse_distance", _REUSE)),
            int(zero["stage3_prefetch_bucket_size"]),
            int(zero.get("stage3_param_persistence_threshold", _PERSISTENT)),
            offloaded("optimizer"),
            offloaded("param"),
        )

    def part(self, elements: int) -> int:
        """Of one rank."""
        return -(-elements // self.ranks) if self.stage else elements

    def gathered(self, elements: int, largest: int) -> int:
        """Most of a model's elements, and of its largest parameter's, that a pass has whole: what
        follows a parameter is run through twice until its backward.
        """
        if self.ranks == 1:
            return 0
        return min(elements, self.reuse // 2 + self.prefetched + largest)


@dataclass(frozen=True)
class Trained:
    """A model with its training engine.

    Attributes:
        name: "policy", "critic" or "reward model".
        passes: whether a step takes several.
        knobs: of its activations.
        phase: whose moments these are.
    """

    name: str
    activations: Activations
    zero: Zero
    has_head: bool
    passes: bool
    knobs: tuple[str, ...]
    phase: str = "train"
    own_bytes: int = -1  # without what it shares with an earlier model; -1: everything
    others: tuple[str, ...] = ()  # moments of the other engine while this one's gradients are there
    asked: tuple[str, ...] = ()  # moments of forward passes without a step

    @property
    def model(self) -> ModelSize:
        return self.activations.model

    def moment(self, which: str) -> str:
        return f"{self.phase}.{self.name} {which}"

    def moments(self) -> list[str]:
        """ "head": its backward begins. "top", "bottom": in the last, the first trained block.
        "step": the optimizer's.
        """
        begin = ["head"] if self.has_head else []
        return [self.moment(which) for which in (*begin, "top", "bottom", "step")]

    def holdings(self) -> list[Holding]:
        return [*self._weights(), *self._state(), *self._gradients(), *self._pass(), *self._step()]

    def conversion(self) -> int:
        """Bytes beside the weights as they were loaded and the masters, while DeepSpeed takes them
        over: a flat copy; under stage 3 shards and their flat copy.
        """
        if self.zero.stage == 0:
            return 0
        if self.zero.stage < 3:
            return self.model.trained * self.model.itemsize
        return 2 * self.zero.part(self.model.nbytes)

    def masters(self) -> int:
        """Bytes of the float32 copy that the optimizer updates, where there is one."""
        whole = self.zero.stage == 0 and self.model.itemsize == 4
        return 0 if whole else 4 * self.zero.part(self.model.trained)

    def _weights(self) -> list[Holding]:
        nbytes = self.model.nbytes if self.own_bytes < 0 else self.own_bytes
        zero, size = self.zero, self.model.itemsize
        if zero.stage < 3:
            return [
                Holding(f"{self.name}: weights", {ALWAYS: nbytes}, ("model.dtype", "zero_stage"))
            ]
        small = sum(p.numel for p in self.model.parameters if p.numel < zero.persistent) * size
        sizes = [p.numel for p in self.model.parameters]
        whole = zero.gathered(sum(sizes), max(sizes)) * size
        return [
            Holding(
                f"{self.name}: weights (a shard)",
                {ALWAYS: zero.part(nbytes) + (small if zero.ranks > 1 else 0)},
                host=zero.parameters_on_host,
            ),
            Holding(
                f"{self.name}: weights gathered for a pass",
                dict.fromkeys((*self.moments()[:-1], *self.asked), whole),
            ),
        ]

    def _state(self) -> list[Holding]:
        zero, trained = self.zero, self.model.trained
        knobs = ("zero_stage", "model.lora_r", "model.trainable_layers")
        return [
            Holding(f"{self.name}: {what}", {ALWAYS: n}, knobs, host=zero.optimizer_on_host)
            for what, n in (
                ("AdamW's moments", 8 * zero.part(trained)),
                ("float32 masters", self.masters()),
            )
            if n
        ]

    def _gradients(self) -> list[Holding]:
        zero, size = self.zero, self.model.itemsize
        whole, knobs = self.model.trained * size, ("zero_stage", "model.lora_r")
        part = zero.part(self.model.trained) * size
        name = f"{self.name}: gradients"
        if zero.stage == 3:
            bucket = min(self.model.trained, zero.bucket) * size
            return [
                Holding(name, {ALWAYS: part}, knobs, host=zero.optimizer_on_host),
                Holding(f"{self.name}: reduction bucket", {ALWAYS: bucket}),
            ]
        kept = part if zero.stage == 2 else whole
        before = kept if self.passes else 0
        tied = self.model.head * size  # waits for the embedding's
        at = {self.moment("head"): before, self.moment("top"): before + tied}
        at |= {self.moment("bottom"): kept + self.model.embedding * size, self.moment("step"): kept}
        at |= dict.fromkeys(self.others, kept)
        if not self.has_head:
            del at[self.moment("head")]
        buckets = []
        if zero.stage == 2:
            bucket = 2 * min(self.model.trained, zero.bucket) * size
            buckets = [Holding(f"{self.name}: reduction bucket", {self.moment("bottom"): bucket})]
        return [Holding(name, at, knobs), *buckets]

    def _pass(self) -> list[Holding]:
        work = self.activations
        knobs = (*self.knobs, "model.gradient_checkpointing")
        saved = work.saved()
        at = {self.moment("top"): saved, self.moment("bottom"): self._lowest()}
        temporary = {self.moment("top"): work.backward(), self.moment("bottom"): work.backward()}
        if self.has_head:
            at[self.moment("head")] = saved
            temporary[self.moment("head")] = work.head()
        return [
            Holding(f"{self.name}: activations of a pass", at, knobs, longest=True),
            Holding(f"{self.name}: the backward's own", temporary, knobs, longest=True),
        ]

    def _lowest(self) -> int:
        """What is saved still when the lowest trained block's backward begins."""
        if self.activations.checkpointing:
            return (
                self.model.spec.hidden_size * self.activations.shape.rows * self.activations.width
            )
        return self.activations.block() if self.model.trained_blocks else 0

    def _step(self) -> list[Holding]:
        """What the optimizer's step makes on its way."""
        zero, trained, size = self.zero, self.model.trained, self.model.itemsize
        if zero.stage == 0:
            nbytes = 4 * trained if size < 4 else (trained * size if zero.ranks > 1 else 0)
        elif zero.stage == 1:
            nbytes = trained * size
        else:
            nbytes = zero.part(trained) * (4 + (size if size < 4 else 0))
        return [Holding(f"{self.name}: the step's own", {self.moment("step"): nbytes})]
