"""Orthonormal R without a d x d matrix: a retraction after each optimizer step, a tangent gradient.

The parameter is R itself. After a step of its optimizer it is orthonormalised in place, all layers
in one batch, so that a forward uses it as it is, however many forwards a step has.

Where R is spread over processes (`fully_shard`), each has whole groups of it and orthonormalises
those: nothing is sent. A step of DeepSpeed's changes copies of the parameters, which follow.

Shapes: R and A are (..., r, d), r <= d.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

STEP_LENGTH = 2.0
"""How far R moves, in units of the step that an optimizer takes with its parameter.

torch's Householder parametrization moves R twice as far as its vectors (a reflector is
I - 2 v v^T), and the learning rates of the paper and of pyreft were tuned for that.
"""

_optimizer_steps = [0]  # of all optimizers


def orthonormalise(A: Tensor) -> Tensor:
    """Return the Gram-Schmidt orthonormal rows of `A` (..., r, d), r <= d.

    Passes of Cholesky on the r x r Gram matrix, the first one shifted: rows are orthonormal to
    rounding up to a condition of `A` of about 1e6. Without the shift a step far too large makes
    R NaN. No d x d tensor is made, nothing is read back from the device. In float64, which neither
    autocast nor TF32 rounds, two passes do; where there is none (MPS), three.
    """
    R = _precise(A)
    eye = torch.eye(R.shape[-2], dtype=R.dtype, device=R.device)
    for shift in (1e-6, 0.0) if R.dtype == torch.float64 else (1e-6, 0.0, 0.0):
        trace = R.square().sum(dim=(-2, -1), keepdim=True)
        L, _ = torch.linalg.cholesky_ex(R @ R.mT + shift * trace * eye)
        R = torch.linalg.solve_triangular(L, R, upper=False)
    return R.to(A.dtype)


def is_orthonormal(R: Tensor) -> bool:
    """Return whether rows are orthonormal as far as their dtype can tell, or to 1e-5."""
    gram = _precise(R) @ _precise(R).mT
    gram.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    return bool((gram.abs() < max(1e-5, 4 * torch.finfo(R.dtype).eps)).all())


def _precise(A: Tensor) -> Tensor:
    return A.float() if A.device.type == "mps" else A.double()


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
    version; and where an optimizer steps copies of the parameters that we do not know of, every
    step counts. DeepSpeed's copies we know: they are what is retracted, and it copies them back.
    """

    def __init__(self) -> None:
        self._stamp: tuple[int, int] | None = None
        self._steps = -1
        self._is_stepped_itself = False
        self._is_sharded = False
        self._before: Tensor | None = None

    def settle(self, R: Tensor) -> None:
        """Note that R is orthonormal as it is now."""
        self._stamp, self._steps = _stamp_of(R), _optimizer_steps[0]
        self._is_sharded |= isinstance(R, DTensor)

    def begin_step(self, R: Tensor) -> None:
        """Keep R as it is before an optimizer's step."""
        self._is_sharded |= isinstance(R, DTensor)
        self._before = stepped(R).clone()

    def is_due(self, R: Tensor) -> bool:
        """Return whether R has to be orthonormalised before it is used."""
        if _stamp_of(R) is None or (self._is_sharded and not isinstance(R, DTensor)):
            return False  # of a sharded R, a forward sees a copy: made of shards that are settled
        if is_copied(R):
            return False
        unseen = not self._is_stepped_itself and self._steps != _optimizer_steps[0]
        return not self.is_settled(R) or (R.requires_grad and unseen)

    def look(self, R: Tensor) -> None:
        """Notice by its values that R was changed, where they are all here."""
        if not (R.is_meta or R.is_inference() or isinstance(R, DTensor) or is_copied(R)):
            self._stamp = self._stamp if is_orthonormal(R.detach()) else None

    def is_settled(self, R: Tensor) -> bool:
        """Return whether R is the tensor, of the version, that was orthonormal."""
        return _stamp_of(R) == self._stamp

    def end_step(self, R: Tensor) -> Tensor:
        """Return where an optimizer's step leads: `STEP_LENGTH` times as far as R went."""
        self._is_stepped_itself = True
        before, self._before = self._before, None
        if before is None:  # a step within a step, of an optimizer that wraps another
            return stepped(R)
        return before + STEP_LENGTH * (stepped(R) - before)


