"""One edited layer: the adapters' interventions at it, and the hook that applies them.

A `ReftLayer` is a child of the layer it edits, named `reft`, and the layer gets a forward hook.
Nothing is wrapped or renamed: the base model's parameter names, attributes and classes stay as they
are, other adapters find their targets, and whatever looks at hidden states sees the edited ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from reftune.config import ReftConfig
from reftune.context import no_autocast
from reftune.errors import MergeError, PositionError, ReftConfigError, ReftuneError
from reftune.interventions import (
    SUBSPACE_MASK,
    Intervention,
    apply_dense,
    apply_grouped,
    retract,
)
from reftune.mixed import edit_mixed
from reftune.positions import SlotKey, on_device
from reftune.spans import Span, current_span

Composition = Literal["in_order", "sum"]
"""How several active adapters edit: each what those before left, or all the same hidden states."""

CANNOT_MERGE = (
    "A ReFT adapter cannot be merged: it edits the hidden states of some prompt tokens, and no "
    "change of weights does that. Keep the adapter (its cost at decoding is nothing), or use "
    "unload() to get the base model back."
)


class ReftLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """The interventions of all adapters at one layer.

    Args:
        hidden_size: d, the width of the layer's output; of all residual streams where it has
            several.
        stream_axis: which axis of an output of four counts the streams.
    """

    adapter_layer_names = ("reft_phi",)
    other_param_names = ()

    def __init__(self, hidden_size: int, stream_axis: int = 2) -> None:
        super().__init__()
        self.stream_axis = stream_axis
        self.hidden_size = hidden_size
        self.in_features = self.out_features = hidden_size  # PEFT's layers have both
        self.reft_phi = nn.ModuleDict()
        self.configs: dict[str, ReftConfig] = {}
        self.keys: dict[str, SlotKey] = {}
        self.strength: dict[str, float] = {}
        self.subspaces: dict[str, list[str]] = {}
        self.composition: Composition = "in_order"
        self.drops_out = True  # whether dropout acts in training
        self.merged_adapters: list[str] = []
        self.register_state_dict_pre_hook(_retract_before_save)  # type: ignore[no-untyped-call]

    def add(self, adapter_name: str, config: ReftConfig, device: torch.device | None) -> None:
        """Give this layer fresh parameters for an adapter, on the device of the layer."""
        phi = config.build(self.hidden_size)
        if device is not None and device.type != "meta" and not _is_meta(phi):
            phi.to(device)
        self.reft_phi[adapter_name] = phi
        self.configs[adapter_name] = config
        self.keys[adapter_name] = SlotKey(
            config.parsed_positions, config.short_prompts, config.edit_generated
        )
        self.strength[adapter_name] = 1.0

    def names_active(self) -> list[str]:
        """Return the active adapters, in the order in which they edit."""
        active: Any = self.active_adapters  # nn.Module's typing hides the property
        return list(active)

    def phi(self, adapter_name: str) -> Intervention:
        """Return the intervention of an adapter."""
        module = self.reft_phi[adapter_name]
        assert isinstance(module, Intervention)
        return module

    def forward(self, output: Any) -> Any:
        """Return a layer's output (a tensor, or a tuple that starts with one) with its edit."""
        hidden = output[0] if isinstance(output, tuple | list) else output
        if not isinstance(hidden, Tensor):
            raise ReftuneError(
                f"A layer returned {type(output).__name__}; ReFT edits layers that return a tensor "
                "or a tuple that starts with one. Name other modules with target_modules=[...]."
            )
        edited = self._edit(hidden, current_span())
        if edited is hidden:
            return output
        if isinstance(output, tuple | list):
            rebuild = getattr(type(output), "_make", type(output))  # a named tuple has its own
            return rebuild([edited, *output[1:]])
        return edited

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        for table in (self.configs, self.keys, self.strength, self.subspaces):
            table.pop(adapter_name, None)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise MergeError(CANNOT_MERGE)

    def get_base_layer(self) -> nn.Module:
        return self

    @property
    def weight(self) -> Tensor:
        # PEFT's property asks the base layer, which is this one: it would never end.
        raise AttributeError("A ReftLayer wraps no layer: it has no weight and no bias.")

    bias = weight

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # PEFT also casts to the base's dtype here; an intervention keeps its own (config.dtype).
        if adapter_name in self.reft_phi and device is not None:
            phi = self.reft_phi[adapter_name]
            if not _is_meta(phi):
                phi.to(device)

    def _edit(self, hidden: Tensor, span: Span) -> Tensor:
        if self.disable_adapters:
            return hidden
        h_BSd = self._as_batch(hidden, span)
        names = span.options.adapter_names
        if names is not None:
            edited = edit_mixed(self, h_BSd, span, names)
        else:
            edited = h_BSd
            for name in self.names_active():
                if name in self.reft_phi:
                    seen = h_BSd if self.composition == "sum" else edited
                    edited = self._edit_with(name, seen, edited, span)
        if edited is h_BSd:
            return hidden
        if hidden.dim() == 4:
            B, S, _ = edited.shape
            return edited.view(B, S, -1, hidden.shape[-1]).movedim(2, self.stream_axis)
        return edited.view_as(hidden)

    def _as_batch(self, hidden: Tensor, span: Span) -> Tensor:
        """Return the states as (B, S, d); of (N, d), rows are tokens if the call had N."""
        if hidden.dim() == 4:
            hidden = hidden.movedim(self.stream_axis, 2).flatten(2)
        if hidden.shape[-1] != self.hidden_size or hidden.dim() not in (2, 3):
            raise ReftConfigError(
                f"The edited module returned hidden states of shape {tuple(hidden.shape)}; "
                f"expected (batch, tokens, {self.hidden_size}). If only the width differs, give it "
                "with ReftConfig(hidden_size=...); else name other modules with target_modules."
            )
        if hidden.dim() == 3:
            if span.shape is not None and hidden.shape[:2] == span.shape[::-1] != span.shape:
                raise ReftConfigError(
                    f"The edited module returned (tokens, batch, width) states, "
                    f"{tuple(hidden.shape)}: such models' tokens cannot be told from their "
                    "examples. Name modules that return (batch, tokens, width) in target_modules."
                )
            return hidden
        B, S = span.shape or (0, 0)
        return hidden.view(B, S, -1) if len(hidden) == B * S else hidden.unsqueeze(1)

    def strength_of(self, adapter_name: str, span: Span) -> float:
        """Return the factor on an adapter's edit in this forward."""
        given = span.options.strength
        return self.strength[adapter_name] if given is None else given

    def check_packing(self, adapter_name: str, span: Span, S: int) -> None:
        """Raise PositionError where a method that pools an example's tokens meets packed rows."""
        config, key = self.configs[adapter_name], self.keys[adapter_name]
        if config.intervention.pools_tokens and span.is_packed and span.is_dense(key, S):
            raise PositionError(
                f"method={config.method!r} averages over the tokens of an example, which packed "
                "batches mix. Use a collator that pads, or counted positions and one that says "
                "where sequences end (cu_seq_lens_q)."
            )

    def _edit_with(self, name: str, h_BSd: Tensor, onto: Tensor, span: Span) -> Tensor:
        """Return `onto` with an adapter's edit of `h_BSd` added to it."""
        B, S, _ = h_BSd.shape
        config, key = self.configs[name], self.keys[name]
        strength = self.strength_of(name, span)
        if strength == 0.0 or (not key.edit_generated and span.is_past_prompt(S)):
            return onto
        self.check_packing(name, span, S)
        if span.is_dense(key, S):
            return onto + self._dense_edit(name, h_BSd, span, strength)
        rows = span.rows(key, B, S, h_BSd.device)
        with no_autocast(h_BSd.device):
            x_BKd = rows.gather(h_BSd).to(next(self.phi(name).parameters()).dtype)
            edit = apply_grouped(
                self.phi(name),
                x_BKd,
                self.tensors(name, span, B),
                rows.valid,
                split=key.positions.prefix,
                per_slot=config.tied == "none",
            )
            edit = self.finish(name, x_BKd, edit, rows.valid, strength)
        return rows.add(onto, edit)

    def _dense_edit(self, name: str, h_BSd: Tensor, span: Span, strength: float) -> Tensor:
        """Return the edit of every token, kept where a slot says so: `all`, and packed batches."""
        B, S, _ = h_BSd.shape
        config, key = self.configs[name], self.keys[name]
        slot = span.slots(key, *key.counts, B, S, h_BSd.device)
        phi = self.phi(name)
        with no_autocast(h_BSd.device):
            x = h_BSd.to(next(phi.parameters()).dtype)
            tensors = self.tensors(name, span, B)
            groups = next(iter(tensors.values())).shape[0]  # 1, 2 (sides), or one per position
            masks = key.group_masks(slot, groups, per_slot=config.tied == "none")
            edit = apply_dense(phi, x, tensors, masks)
            edit = self.finish(name, x, edit, slot < key.num_slots, strength)
        return edit.to(h_BSd.dtype)

    def tensors(self, name: str, span: Span, B: int) -> dict[str, Tensor]:
        """Return an adapter's parameters, with the mask of the subspaces that are on."""
        phi, chosen = self.phi(name), span.options.subspaces
        tensors = phi.tensors()
        chosen = self.subspaces.get(name) if chosen is None else chosen
        if chosen is not None and phi.has_rank:
            R, config = tensors["R"], self.configs[name]
            # Made once for all layers of a forward: a copy to the device would wait for it.
            key = ("subspaces", id(config), R.shape[0], B, R.device)
            groups, names = R.shape[0], chosen
            mask = span.once(key, lambda: subspace_mask(config, names, B, groups, R))
            tensors[SUBSPACE_MASK] = mask
        return tensors

    def finish(
        self, name: str, x: Tensor, edit: Tensor, valid: Tensor, strength: float | Tensor
    ) -> Tensor:
        """Apply dropout and strength to an edit, and drop it where there is no token."""
        config = self.configs[name]
        if self.training and self.drops_out and config.dropout:
            if config.dropout_on == "edit":
                edit = F.dropout(edit, config.dropout)
            else:
                edit = F.dropout(x + edit, config.dropout) - x
        if isinstance(strength, Tensor) or strength != 1.0:
            edit = edit * strength
        return torch.where(valid[..., None], edit, 0.0)


