"""A ReFT beside an adapter of another PEFT method: trained, saved, loaded and served together.

PEFT's `PeftModel` holds adapters of one method, and its `PeftMixedModel` neither saves nor takes
methods from outside. But all that PEFT does to an adapter it does by its config, and a ReFT renames
nothing of the base: so the `PeftModel` of a LoRA can hold a ReFT, too. It trains what is active of
both, `save_pretrained` writes a directory for each that can be loaded without the other, and
`disable_adapter`, `generate` and trainers see one model.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from reftune.config import REFT, ReftConfig
from reftune.errors import MergeError, ReftConfigError
from reftune.layer import ReftLayer
from reftune.tuner import ReftModel, detach

MERGE = (
    "The LoRA (or other adapter) of a model that also has a ReFT is not merged: the ReFT would "
    "stay behind. Save both, load the first alone, merge_and_unload() it, and load the ReFT on "
    "the result with PeftModel.from_pretrained."
)
ADAPTER_NAMES = (
    "adapter_names=[...] names one adapter for each example, of one method; this model has a ReFT "
    "beside another method. Activate what is wanted with model.base_model.set_adapter([...])."
)


def add_reft(model: PeftModel, config: ReftConfig, adapter_name: str = "edits") -> PeftModel:
    """Add a ReFT to a `PeftModel` of another method, such as LoRA, and activate it beside it.

    What was trainable stays so, and the ReFT is (unless `config.inference_mode`). Both are active;
    choose with `model.base_model.set_adapter([...])`. Returns the same model. Raises
    ReftConfigError where that is not possible.
    """
    tuner = _tuner_of(model)
    if adapter_name in model.peft_config:
        raise ReftConfigError(f"There is an adapter {adapter_name!r} already; give another name.")
    active = list(model.active_adapters)
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    before = {id(p) for p in model.parameters()}
    try:
        with warnings.catch_warnings():
            # That there are two is meant; the config of each says which it is.
            warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
            ReftModel(tuner.model, {adapter_name: config}, adapter_name)
    except Exception:
        model.peft_config.pop(adapter_name, None)
        raise
    if not _is_joined(tuner):
        _join(tuner)
    tuner.set_adapter([*active, adapter_name])
    for parameter in model.parameters():
        if id(parameter) in before:
            parameter.requires_grad_(id(parameter) in trainable)
        elif config.inference_mode:
            parameter.requires_grad_(False)
    return model


def load_reft(
    model: PeftModel,
    path: str | Path,
    adapter_name: str = "edits",
    is_trainable: bool = False,
) -> PeftModel:
    """Load a saved ReFT (a directory, or a name on the Hub) beside a model's other adapter.

    As `add_reft`; what `model.save_pretrained` has written in the subfolder `adapter_name` is such
    a directory. Raises ReftConfigError, AdapterMismatchError.
    """
    _tuner_of(model)
    config = ReftConfig.from_pretrained(str(path))
    if not isinstance(config, ReftConfig):
        raise ReftConfigError(
            f"{path} holds an adapter of type {config.peft_type.value}, no ReFT. Load it with "
            "PeftModel.from_pretrained, and a ReFT beside it."
        )
    config.inference_mode = not is_trainable
    add_reft(model, config, adapter_name)
    model.load_adapter(str(path), adapter_name, is_trainable=is_trainable)
    return model


def _tuner_of(model: PeftModel) -> BaseTuner:
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, BaseTuner):
        raise ReftConfigError(
            f"A ReFT is put beside the adapter of a PeftModel, got {type(model).__name__}"
            f"{' of a prompt method' if isinstance(model, PeftModel) else ''}. For a ReFT alone: "
            "peft.get_peft_model(model, ReftConfig(...)). Prompt and prefix tuning put tokens "
            "before the prompt, and a ReFT counts its positions from the first."
        )
    if model.peft_config[next(iter(model.peft_config))].peft_type == REFT:
        raise ReftConfigError(
            "This PeftModel is a ReFT's: add another ReFT with model.add_adapter(name, config). "
            "For a LoRA and a ReFT, make the LoRA first."
        )
    return model.base_model


def _is_joined(tuner: BaseTuner) -> bool:
    return isinstance(tuner.tuner_layer_cls, tuple)


def _join(tuner: BaseTuner) -> None:
    """Let what PEFT does to a tuner's adapters reach the ReFT's layers, too."""
    # PEFT only ever asks isinstance(module, tuner_layer_cls).
    tuner.tuner_layer_cls = (tuner.tuner_layer_cls, ReftLayer)
    tuner._unload_and_optionally_merge = functools.partial(
        _unload, tuner._unload_and_optionally_merge
    )
    if hasattr(tuner, "_enable_peft_forward_hooks"):  # of the methods that take adapter_names
        tuner._enable_peft_forward_hooks = functools.partial(
            _refuse_names, tuner._enable_peft_forward_hooks
        )


def _unload(
    original: Callable[..., nn.Module], merge: bool = True, *args: Any, **kwargs: Any
) -> nn.Module:
    if merge:
        raise MergeError(MERGE)
    model = original(False, *args, **kwargs)
    detach(model)
    return model


def _refuse_names(
    original: Callable[..., AbstractContextManager[None]], *args: Any, **kwargs: Any
) -> AbstractContextManager[None]:
    if kwargs.get("adapter_names") is not None:
        raise ReftConfigError(ADAPTER_NAMES)
    return original(*args, **kwargs)
