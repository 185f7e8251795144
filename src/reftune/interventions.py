"""The formulas of representation finetuning, each written once.

An intervention maps hidden states to the *edit* that is added to them, `Phi(h) = h + edit(h)`.
Training, `generate`, batches of mixed adapters and servers all call the same `forward`.

Shape suffixes: B example, N token (the edited tokens of one example), d hidden size, r rank,
G group (one Phi each: see `ReftConfig.tied`). `...` are leading batch dimensions: the same formula
serves one adapter (none), one Phi per token (G) and a different adapter per example (B).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from reftune.errors import ReftConfigError
from reftune.orthonormal import OnStiefel, Tracker, is_orthonormal, retract_all, rows_of, watch

Tensors = Mapping[str, Tensor]

SUBSPACE_MASK = "subspace_mask"


@dataclass(frozen=True)
class Shape:
    """What determines an intervention's parameters: sizes, activation and initialisation."""

    hidden_size: int
    rank: int
    groups: int = 1
    act_fn: str | None = None
    topk: int = 8
    init: str = "paper"


class Intervention(nn.Module, ABC):
    """The parameters and the formula of one method at one layer, for G groups of positions.

    A subclass names its parameters in `reset_parameters` and computes the edit in `forward`.
    Where a class says `orthonormal`, its parameter `R` (G, r, d) has orthonormal rows.
    """

    method: ClassVar[str]
    orthonormal: ClassVar[bool] = False
    has_rank: ClassVar[bool] = True
    fixed_rank: ClassVar[int | None] = None
    has_activation: ClassVar[bool] = False
    pools_tokens: ClassVar[bool] = False

    def __init__(self, shape: Shape, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.shape = shape
        self.act = _activation(shape.act_fn)
        self.tracker = Tracker()
        for name, value in self.initial().items():
            self.register_parameter(name, nn.Parameter(value.to(dtype)))
        if self.orthonormal:
            self.tracker.settle(self.raw_R())
            watch(self, self.tracker)

    @abstractmethod
    def initial(self) -> dict[str, Tensor]:
        """Return fresh float32 parameters by name, each with a leading group dimension G."""

    @abstractmethod
    def forward(self, h: Tensor, tensors: Tensors, valid: Tensor) -> Tensor:
        """Return the edit of `h` (..., N, d), with parameters whose leading dimensions broadcast.

        `valid` (..., N) is False for slots that hold no token; only methods that pool over the
        tokens of an example need it. The caller masks the edit of those slots.
        """

    def tensors(self) -> dict[str, Tensor]:
        """Return the parameters that `forward` takes, R on its manifold."""
        own = self._parameters  # asked by [], for which DeepSpeed's ZeRO-3 gathers a parameter
        tensors: dict[str, Any] = {name: own[name] for name, p in own.items() if p is not None}
        if self.orthonormal and torch.is_grad_enabled() and tensors["R"].requires_grad:
            # Of FSDP1's flat parameter R is a view: it is orthonormalised inside the graph.
            tensors["R"] = OnStiefel.apply(tensors["R"], self.is_view)  # type: ignore[no-untyped-call]
        return tensors

    def raw_R(self) -> Tensor:
        """Return R as it is stored: a plain tensor while FSDP runs the model's forward."""
        R: Tensor | None = self._parameters.get("R")
        assert R is not None
        return R

    @property
    def is_view(self) -> bool:
        """Return whether R is a view of another parameter, as while FSDP runs the forward."""
        return not isinstance(self.raw_R(), nn.Parameter)

    @property
    def needs_retraction(self) -> bool:
        """Return whether R has to be orthonormalised before it is used."""
        return self.orthonormal and not self.is_view and self.tracker.is_due(self.raw_R())

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self.orthonormal and not self.raw_R().is_meta:
            if is_orthonormal(rows_of(self.raw_R())):  # used as it is, to compute what was saved
                self.tracker.settle(self.raw_R())
            else:
                retract_all([(self.raw_R(), rows_of(self.raw_R()), self.tracker)])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.orthonormal:
            watch(self, self.tracker)

    def extra_repr(self) -> str:
        s = self.shape
        rank = f", rank={s.rank}" if self.has_rank else ""
        return f"{self.method}, hidden_size={s.hidden_size}{rank}, groups={s.groups}"


def retract(interventions: Sequence[Intervention]) -> int:
    """Orthonormalise, in place and batched, every R that was changed by other than an optimizer.

    Returns how many were.
    """
    due = [phi for phi in interventions if phi.needs_retraction]
    retract_all([(phi.raw_R(), rows_of(phi.raw_R()), phi.tracker) for phi in due])
    return len(due)


class _LowRank(Intervention):
    """What the methods share that write into the span of R."""

    def _subspace(self, z: Tensor, tensors: Tensors) -> Tensor:
        mask = tensors.get(SUBSPACE_MASK)
        return z if mask is None else z * mask

    def _affine(self, h: Tensor, tensors: Tensors) -> Tensor:
        z: Tensor = self.act(h @ tensors["W"].mT + tensors["bias"].unsqueeze(-2))
        return z

    def _random_R(self) -> Tensor:
        s = self.shape
        if not self.orthonormal:
            return _linear_weight(s)
        rows = [_orthogonal(s.rank, s.hidden_size) for _ in range(s.groups)]
        return torch.stack(rows)


class _Difference(_LowRank):
    """h + R^T (act(W h + b) - R h)."""

    has_activation = True

    def initial(self) -> dict[str, Tensor]:
        R = self._random_R()
        if self.shape.init == "noop":
            if self.shape.act_fn is not None:
                raise ReftConfigError(_no_noop(self.method, "with an activation function"))
            return {"R": R, "W": R.clone(), "bias": R.new_zeros(R.shape[:2])}
        return {"R": R, "W": _linear_weight(self.shape), "bias": _linear_bias(self.shape)}

    def forward(self, h: Tensor, tensors: Tensors, valid: Tensor) -> Tensor:
        R = tensors["R"]
        z = self._affine(h, tensors) - h @ R.mT
        return self._subspace(z, tensors) @ R


@final
class LoReft(_Difference):
    """LoReFT: h + R^T (W h + b - R h), R with orthonormal rows (Wu et al. 2024, eq. 2)."""

    method = "loreft"
    orthonormal = True


@final
class NoReft(_Difference):
    """NoReFT: h + R^T (W h + b - R h), R unconstrained (Wu et al. 2024, appendix: W_2 = R)."""

    method = "noreft"


class _Direct(_LowRank):
    """h + R^T act(W h + b)."""

    has_activation = True

    def initial(self) -> dict[str, Tensor]:
        R = self._random_R()
        if self.shape.init == "noop":
            if self.act(torch.zeros(1)).item() != 0.0:
                raise ReftConfigError(_no_noop(self.method, f"as {self.shape.act_fn}(0) is not 0"))
            return {"R": R, "W": torch.zeros_like(R), "bias": R.new_zeros(R.shape[:2])}
        return {"R": R, "W": _linear_weight(self.shape), "bias": _linear_bias(self.shape)}

    def forward(self, h: Tensor, tensors: Tensors, valid: Tensor) -> Tensor:
        return self._subspace(self._affine(h, tensors), tensors) @ tensors["R"]


@final
class DiReft(_Direct):
    """DiReFT: h + W_2^T (W_1 h + b), unconstrained (Wu et al. 2024, eq. 3; W_1 = W, W_2 = R)."""

    method = "direft"


@final
class DiReftOrthonormal(_Direct):
    """h + R^T (W h + b) with orthonormal R: what the paper's code calls DireftIntervention."""

    method = "direft_orthonormal"
    orthonormal = True


@final
class ConsReft(_LowRank):
    """ConsReFT: h + R^T (b - R h), a constant in the span of R (Wu et al. 2024, table 17)."""

    method = "consreft"
    orthonormal = True

    def initial(self) -> dict[str, Tensor]:
        if self.shape.init == "noop":
            raise ReftConfigError(_no_noop(self.method, "as it always removes R h"))
        return {"R": self._random_R(), "bias": torch.rand(self.shape.groups, self.shape.rank)}

    def forward(self, h: Tensor, tensors: Tensors, valid: Tensor) -> Tensor:
        R = tensors["R"]
        z = tensors["bias"].unsqueeze(-2) - h @ R.mT
        return self._subspace(z, tensors) @ R


@final
class LobiReft(_LowRank):
    """LobiReFT: h + R^T b, a bias in the span of R (Wu et al. 2024, table 17)."""

    method = "lobireft"
    orthonormal = True

    def initial(self) -> dict[str, Tensor]:
        bias = torch.rand(self.shape.groups, self.shape.rank)
        noop = self.shape.init == "noop"
        return {"R": self._random_R(), "bias": torch.zeros_like(bias) if noop else bias}

    def forward(self, h: Tensor, tensors: Tensors, valid: Tensor) -> Tensor:
        z = self._subspace(tensors["bias"].unsqueeze(-2), tensors)
        return (z @ tensors["R"]).expand_as(h)


@final
class Red(Intervention):
    """RED: s * h + b (Wu et al. 2024, appendix B; arXiv 2402.15179). Starts as the identity."""

    method = "red"
    has_rank = False

    def initial(self) -> dict[str, Tensor]:
        size = (self.shape.groups, self.shape.hidden_size)
        return {"scale": torch.ones(size), "bias": torch.zeros(size)}

    def forward(self, h: Tensor, tensors: Tensors, valid: Tensor) -> Tensor:
        scale, bias = (tensors[name].unsqueeze(-2) for name in ("scale", "bias"))
        return h * (scale - 1) + bias


@final
class ReftR1(Intervention):
    """ReFT-r1: h + (1/k) sum(TopK_k(ReLU(h R^T))) R with one unit row R (arXiv 2501.17148, eq. 8).

    The k largest latents are taken over the edited tokens of an example (of one forward).
    """

    method = "reft_r1"
    orthonormal = True
    fixed_rank = 1
    pools_tokens = True

    def initial(self) -> dict[str, Tensor]:
        if self.shape.init == "noop":
            raise ReftConfigError(_no_noop(self.method, "as its direction has unit length"))
        s = self.shape
        return {"R": torch.stack([_orthogonal(1, s.hidden_size) for _ in range(s.groups)])}

    def forward(self, h: Tensor, tensors: Tensors, valid: Tensor) -> Tensor:
        R = tensors["R"]
        latent = torch.relu((h @ R.mT).squeeze(-1)) * valid
        largest = latent.topk(min(self.shape.topk, latent.shape[-1]), dim=-1).values
        # Slots without a token count for nothing: padding does not change the mean.
        strength = largest.sum(-1) / valid.sum(-1).clamp(min=1, max=self.shape.topk)
        return (strength[..., None, None] * R).expand_as(h)


METHODS: Mapping[str, type[Intervention]] = {
    cls.method: cls
    for cls in (LoReft, NoReft, DiReft, DiReftOrthonormal, ConsReft, LobiReft, Red, ReftR1)
}


def apply_grouped(
    phi: Intervention,
    h_BNd: Tensor,
    tensors: Tensors,
    valid_BN: Tensor,
    *,
    split: int,
    per_slot: bool,
    per_example: bool = False,
) -> Tensor:
    """Return the edit (B, N, d) of gathered rows, each slot by the Phi of its group.

    `tensors` have shape (G, ...), or (B, G, ...) where `per_example`. G = 1: one Phi. `per_slot`:
    slot i has Phi i. Else the slots before `split` have Phi 0 and the others Phi 1. A subspace mask
    has shape (G, 1, r), or (G, B, 1, r) for one per example, or (B, G, 1, r).
    """
    axis = 1 if per_example else 0
    if next(iter(tensors.values())).shape[axis] == 1:
        (only,) = _by_group(tensors, axis)
        return _edit(phi, h_BNd, only, valid_BN)
    if not per_slot:
        sizes = [split, h_BNd.shape[1] - split]
        hs, valids = (torch.split(t, sizes, dim=1) for t in (h_BNd, valid_BN))
        sides = zip(hs, _by_group(tensors, axis), valids, strict=True)
        return torch.cat([_edit(phi, *side) for side in sides], dim=1)
    if per_example:
        return _edit(phi, h_BNd.unsqueeze(-2), tensors, valid_BN.unsqueeze(-1)).squeeze(-2)
    mask = tensors.get(SUBSPACE_MASK)
    if mask is not None and mask.dim() == 4:  # (G, B, 1, r): here the examples are the tokens
        tensors = {**tensors, SUBSPACE_MASK: mask.squeeze(-2)}
    return _edit(phi, h_BNd.transpose(0, 1), tensors, valid_BN.T).transpose(0, 1)


def apply_dense(
    phi: Intervention,
    h_BSd: Tensor,
    tensors: Tensors,
    masks: Sequence[Tensor],
    *,
    per_example: bool = False,
) -> Tensor:
    """Return the edit (B, S, d) of every token by the Phi of the group whose mask (B, S) has it.

    `tensors` have shape (G, ...), or (B, G, ...) where `per_example`. Outside the masks it is zero.
    """
    edit = torch.zeros_like(h_BSd)
    for one, mask in zip(_by_group(tensors, 1 if per_example else 0), masks, strict=True):
        edit = torch.where(mask[..., None], _edit(phi, h_BSd, one, mask), edit)
    return edit


def _by_group(tensors: Tensors, axis: int) -> list[dict[str, Tensor]]:
    """Return the parameters of each group."""
    # Not select: its backward fills a tensor of all groups with zeros, for each group.
    groups = [[t.squeeze(axis)] if t.shape[axis] == 1 else t.unbind(axis) for t in tensors.values()]
    return [dict(zip(tensors, one, strict=True)) for one in zip(*groups, strict=True)]


def _edit(phi: Intervention, h: Tensor, tensors: Tensors, valid: Tensor) -> Tensor:
    edit: Tensor = phi(h, tensors, valid)
    return edit


def _activation(name: str | None) -> nn.Module:
    if name in (None, "linear"):
        return nn.Identity()
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise ReftConfigError(
            f"act_fn is {name!r}; accepted are None and transformers' {', '.join(sorted(ACT2FN))}."
        )
    activation: nn.Module = ACT2FN[name]
    return activation


def _no_noop(method: str, reason: str) -> str:
    return f"init='noop' is not possible for method={method!r}, {reason}. Use init='paper'."


def _orthogonal(rank: int, hidden_size: int) -> Tensor:
    rows = torch.empty(rank, hidden_size)
    nn.init.orthogonal_(rows)
    return rows


def _linear_weight(shape: Shape) -> Tensor:
    """Return (G, r, d) drawn as torch.nn.Linear(d, r) draws its weight."""
    bound = 1 / math.sqrt(shape.hidden_size)
    return torch.empty(shape.groups, shape.rank, shape.hidden_size).uniform_(-bound, bound)


def _linear_bias(shape: Shape) -> Tensor:
    """Return (G, r) drawn as torch.nn.Linear(d, r) draws its bias."""
    bound = 1 / math.sqrt(shape.hidden_size)
    return torch.empty(shape.groups, shape.rank).uniform_(-bound, bound)
