"""Orthonormal R without a d x d matrix: a retraction after each optimizer step, a tangent gradient.

The parameter is R itself. After a step it is orthonormalised in place (`Tracker` knows when), so
that a forward uses it as it is, however many forwards a step has.

Shapes: R and A are (..., r, d), r <= d.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

STEP_LENGTH = 2.0
"""How far R moves, in units of the step that an optimizer takes with its parameter.

torch's Householder parametrization moves R twice as far as its vectors (a reflector is
I - 2 v v^T), and the learning rates of the paper and of pyreft were tuned for that.
"""

_STEPPED = "reft_stepped"
_optimizer_steps = [0]  # of all optimizers, for parameters that were replaced and lost their mark


def orthonormalise(A: Tensor) -> Tensor:
    """Return the Gram-Schmidt orthonormal rows of `A` (..., r, d), r <= d, in float32 or wider.

    Three passes of Cholesky on the r x r Gram matrix, the first one shifted: rows are orthonormal
    to rounding up to a condition of `A` of about 1e6. Without the shift a step far too large makes
    R NaN. No d x d tensor is made, nothing is read back from the device.
    """
    R = A if A.dtype == torch.float64 else A.float()
    eye = torch.eye(R.shape[-2], dtype=R.dtype, device=R.device)
    for shift in (1e-6, 0.0, 0.0):
        gram = R @ R.mT
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        L, _ = torch.linalg.cholesky_ex(gram + shift * trace * eye)
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

    A change counts up a tensor's version. A fused optimizer (the Trainer's default) changes a
    parameter without doing so; a hook on all optimizers marks the parameters that they step.
    """

    def __init__(self) -> None:
        self._stamp: tuple[int, int] | None = None
        self._steps = -1
        self._before: Tensor | None = None

    def settle(self, R: Tensor) -> None:
        """Note that R is orthonormal as it is now."""
        self._stamp, self._steps = _stamp_of(R), _optimizer_steps[0]
        vars(R)[_STEPPED] = False
        self._before = R.detach().clone() if R.requires_grad and not R.is_meta else None

    def forget(self) -> None:
        """Note that the next change of R is no step from what it was: a load."""
        self._before = None

    def is_due(self, R: Tensor) -> bool:
        """Return whether R has to be orthonormalised before it is used."""
        stamp = _stamp_of(R)
        if stamp is None:
            return False
        return stamp != self._stamp or (R.requires_grad and self._stepped(R))

    def moved(self, R: Tensor) -> Tensor:
        """Return where the last step leads: `STEP_LENGTH` times as far as the parameter went."""
        if self._before is None or not vars(R).get(_STEPPED, False):
            return R.detach()
        before = self._before.to(R.device)
        return before + STEP_LENGTH * (R.detach() - before)

    def _stepped(self, R: Tensor) -> bool:
        marked: bool | None = vars(R).get(_STEPPED)
        return self._steps != _optimizer_steps[0] if marked is None else marked


def _stamp_of(R: Tensor) -> tuple[int, int] | None:
    if R.is_meta or R.is_inference():
        return None
    return (R._version, id(R))


def _mark_stepped(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    _optimizer_steps[0] += 1
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if _STEPPED in vars(parameter):
                vars(parameter)[_STEPPED] = True


register_optimizer_step_post_hook(_mark_stepped)