def _is_meta(module: nn.Module) -> bool:
    """Return whether parameters are yet to be loaded (PEFT's `low_cpu_mem_usage=True`)."""
    return any(p.is_meta for p in module.parameters())


def subspace_mask(
    config: ReftConfig,
    chosen: Sequence[str] | Sequence[Sequence[str]],
    B: int,
    groups: int,
    like: Tensor,
) -> Tensor:
    """Return a mask of the rows of R that are on: (G, 1, r), or (G, B, 1, r) for one per example.

    Raises ReftConfigError for an unknown name, and where the examples named do not fit the batch.
    """
    shared = not chosen or isinstance(chosen[0], str)
    lists = [chosen] if shared else list(chosen)
    if B % len(lists):
        raise ReftConfigError(f"subspaces names {len(lists)} examples, the batch has {B}.")
    mask = torch.zeros(len(lists), config.r or 0)
    for i, names in enumerate(lists):
        mask[i, config.subspace_rows([str(name) for name in names])] = 1.0
    mask = on_device(mask, like.device).to(like.dtype)
    if not shared:
        mask = mask.repeat_interleave(B // len(lists), dim=0).unsqueeze(-2)
    return mask.expand(groups, *mask.shape)


def _retract_before_save(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Orthonormalise R before it is saved, for a save right after an optimizer step.

    Here by its values: what is written through `.data` (moving averages, flat vectors of
    parameters) leaves no other trace, and would be loaded as another R than was saved.
    """
    assert isinstance(module, ReftLayer)
    phis = [phi for phi in module.reft_phi.values() if isinstance(phi, Intervention)]
    for phi in phis:
        if phi.orthonormal and not phi.is_view:
            phi.tracker.look(phi.raw_R())
    retract(phis)
