"""One module trained by one DeepSpeed engine.

What this adds to DeepSpeed: losses that are sums with a global normaliser, a gradient norm and a
finiteness check in every ZeRO stage, a schedule whose whole state is a step count, and checkpoints
that leave out frozen weights but notice when they have changed.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_engine.config import OptimizerConfig
from hybrid_engine.distributed import process_group
from hybrid_engine.distributed.collectives import world_size
from hybrid_engine.distributed.waiting import waiting
from hybrid_engine.engine import deepspeed_config as settings
from hybrid_engine.engine.deepspeed_limits import check_supported
from hybrid_engine.engine.frozen import FrozenWeights, frozen_checksum
from hybrid_engine.engine.gradient_memory import GradientMemory, gradient_memory
from hybrid_engine.engine.held_parameters import HeldParameters
from hybrid_engine.engine.nonfinite import NonFiniteGuard
from hybrid_engine.engine.optim import build_adamw, learning_rate
from hybrid_engine.engine.train_state import TrainState
from hybrid_engine.engine.zero3_trace import decide_by_trace, release
from hybrid_engine.errors import UserError
from hybrid_engine.models import is_quantized


class TrainEngine(HeldParameters):
    """Trains the parameters of `module` that require a gradient.

    Args:
        module: fp32, bf16 or fp16 parameters, equal on all ranks (rank 0's are broadcast).
        optimizer: AdamW, schedule, clipping.
        total_steps: optimizer steps of the whole schedule.
        deepspeed_config: the user's DeepSpeed settings, with `zero_optimization.stage` for the ZeRO
            stage. Empty is plain data parallelism; "auto" leaves a setting to us.
        name: for messages.
        verify_frozen: check after every step, and every generation phase, that the weights which
            are not trained have kept their bits.

    Raises:
        UserError: `deepspeed_config` sets what follows from the other arguments, or contradicts the
            parameters' dtype, or cannot be used; a quantized base under ZeRO stage 3.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: OptimizerConfig,
        total_steps: int,
        deepspeed_config: Mapping[str, Any] | None = None,
        name: str = "model",
        verify_frozen: bool = False,
    ) -> None:
        process_group.initialise()
        self._config = optimizer
        self._total_steps = total_steps
        self._name = name
        self._device = next(module.parameters()).device
        self._settings = settings.complete(
            settings.without_owned(dict(deepspeed_config or {}), "deepspeed_config"),
            _trained_dtype(module),
            world_size(),
            optimizer.max_grad_norm,
        )
        check_supported(self._settings, self._device.type)
        zero_stage = settings.zero_stage(self._settings)
        if zero_stage == 3 and is_quantized(module):
            raise UserError(
                f"{name}: a base in few bits is whole on every rank, which ZeRO stage 3 does not "
                "keep; take stage 0, 1 or 2, or leave --lora-base-bits out"
            )
        frozen = frozen_checksum(module)
        self._guard = NonFiniteGuard(module, name, optimizer.max_bad_steps)
        self._optimizer = build_adamw(module, optimizer)
        self._bare_norm: float | None = None
        if settings.clips_outside(self._settings):
            self._optimizer.register_step_pre_hook(self._clip_bare_optimizer)
        engine = _initialise_deepspeed(module, self._optimizer, self._settings)
        super().__init__(module, engine, zero_stage)
        if world_size() == 1 and settings.clips_outside(self._settings):
            # A rank alone has nothing to average; DeepSpeed would still copy all gradients twice.
            self._engine.enable_backward_allreduce = False
        self._state = TrainState(module, self._engine, self._optimizer, name, frozen)
        self._frozen = FrozenWeights(module, name) if verify_frozen else None
        self._awaits_backward = False  # the last forward had a graph
        self._accumulating = False  # gradients wait for their step
        self._gradients: GradientMemory | None = None
        if zero_stage == 3:
            decide_by_trace(engine.optimizer)
            self._gradients = gradient_memory(engine.optimizer, lambda: self._accumulating)
        self.steps = 0  # calls of step(), skipped ones included: the schedule's position

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._awaits_backward = torch.is_grad_enabled()
        with waiting(f"{self._name}: forward"):
            return self._engine(*args, **kwargs)

    @property
    def lr(self) -> float:
        """Learning rate of the coming step."""
        return learning_rate(self.steps, self._total_steps, self._config)

    @property
    def skipped_steps(self) -> int:
        return self._guard.skipped

    @property
    def optimizer(self) -> torch.optim.AdamW:
        return self._optimizer

    def backward(self, loss_sum: Tensor, normaliser: float) -> None:
        """Accumulate the gradient of `loss_sum / normaliser`.

        `loss_sum` is a sum over this rank's micro-batch, `normaliser` the count (tokens, pairs) of
        the whole accumulation batch over all ranks. The accumulated gradient is then
        sum over ranks and micro-batches of d(loss_sum) / normaliser, whatever their number:
        DeepSpeed averages over ranks, which the factor world_size undoes.

        Under ZeRO-2 and 3 every rank must call this equally often (gradients are reduced here).
        A non-finite loss makes the gradient NaN, so that the step is skipped on every rank.
        """
        self._guard.watch(loss_sum)
        self._reclaim_gradients()
        self._accumulating, self._awaits_backward = True, False
        scale = torch.full_like(loss_sum.detach(), world_size() / normaliser)
        scale = torch.where(torch.isfinite(loss_sum.detach()), scale, math.nan)
        with waiting(f"{self._name}: backward"):
            self._engine.backward((loss_sum * scale).to(self._device), scale_wrt_gas=False)

    def step(self) -> float:
        """Clip, update, clear gradients. Returns the global gradient norm before clipping.

        A step whose gradient is not finite changes nothing and returns inf or nan.

        Raises:
            UserError: `max_bad_steps` of those in a row, naming what was not finite.
        """
        self._reclaim_gradients()
        for group in self._optimizer.param_groups:
            group["lr"] = self.lr
        with waiting(f"{self._name}: optimizer step"):
            self._engine.step()
            self._accumulating = False
            applied, norm = self._outcome()
        self.check_frozen("training")
        self.steps += 1
        if applied:
            self._guard.good_step()
        else:
            self._guard.bad_step(expected=self._engine.fp16_enabled())
        return norm

    def _reclaim_gradients(self) -> None:
        """From a generation phase that broke off."""
        if self._gradients is not None:
            self._gradients.take_back()

    def check_frozen(self, phase: str) -> None:
        """Where ``verify_frozen`` is set: raises RuntimeError for a frozen weight that changed in a
        phase, which it names.
        """
        if self._frozen is not None:
            self._frozen.check(phase)

    def _outcome(self) -> tuple[bool, float]:
        if self._bare_norm is not None:
            return math.isfinite(self._bare_norm), self._bare_norm
        if not self._engine.was_step_applied():
            return False, math.inf
        return True, float(self._engine.get_global_grad_norm())

    def _clip_bare_optimizer(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """ZeRO-0 in fp32: runs between DeepSpeed's all-reduce and the update."""
        parameters = [
            p for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        self._bare_norm = float(norm)
        if not math.isfinite(self._bare_norm):
            for parameter in parameters:
                parameter.grad = None  # AdamW passes over parameters without a gradient
        elif self._config.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._config.max_grad_norm, norm)

    def gradient_memory(self) -> GradientMemory | None:
        """Where ZeRO-3 keeps this rank's gradients, for others to use between steps."""
        return self._gradients

    def release_gathered(self) -> None:
        """Under ZeRO-3: let go of parameters that a forward pass without a graph has gathered, and
        that DeepSpeed keeps for a backward all the same. Every rank calls this.
        """
        if self.zero_stage == 3 and not self._awaits_backward:
            release(self.module)

    def close(self) -> None:
        """Give back what the engine holds, which DeepSpeed's hooks would keep for as long as the
        process lives. Afterwards it is of no use, and under ZeRO-3 nor is the module.
        """
        optimizer = self._engine.optimizer
        self._engine.destroy()
        if self.zero_stage < 3:
            return
        # Classes that it makes for every layer outlive the hooks, and know the layer.
        for parameter in self.module.parameters():
            parameter.data = torch.empty(0, dtype=parameter.dtype)
            vars(parameter).clear()
        self._optimizer.state.clear()
        self._optimizer.param_groups.clear()
        vars(optimizer).clear()

    # Checkpoints.

    def save(self, directory: str | Path) -> None:
        """Write optimizer, trainable parameters and schedule; every rank calls this."""
        counts = {
            "steps": self.steps,
            "skipped": self._guard.skipped,
            "consecutive_bad": self._guard.consecutive,
        }
        self._state.save(Path(directory), counts)

    def load(self, directory: str | Path) -> None:
        """Continue from :meth:`save`, in any number of ranks and any ZeRO stage; bit for bit where
        they are the same.

        Raises:
            UserError: other frozen weights, or other trained ones; it names what differs.
        """
        counts = self._state.load(Path(directory))
        self.steps = counts["steps"]
        self._guard.skipped = counts["skipped"]
        self._guard.consecutive = counts["consecutive_bad"]


def _trained_dtype(module: nn.Module) -> torch.dtype:
    dtypes = {p.dtype for p in module.parameters() if p.requires_grad}
    if len(dtypes) > 1:
        raise UserError(
            f"trainable parameters have several dtypes {sorted(map(str, dtypes))}; convert them "
            "to one"
        )
    return dtypes.pop() if dtypes else torch.float32


def load_deepspeed() -> Any:
    """The package, which announces itself at import and at each engine unless told otherwise.
    Importing it takes seconds.
    """
    debug = logging.getLogger("hybrid_engine").isEnabledFor(logging.DEBUG)
    os.environ.setdefault("DS_LOG_LEVEL", "info" if debug else "error")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.INFO if debug else logging.ERROR)
    return deepspeed


def _initialise_deepspeed(
    module: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]
) -> Any:
    deepspeed = load_deepspeed()
    # Its shared-memory all-reduce serves tensor-parallel inference only, and compiles for a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed's spelling of torch's collectives, nothing that a user could change.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=config, dist_init_required=False
    )
    if not hasattr(engine, "managed_gradient_accumulation"):
        raise UserError(
            f"DeepSpeed {deepspeed.__version__} cannot leave the accumulation boundary to the "
            "training "
            "loop; install 0.19.8 or later"
        )
    return engine
