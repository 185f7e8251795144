"""ReFT as a PEFT method: `ReftModel` keeps PEFT's contract for any Hugging Face model.

The layers get a child module and a hook each (`reftune.layer`); the modules through which the model
may be called get hooks that open and close a span (`reftune.spans`). `generate` of a causal
language model is wrapped to say where its prompt ends: only there is that known whatever the cache.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle
from transformers import GenerationMixin

from reftune.checkpoint import check_before_injection, check_state_dict
from reftune.composition import CombinationType, combine
from reftune.config import ReftConfig
from reftune.context import options
from reftune.errors import MergeError, ReftConfigError
from reftune.generating import ROOT, generate
from reftune.heads import WITH_HEAD, add_heads
from reftune.interventions import Intervention, retract
from reftune.layer import CANNOT_MERGE, ReftLayer
from reftune.layers import decoder_of, find_targets, pads_right, residual_streams
from reftune.masks import entry_of
from reftune.mixed import check_adapter_names, check_names_of_call, check_names_of_span
from reftune.quantised import check_trainable, keep_unpacked
from reftune.recompute import carry_spans, drop_carriers, plain_name
from reftune.spans import Span, close_span, is_idle, open_span
from reftune.trainers import PromptWatch, active_keys, watch_trainers

_CHILD = "reft"
_ENTRY = "_reft_entry"


@dataclass(eq=False)
class Root:
    """What reftune put into a model, so that it can be found and taken out again."""

    watch: PromptWatch
    layers: dict[str, ReftLayer] = field(default_factory=dict)
    handles: list[RemovableHandle] = field(default_factory=list)
    entries: list[nn.Module] = field(default_factory=list)
    edits_generated: bool = False
    targets: list[nn.Module] = field(default_factory=list)


class ReftModel(BaseTuner):  # type: ignore[misc]
    """Attach ReFT adapters to a model; made by `peft.get_peft_model(model, ReftConfig(...))`.

    Args: as `peft.tuners.tuners_utils.BaseTuner`.
    """

    prefix: str = "reft_"
    tuner_layer_cls = ReftLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - the base class declares it so

    def _prepare_adapter_config(self, peft_config: ReftConfig, model_config: Any) -> ReftConfig:
        """Find the layers, and check the adapter's checkpoint against them if it has one."""
        self._targets = find_targets(self.model, peft_config)
        for width in set(self._targets.values()):
            peft_config.shape(width)  # raises where the rank does not fit
        add_heads(self.model, peft_config)
        check_before_injection(peft_config, self._targets)
        return peft_config

    def _check_target_module_exists(self, peft_config: ReftConfig, key: str) -> bool:
        return key in self._targets

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        self._check_name(adapter_name)
        if not self.peft_config[adapter_name].inference_mode:
            keep_unpacked(model)
            check_trainable(model)
        # The config says which layers; PEFT would look for modules named after the tensors.
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        _hook_entries(model, self.peft_config[adapter_name])

    def _check_name(self, adapter_name: str) -> None:
        """Raise where PEFT could not save one ReFT of several, or an earlier one is in the way."""
        root = vars(self.model).get(ROOT)
        layers = {} if root is None else root.layers
        left = [n for n, layer in layers.items() if adapter_name in layer.configs]
        if left and set(left) - set(find_targets(self.model, self.peft_config[adapter_name])):
            raise ReftConfigError(
                f"The model has an adapter {adapter_name!r} already, on other layers ({left[:3]}): "
                "unload() the PeftModel that put it there, or load the base anew."
            )
        names = {n for n, c in self.peft_config.items() if isinstance(c, ReftConfig)}
        if len(names) > 1 and (taken := sorted(names & {_CHILD, f"{_CHILD}_phi"})):
            raise ReftConfigError(
                f"With several ReFTs none can be named {taken[0]!r}: PEFT would take the others "
                "for it when they are saved. Give it another name."
            )

    def _create_and_replace(
        self,
        peft_config: ReftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        root = _root_of(self.model)
        layer = root.layers.get(current_key)
        if layer is None:
            layer = ReftLayer(self._targets[current_key], residual_streams(self.model)[1])
            layer.composition = next(iter(root.layers.values()), layer).composition
            target.add_module(_CHILD, layer)
            root.layers[current_key] = layer
            root.targets.append(target)
            if not isinstance(target, nn.Sequential):  # it runs its children itself, this one last
                root.handles.append(target.register_forward_hook(_edit_output))
        layer.add(adapter_name, peft_config, _device_of(target))
        if adapter_name not in self.active_adapters:
            layer.reft_phi[adapter_name].requires_grad_(False)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Take `adapter_names` out of the arguments of a forward or `generate` (PEFT's hook)."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        known = {name for layer in _root_of(self.model).layers.values() for name in layer.configs}
        check_adapter_names(known, names, training=self.training)
        check_names_of_call(names, args, kwargs)
        handles = [
            module.register_forward_pre_hook(
                functools.partial(_pass_adapter_names, names=list(names)), with_kwargs=True
            )
            for module in self.model.modules()
            if isinstance(module, AuxiliaryTrainingWrapper)
        ]
        try:
            with options(adapter_names=tuple(names)):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Keep the dtype that the config names: PEFT would make float32 of a bfloat16 adapter."""

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            raise MergeError(CANNOT_MERGE)
        for name, module in list(self.model.named_modules()):
            if isinstance(module, AuxiliaryTrainingWrapper):
                parent = self.model.get_submodule(name.rpartition(".")[0])
                original = module.unload_and_optionally_merge_module(
                    merge=False, safe_merge=False, adapter_names=None
                )
                setattr(parent, name.rpartition(".")[2], original)
        model: nn.Module = self.model
        detach(model)
        return model

    def _check_merge_allowed(self) -> None:
        raise MergeError(CANNOT_MERGE)

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: see `MergeError`."""
        raise MergeError(CANNOT_MERGE)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; if it was active, the first of those left is, on all layers.

        PEFT chooses one for each layer by itself, and adapters of other layers are others.
        """
        before = list(self.active_adapters)
        super().delete_adapter(adapter_name)
        left = [name for name in before if name != adapter_name]
        if left == before:
            self.active_adapter = before
        elif names := left or list(self.peft_config)[:1]:  # saved modules take no empty list
            self.set_adapter(names)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: CombinationType = "cat",
        svd_rank: int | None = None,
    ) -> None:
        """Add an adapter, not active, whose edit is the weighted sum of others' edits.

        Args are PEFT's; `reftune.composition` says what can be combined. Strengths and subspaces
        that were set do not count. Raises ReftConfigError with the model unchanged.
        """
        layers, known = _root_of(self.model).layers, self.peft_config
        config, tensors = combine(
            layers, known, adapters, weights, adapter_name, combination_type, svd_rank
        )
        known[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        for name, values in tensors.items():
            layers[name].phi(adapter_name).load_state_dict(values)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, *, adapter_name: str, state_dict: dict[str, Tensor], **kwargs: Any
    ) -> dict[str, Tensor]:
        own = {  # a state dict has names without those of torch's wrappers
            plain_name(f"{name}.reft_phi.{adapter_name}.{key}"): parameter
            for name, m in model.named_modules()
            if isinstance(m, ReftLayer) and adapter_name in m.reft_phi
            for key, parameter in m.reft_phi[adapter_name].named_parameters()
        }
        found = {k: t for k, t in state_dict.items() if plain_name(k) in own}
        lost = own.keys() - set(map(plain_name, found))  # to adapters named "0", "bias", "layers"
        return found | {k: own[k].detach() for k in lost if state_dict and own[k].numel()}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: ReftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        below_wrappers = {
            f"{at}.reft_phi.{key}": f"{at}.reft_phi.{adapter_name}.{key}"
            for at, m in ((plain_name(name), m) for name, m in model.named_modules())
            if isinstance(m, ReftLayer) and adapter_name in m.reft_phi
            for key, _ in m.reft_phi[adapter_name].named_parameters()
        }
        remapped = {below_wrappers.get(k, k): t for k, t in remapped.items()}
        check_state_dict(model, config, adapter_name, remapped)
        return remapped


def detach(model: nn.Module) -> None:
    """Take every ReFT adapter, hook and wrapper out of a model."""
    root = _root_of(model)
    for handle in root.handles:
        handle.remove()
    for name in root.layers:
        delattr(model.get_submodule(name), _CHILD)
    for entry in root.entries:
        delattr(entry, _ENTRY)
    drop_carriers((*root.entries, *root.targets))
    for attribute in ("generate", ROOT, "peft_config"):
        if attribute in vars(model):
            delattr(model, attribute)


def _root_of(model: nn.Module) -> Root:
    root = vars(model).get(ROOT)
    if root is None:
        root = Root(PromptWatch(model))
        object.__setattr__(model, ROOT, root)
    assert isinstance(root, Root)
    return root


def _hook_entries(model: nn.Module, config: ReftConfig) -> None:
    """Hook every module on the way to an edited layer: any of them may be what a caller calls."""
    watch_trainers()
    root = _root_of(model)
    root.edits_generated |= config.edit_generated
    structure = _is_causal_lm(model) and config.task_type not in WITH_HEAD
    causal_lm = structure or config.task_type == "CAUSAL_LM"
    decoder, pads = decoder_of(model), pads_right(model)
    paths = {""}
    for name in root.layers:
        parts = name.split(".")[:-1]
        paths |= {".".join(parts[: i + 1]) for i in range(len(parts))}
    for path in sorted(paths):
        module = model.get_submodule(path)
        if isinstance(module, nn.ModuleList) or _ENTRY in vars(module):
            continue
        entry = entry_of(module, root, causal_lm, module is decoder, pads)
        object.__setattr__(module, _ENTRY, entry)
        root.entries.append(module)
        root.handles.append(module.register_forward_pre_hook(_open, with_kwargs=True))
        root.handles.append(module.register_forward_hook(_close, always_call=True))
    if _is_causal_lm(model) and "generate" not in vars(model):
        object.__setattr__(model, "generate", functools.partial(generate, model))


def _is_causal_lm(model: Any) -> bool:
    return (
        isinstance(model, GenerationMixin)
        and bool(type(model).can_generate())  # type: ignore[attr-defined]
        and not getattr(vars(model)["config"], "is_encoder_decoder", False)
    )


def _edit_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    if is_idle():
        return None
    edited = getattr(module, _CHILD)(output)
    if not isinstance(module, FSDPModule) or not torch.is_grad_enabled():
        return edited
    # FSDP hangs its backward on what a layer returns: an in-place operation on a view loses it.
    return edited.clone() if isinstance(edited, Tensor) else (edited[0].clone(), *edited[1:])


def _open(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    entry = vars(module)[_ENTRY]
    kwargs, span = open_span(module, entry, args, kwargs)
    if span is None:
        return args, kwargs
    if span.shape is not None and not entry.model.edits_generated:
        span.idle = span.is_past_prompt(span.shape[1])
    if not span.idle and not torch.compiler.is_compiling():
        check_names_of_span(span)
        _retract_active(entry.model, span)
        trained = module.training and torch.is_grad_enabled()
        keys = active_keys(list(entry.model.layers.values()))
        entry.model.watch.look(span, entry, kwargs, keys, trained)
        if torch.is_grad_enabled():
            carry_spans((*entry.model.entries, *entry.model.targets))
    return args, kwargs


def _close(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    close_span(module)


def _retract_active(root: Root, span: Span) -> None:
    names = span.options.adapter_names
    retract(
        [
            phi
            for layer in root.layers.values()
            for name in (layer.names_active() if names is None else set(names))
            if name in layer.configs and isinstance(phi := layer.reft_phi[name], Intervention)
        ]
    )


def _pass_adapter_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, names: list[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    rows = len(args[0]) if args and isinstance(args[0], Tensor) else len(names)
    each = max(rows // len(names), 1)  # of beams and sampled sequences
    return args, {**kwargs, "adapter_names": [name for name in names for _ in range(each)]}


def _device_of(module: nn.Module) -> torch.device | None:
    own = [p.device for name, p in module.named_parameters() if not name.startswith(f"{_CHILD}.")]
    return own[0] if own else None


register_peft_method(name="reft", config_cls=ReftConfig, model_cls=ReftModel, prefix="reft_")