_homes: WeakKeyDictionary[nn.Module, Tracker] = WeakKeyDictionary()


def watch(module: nn.Module, tracker: Tracker) -> None:
    """Let the hooks on optimizers know a module whose parameter `R` is orthonormal.

    The module and not the parameter: sharding and loading put another one in its place.
    """
    _homes[module] = tracker


@torch.no_grad()
def rows_of(R: Tensor) -> Tensor:
    """Return what this process has of R: all, or of a sharded R whole groups (perhaps none).

    An R that is cut otherwise is gathered.
    """
    if not isinstance(R, DTensor):
        return R.detach()
    whole = all(p == Shard(0) or p == Replicate() for p in R.placements)
    return (R.to_local() if whole else R.full_tensor()).detach()


def is_copied(R: Tensor) -> bool:
    """Return whether DeepSpeed's optimizer steps a float32 copy of R, which it may have cut up.

    Its names: `ds_id` of a parameter under ZeRO-3, `_hp_mapping` under ZeRO-1 and 2.
    """
    return hasattr(R, "ds_id") or hasattr(R, "_hp_mapping")


def stepped(R: Tensor) -> Tensor:
    """Return what an optimizer steps of R, here; DeepSpeed's processes all have to ask for it."""
    if not is_copied(R):
        return rows_of(R)
    from deepspeed.utils import safe_get_full_fp32_param

    value: Tensor = safe_get_full_fp32_param(R)
    return value.detach()


@torch.no_grad()
def retract_all(moved: Sequence[tuple[Tensor, Tensor, Tracker]]) -> None:
    """Set each R, in place and batched, to the orthonormal rows of where it moved.

    `moved` are triples (R, where its rows here moved, the tracker of R). Weight decay only scales
    R, which this undoes: it can neither destroy R nor turn it.
    """
    batches: dict[tuple[Any, ...], list[tuple[Tensor, Tensor, Tracker]]] = {}
    for R, target, tracker in moved:
        batches.setdefault((target.shape, R.device, R.dtype), []).append((R, target, tracker))
    for batch in batches.values():
        values = orthonormalise(torch.stack([target for _, target, _ in batch]))
        for (R, _, tracker), value in zip(batch, values, strict=True):
            # What did not change may belong to a graph whose backward is to come: not a new version
            _set_rows(R, value, keep_version=tracker.is_settled(R))
            tracker.settle(R)


def _set_rows(R: Tensor, value: Tensor, keep_version: bool) -> None:
    if is_copied(R):
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(R, value)
        return
    here = rows_of(R)
    if not isinstance(R, DTensor):
        (R.data if keep_version else R).copy_(value)
    elif here.shape == R.to_local().shape:
        R.to_local().copy_(value)
    else:
        spread = distribute_tensor(value, R.device_mesh, R.placements, src_data_rank=None)
        R.to_local().copy_(spread.to_local())


def _stamp_of(R: Tensor) -> tuple[int, int] | None:
    if R.is_meta or R.is_inference():
        return None
    return (R._version, id(R))


def _watched(optimizer: Optimizer) -> list[tuple[Tensor, Tracker]]:
    # get: DeepSpeed's `_parameters` gather what is asked for by []
    homes = [(module._parameters.get("R"), tracker) for module, tracker in _homes.items()]
    if not homes:
        return []
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [
        (R, tracker)
        for R, tracker in homes
        if R is not None and (id(R) in own or (is_copied(R) and R.requires_grad))
    ]


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if isinstance(getattr(optimizer, "optim", None), Optimizer):
        # ZeroRedundancyOptimizer: the one inside steps what this process owns, and after it the
        # others' parameters come as their steps have left them, twice as far already.
        return
    for R, tracker in _watched(optimizer):
        tracker.begin_step(R)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    _optimizer_steps[0] += 1
    retract_all([(R, tracker.end_step(R), tracker) for R, tracker in _watched(optimizer)])


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
