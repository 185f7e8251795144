"""Orthonormal R without a d x d matrix: a retraction after each optimizer step, a tangent gradient.

The parameter is R itself. After a step of its optimizer it is orthonormalised in place, all layers
in one batch, so that a forward uses it as it is, however many forwards a step has.

Shapes: R and A are (..., r, d), r <= d.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.weak import WeakIdKeyDictionary

STEP_LENGTH = 2.0
"""How far R moves, in units of the step that an optimizer takes with its parameter.

torch's Householder parametrization moves R twice as far as its vectors (a reflector is
I - 2 v v^T), and the learning rates of the paper and of pyreft were tuned for that.
"""

_optimizer_steps = [0]  # of all optimizers


def orthonormalise(A: Tensor) -> Tensor:
    """Return the Gram-Schmidt orthonormal rows of `A` (..., r, d), r <= d, in float32 or wider.

    Three passes of Cholesky on the r x r Gram matrix, the first one shifted: rows are orthonormal
    to rounding up to a condition of `A` of about 1e6. Without the shift a step far too large makes
    R NaN. No d x d tensor is made, nothing is read back from the device.
    """
    R = A if A.dtype == torch.float64 else A.float()
    eye = torch.eye(R.shape[-2], dtype=R.dtype, device=R.device)
    for shift in (1e-6, 0.0, 0.0):
        trace = R.square().sum(dim=(-2, -1), keepdim=True)
        L, _ = torch.linalg.cholesky_ex(R @ R.mT + shift * trace * eye)
        R = torch.linalg.solve_triangular(L, R, upper=False)
    return R.to(A.dtype)


class OnStiefel(torch.autograd.Function):
    """Orthonormal R of a parameter A, with the gradient along the manifold only.

    With A already orthonormal the value is A itself. The gradient G becomes its projection on the
    tangent space of {R: R R^T = I}, `G - sym(G R^T) R`: the gradient of the polar retraction.
    """

    @staticmethod
    def forward(ctx: Any, A: Tensor, retract: bool) -> Tensor:
        R = orthonormalise(A) if retract else A.view_as(A)
        ctx.save_for_backward(R)
        return R

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (R,) = ctx.saved_tensors
        (G,) = grads
        M = G @ R.mT
        return G - (0.5 * (M + M.mT)) @ R, None


@final
class Tracker:
    """Whether a parameter R was changed since it was last orthonormal, and from where.

    An optimizer's step is seen by a hook on all optimizers, which retracts R at once: so it is
    orthonormal after `optimizer.step()`, also for a fused optimizer, which does not count up a
    tensor's version, and for a compiled forward. Other changes, such as a load, are known by the
    version; and where an optimizer steps copies of the parameters (DeepSpeed), every step counts.
    """

    def __init__(self) -> None:
        self._stamp: tuple[int, int] | None = None
        self._steps = -1
        self._is_stepped_itself = False
        self._before: Tensor | None = None

    def settle(self, R: Tensor) -> None:
        """Note that R is orthonormal as it is now."""
        self._stamp, self._steps = _stamp_of(R), _optimizer_steps[0]
        self.watch(R)

    def watch(self, R: Tensor) -> None:
        """Let the hooks on optimizers know R, or the copy of it that an unpickled model has."""
        _trackers[R] = self

    def begin_step(self, R: Tensor) -> None:
        """Keep R as it is before an optimizer's step."""
        self._before = R.detach().clone()

    def is_due(self, R: Tensor) -> bool:
        """Return whether R has to be orthonormalised before it is used."""
        if _stamp_of(R) is None:
            return False
        unseen = not self._is_stepped_itself and self._steps != _optimizer_steps[0]
        return not self.is_settled(R) or (R.requires_grad and unseen)

    def is_settled(self, R: Tensor) -> bool:
        """Return whether R is the tensor, of the version, that was orthonormal."""
        return _stamp_of(R) == self._stamp

    def end_step(self, R: Tensor) -> Tensor:
        """Return where an optimizer's step leads: `STEP_LENGTH` times as far as R went."""
        self._is_stepped_itself = True
        before, self._before = self._before, None
        if before is None:  # a step within a step, of an optimizer that wraps another
            return R.detach()
        return before + STEP_LENGTH * (R.detach() - before)


_trackers: MutableMapping[Tensor, Tracker] = WeakIdKeyDictionary()


@torch.no_grad()
def retract_all(moved: Sequence[tuple[Tensor, Tensor, Tracker]]) -> None:
    """Set each R, in place and batched, to the orthonormal rows of where it moved.

    `moved` are triples (R, where it moved, the tracker of R). Weight decay only scales R, which
    this undoes: it can neither destroy R nor turn it.
    """
    batches: dict[tuple[Any, ...], list[tuple[Tensor, Tensor, Tracker]]] = {}
    for R, target, tracker in moved:
        batches.setdefault((R.shape, R.device, R.dtype), []).append((R, target, tracker))
    for batch in batches.values():
        values = orthonormalise(torch.stack([target for _, target, _ in batch]))
        for (R, _, tracker), value in zip(batch, values, strict=True):
            # What did not change may belong to a graph whose backward is to come: not a new version
            (R.data if tracker.is_settled(R) else R).copy_(value)
            tracker.settle(R)


def _stamp_of(R: Tensor) -> tuple[int, int] | None:
    if R.is_meta or R.is_inference():
        return None
    return (R._version, id(R))


def _watched(optimizer: Optimizer) -> list[tuple[Tensor, Tracker]]:
    if not _trackers:
        return []
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return [(p, _trackers[p]) for p in parameters if p in _trackers]


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for R, tracker in _watched(optimizer):
        tracker.begin_step(R)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    _optimizer_steps[0] += 1
    retract_all([(R, tracker.end_step(R), tracker) for R, tracker in _watched(optimizer)])


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
