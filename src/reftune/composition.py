"""Several adapters as one: the tensors of an adapter whose edit is a weighted sum of others' edits.

Without an activation, every low-rank method's edit is affine in the hidden state,
`edit(h) = R^T (A h + c)`:

    loreft, noreft               A = W - R    c = b
    direft, direft_orthonormal   A = W        c = b
    consreft                     A = -R       c = b
    lobireft                     A = 0        c = b

so a weighted sum of edits is, too. With `[R_1^T ... R_n^T] = Q T` (QR) and the `w_i [A_i c_i]`
stacked to `[A c]` it is `Q T (A h + c)`: the edit of a LoReFT with R = Q^T, W = T A + R, b = T c.

    cat      that LoReFT: exact, its rank is the sum of the ranks. With an activation (DiReFT only)
             it is a DiReFT of the stacked tensors, each R weighted.
    svd      the LoReFT of rank `svd_rank` whose [A c] is nearest to that one's: largest singular
             values first.
    linear   for adapters that share R at every layer (RED, which has none: always): exact, of the
             same method and rank.

Shapes: G groups, n rows, r rank, d hidden size; R, A, W (G, r, d); c, bias (G, r).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from reftune.config import ReftConfig
from reftune.errors import ReftConfigError, did_you_mean
from reftune.layer import ReftLayer

CombinationType = Literal["cat", "svd", "linear"]

_SAME_R = 1e-5
_SUBTRACTS_R = ("loreft", "noreft", "consreft")
_HAS_W = ("loreft", "noreft", "direft", "direft_orthonormal")
_TOGETHER = (
    " They can act together as they are: activate them with model.base_model.set_adapter([...]), "
    "weigh them with reftune.set_strength, and see reftune.set_composition."
)
# In what adapters must agree to be one.
_COMMON = (
    *("positions", "tied", "short_prompts", "edit_generated", "dtype", "target_modules"),
    *("layers_path", "hidden_size"),
)


@dataclass(frozen=True)
class Member:
    """An adapter that is combined, and how much its edit counts."""

    name: str
    config: ReftConfig
    weight: float

    @property
    def rank(self) -> int:
        """Return r, 0 where the method has none."""
        return self.config.r or 0


Part: TypeAlias = tuple[Member, dict[str, Tensor]]  # a member's tensors at a layer, in float64
Parts: TypeAlias = Mapping[str, list[Part]]  # those of each layer
Build: TypeAlias = Callable[[list[Part]], dict[str, Tensor]]


def combine(
    layers: Mapping[str, ReftLayer],
    configs: Mapping[str, ReftConfig],
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: CombinationType,
    svd_rank: int | None = None,
) -> tuple[ReftConfig, dict[str, dict[str, Tensor]]]:
    """Return the config of a combined adapter, and its tensors at each layer that it edits.

    An adapter that does not edit a layer adds nothing there. Raises ReftConfigError where the
    adapters cannot be one.
    """
    _check_names(configs, adapters, weights, adapter_name)
    accepted = list(get_args(CombinationType))
    if combination_type not in accepted:
        raise ReftConfigError(
            f"combination_type is {combination_type!r}; accepted are {', '.join(accepted)}."
            + did_you_mean(str(combination_type), accepted)
        )
    if svd_rank is not None and combination_type != "svd":
        raise ReftConfigError(f"svd_rank is for combination_type='svd', not {combination_type!r}.")
    members = [Member(n, configs[n], float(w)) for n, w in zip(adapters, weights, strict=True)]
    _check_common(members)
    parts = {
        name: [(m, _tensors(layer, m.name)) for m in members if m.name in layer.configs]
        for name, layer in layers.items()
    }
    parts = {name: found for name, found in parts.items() if found}
    if combination_type == "linear":
        config, build = _linear(members, parts)
    else:
        config, build = _stacked(members, parts, combination_type, svd_rank)
    dtype: torch.dtype = getattr(torch, config.dtype)
    tensors = {
        name: {key: t.to(dtype) for key, t in build(found).items()} for name, found in parts.items()
    }
    return config, tensors


def _stacked(
    members: list[Member], parts: Parts, how: CombinationType, svd_rank: int | None
) -> tuple[ReftConfig, Build]:
    total = sum(m.rank for m in members)
    activations = {m.config.act_fn for m in members}
    if activations - {None, "linear"}:
        direct = all(m.config.method.startswith("direft") for m in members)
        if how != "cat" or not direct or len(activations) > 1:
            raise ReftConfigError(
                f"With an activation the edits of {_listed(members)} do not add up to one adapter's"
                "; only DiReFTs with the same one do, by combination_type='cat'." + _TOGETHER
            )
        return _config(members, "direft", total), lambda found: _side_by_side(found, total)
    for m in members:
        if m.config.method in ("red", "reft_r1"):
            hint = " REDs combine by combination_type='linear'." if m.config.method == "red" else ""
            raise ReftConfigError(
                f"{m.name!r} is a {m.config.method}: its edit is not R^T (A h + c), so "
                f"combination_type={how!r} does not apply.{hint}" + _TOGETHER
            )
    rank = total if how == "cat" else svd_rank or max(m.rank for m in members)
    if not 1 <= rank <= total:
        raise ReftConfigError(f"svd_rank is {rank}; accepted is 1 to the sum of ranks, {total}.")
    width = min(t["R"].shape[-1] for found in parts.values() for _, t in found)
    if rank > width:
        raise ReftConfigError(
            f"A rank of {rank} is more than the width of the hidden states, {width}. Use "
            "combination_type='svd' with a smaller svd_rank."
        )
    return _config(members, "loreft", rank), lambda found: _as_loreft(found, rank, total)


def _as_loreft(found: list[Part], rank: int, total: int) -> dict[str, Tensor]:
    """Return the LoReFT of a rank that is nearest to the sum of the edits; `total`: it is equal."""
    R = torch.cat([t["R"] for _, t in found], dim=-2)
    Ac = torch.cat([m.weight * _affine(m, t) for m, t in found], dim=-2)
    missing = max(rank, min(total, R.shape[-1])) - R.shape[-2]
    if missing > 0:  # of adapters that do not edit this layer: rows of R that add nothing
        R, Ac = (torch.nn.functional.pad(t, (0, 0, 0, missing)) for t in (R, Ac))
    Q, T = torch.linalg.qr(R.mT)
    TAc = T @ Ac
    if rank < Q.shape[-1]:
        U, S, Vh = torch.linalg.svd(TAc, full_matrices=False)
        Q, TAc = Q @ U[..., :rank], S[..., :rank, None] * Vh[..., :rank, :]
    return {"R": Q.mT.contiguous(), "W": TAc[..., :-1] + Q.mT, "bias": TAc[..., -1].contiguous()}


def _affine(member: Member, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return [A c] (G, r, d + 1) of an edit R^T (A h + c)."""
    R, method = tensors["R"], member.config.method
    A = tensors["W"] if method in _HAS_W else torch.zeros_like(R)
    if method in _SUBTRACTS_R:
        A = A - R
    return torch.cat([A, tensors["bias"].unsqueeze(-1)], dim=-1)


