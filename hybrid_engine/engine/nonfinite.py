"""Counts skipped steps, and finds out what was not finite before giving up."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hybrid_engine.distributed.collectives import all_gather_json
from hybrid_engine.errors import UserError

_MAX_NAMES = 3


class NonFiniteGuard:
    """Watches losses and gradients of one module.

    A step with a non-finite gradient is skipped on every rank alike (the norm is global). From the
    first skipped step on, gradient hooks note which parameters are to blame; they are gone again
    after a good step, so healthy training pays nothing.
    """

    def __init__(self, module: nn.Module, name: str, max_bad_steps: int) -> None:
        self._module = module
        self._name = name
        self._max_bad_steps = max_bad_steps
        self._losses: list[Tensor] = []
        self._blamed: dict[str, None] = {}
        self._hooks: list[RemovableHandle] = []
        self.consecutive = 0
        self.skipped = 0

    def watch(self, loss: Tensor) -> None:
        """Remember a micro-batch's loss until the end of the step (no device synchronisation)."""
        self._losses.append(loss.detach())

    def good_step(self) -> None:
        self.consecutive = 0
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._clear()

    def bad_step(self, expected: bool = False) -> None:
        """Count a skipped step; every rank calls this in the same step.

        Args:
            expected: the loss scaler of fp16 is searching, which is no fault unless a loss is at
                fault.

        Raises:
            UserError: `max_bad_steps` in a row.
        """
        self.skipped += 1
        bad_losses = [float(loss) for loss in self._losses if not torch.isfinite(loss)]
        reports = all_gather_json({"losses": bad_losses, "gradients": list(self._blamed)})
        self._clear()
        if expected and not any(report["losses"] for report in reports):
            return
        self.consecutive += 1
        if self.consecutive >= self._max_bad_steps:
            raise UserError(self._describe(reports))
        if not self._hooks:
            self._install_hooks()

    def _clear(self) -> None:
        self._losses.clear()
        self._blamed.clear()

    def _install_hooks(self) -> None:
        for name, parameter in self._module.named_parameters():
            if parameter.requires_grad:
                self._hooks.append(
                    parameter.register_hook(lambda grad, n=name: self._blame(n, grad))
                )

    def _blame(self, name: str, grad: Tensor) -> None:
        if not torch.isfinite(grad).all():
            self._blamed[name] = None

    def _describe(self, reports: list[dict[str, list]]) -> str:
        found = []
        for where, report in enumerate(reports):
            if report["losses"]:
                found.append(f"the loss was {report['losses'][0]} on rank {where}")
            elif report["gradients"]:
                names = ", ".join(report["gradients"][:_MAX_NAMES])
                more = len(report["gradients"]) - _MAX_NAMES
                found.append(
                    f"the gradient of {names}{f' and {more} more' if more > 0 else ''} on rank "
                    f"{where}"
                )
        what = "; ".join(found) or "the gradient norm overflowed"
        return (
            f"{self._name}: {self.consecutive} optimizer steps in a row were skipped because a "
            "number was not "
            f"finite ({what}); lower the learning rate, or look for bad rows in the data"
        )