def _side_by_side(found: list[Part], total: int) -> dict[str, Tensor]:
    """Return the stacked tensors of DiReFTs, R weighted and filled up with zeros."""
    R = torch.cat([m.weight * t["R"] for m, t in found], dim=-2)
    W = torch.cat([t["W"] for _, t in found], dim=-2)
    bias = torch.cat([t["bias"] for _, t in found], dim=-1)
    missing = total - R.shape[-2]
    pad = torch.nn.functional.pad
    return {
        "R": pad(R, (0, 0, 0, missing)),
        "W": pad(W, (0, 0, 0, missing)),
        "bias": pad(bias, (0, missing)),
    }


def _linear(members: list[Member], parts: Parts) -> tuple[ReftConfig, Build]:
    method = members[0].config.method
    if any(m.config.method != method for m in members):
        raise ReftConfigError(
            f"combination_type='linear' is for adapters of one method, not for {_listed(members)}. "
            "'cat' combines methods."
        )
    if method == "reft_r1" or {m.config.act_fn for m in members} - {None, "linear"}:
        raise ReftConfigError(
            f"The edits of {_listed(members)} are not linear in their tensors, so they have no "
            "combination of type 'linear'." + _TOGETHER
        )
    if method == "red":
        return _config(members, method, None), _sum_of_red
    if len({m.rank for m in members}) > 1 or not all(map(_share_R, parts.values())):
        raise ReftConfigError(
            f"combination_type='linear' is for adapters with the same R at every layer; those of "
            f"{', '.join(m.name for m in members)} differ. 'cat' is exact for any R."
        )
    sums = {round(sum(m.weight for m, _ in found), 6) for found in parts.values()}
    if method == "consreft" and sums != {1.0}:
        raise ReftConfigError(
            "The weights of consreft adapters must add up to 1 at every layer that they edit: each "
            f"removes R h, and one adapter removes it once. They add up to {sorted(sums)}. 'cat' "
            "is exact for any weights."
        )
    return _config(members, method, members[0].rank), _sum_in_one_R


def _sum_of_red(found: list[Part]) -> dict[str, Tensor]:
    scale = 1 + torch.stack([m.weight * (t["scale"] - 1) for m, t in found]).sum(0)
    return {"scale": scale, "bias": torch.stack([m.weight * t["bias"] for m, t in found]).sum(0)}


def _sum_in_one_R(found: list[Part]) -> dict[str, Tensor]:
    """Return R^T ((sum w W + (1 - sum w) R) h + sum w b - R h), or what of it the method has."""
    method, R = found[0][0].config.method, found[0][1]["R"]
    tensors = {"R": R, "bias": torch.stack([m.weight * t["bias"] for m, t in found]).sum(0)}
    if method in _HAS_W:
        W = torch.stack([m.weight * t["W"] for m, t in found]).sum(0)
        rest = 1 - sum(m.weight for m, _ in found) if method in _SUBTRACTS_R else 0.0
        tensors["W"] = W + rest * R
    return tensors


def _share_R(found: list[Part]) -> bool:
    first = found[0][1]["R"]
    return all(torch.allclose(t["R"], first, rtol=0.0, atol=_SAME_R) for _, t in found)


def _config(members: list[Member], method: str, rank: int | None) -> ReftConfig:
    """Return the first member's config for the combined adapter."""
    layers: str | list[int] = "all"
    if not any(m.config.layers == "all" for m in members):
        layers = sorted({int(i) for m in members for i in m.config.layers})
    act_fn = members[0].config.act_fn if method.startswith("direft") else None
    keeps_rows = method == members[0].config.method and rank == members[0].config.r
    subspaces = members[0].config.subspaces if keeps_rows and _same_subspaces(members) else None
    return dataclasses.replace(
        members[0].config,
        method=method,
        r=rank,
        layers=layers,
        act_fn=act_fn,
        subspaces=subspaces,
        init="paper",
    )


def _same_subspaces(members: list[Member]) -> bool:
    """Return whether the rows of R mean the same in all members, and R is theirs."""
    return all(m.config.subspaces == members[0].config.subspaces for m in members)


def _tensors(layer: ReftLayer, adapter_name: str) -> dict[str, Tensor]:
    return {
        key: p.detach().to(device="cpu", dtype=torch.float64)
        for key, p in layer.phi(adapter_name).named_parameters()
    }


def _check_names(
    configs: Mapping[str, ReftConfig],
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
) -> None:
    known = sorted(name for name, config in configs.items() if isinstance(config, ReftConfig))
    for name in adapters:
        if name not in known:
            raise ReftConfigError(
                f"There is no ReFT adapter {name!r}; loaded are {known}."
                + did_you_mean(name, known)
            )
    if not adapters or len(set(adapters)) != len(adapters) or len(weights) != len(adapters):
        raise ReftConfigError(
            f"adapters are {list(adapters)} and weights {list(weights)}; accepted are different "
            "adapters, at least one, and a weight for each."
        )
    if adapter_name in configs:
        raise ReftConfigError(f"There is an adapter {adapter_name!r} already; delete it first.")


def _check_common(members: list[Member]) -> None:
    first = members[0]
    for m in members:
        if m.config.modules_to_save:
            raise ReftConfigError(
                f"{m.name!r} has trained {m.config.modules_to_save} in full "
                "(modules_to_save), which is no edit and cannot be added up."
            )
        for key in _COMMON:
            a, b = getattr(first.config, key), getattr(m.config, key)
            if key == "positions":
                a, b = first.config.parsed_positions, m.config.parsed_positions
            if a != b:
                raise ReftConfigError(
                    f"{first.name!r} and {m.name!r} differ in {key} "
                    f"({getattr(first.config, key)!r} and {getattr(m.config, key)!r}); one adapter "
                    "has one." + _TOGETHER
                )


def _listed(members: list[Member]) -> str:
    return ", ".join(
        f"{m.name} ({m.config.method}{f', {m.config.act_fn}' if m.config.act_fn else ''})"
        for m in members
    )
