"""Find a model's layers by its structure: no table of architectures.

The layers are the outermost `ModuleList` whose length is the number of layers that the model's
config states. Where a model has several such lists, the tower that reads the prompt is meant: the
encoder of an encoder-decoder, the language model of a vision-language model.

Where layers pass on several residual streams, the state of a token is all of them, side by side.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from reftune.config import ReftConfig
from reftune.errors import LayersNotFoundError, ReftConfigError

_WIDTH_ATTRIBUTES = ("out_features", "nf", "embedding_dim", "num_features")
# transformers' names for the number of residual streams, and the axis of the states that counts
# them: (batch, tokens, streams, width) or (streams, batch, tokens, width).
_STREAMS = (("hc_mult", 2), ("hc_count", 2), ("altup_num_inputs", 0))


def find_targets(model: nn.Module, config: ReftConfig) -> dict[str, int]:
    """Return the names of the modules whose output is edited, with the width of that output.

    Raises LayersNotFoundError where they cannot be told or do not exist, ReftConfigError where
    their width cannot be told.
    """
    if config.target_modules is not None:
        names = _matching_modules(model, config.target_modules)
    else:
        path = config.layers_path or find_layer_list(model)
        names = _numbered(model, path, config.layers)
    for name in names:
        if isinstance(model.get_submodule(name), nn.ModuleList | nn.ModuleDict):
            raise LayersNotFoundError(
                f"{name!r} of {type(model).__name__} is a list of modules itself, and computes "
                "nothing. Name the modules to edit with ReftConfig(target_modules=[...])."
            )
    if not config.edit_generated:
        _refuse_decoder(model, names)
    streams = 1 if config.target_modules is not None else residual_streams(model)[0]
    if config.hidden_size is not None:
        streams = 1  # what was given is the whole
    return {name: _width(model, name, config) * streams for name in names}


def residual_streams(model: nn.Module) -> tuple[int, int]:
    """Return how many residual streams a model's layers pass on, and which axis counts them."""
    config: Any = getattr(model, "config", None)  # the border to any model class
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    for name, axis in _STREAMS:
        if isinstance(count := getattr(config, name, None), int) and count > 1:
            return count, axis
    return 1, 2


def find_layer_list(model: nn.Module) -> str:
    """Return the path of the list of layers that the prompt goes through.

    Raises LayersNotFoundError, with the candidates, where there is none or no single one.
    """
    lists = _outermost_lists(model)
    for tower in _prompt_towers(model):
        inside = [name for name in lists if name.startswith(f"{tower}.")]
        if len(inside) > 1:
            root = model.get_submodule(tower)
            inside = [n for n in inside if _is_of_text(root, n.removeprefix(f"{tower}."))]
        if len(inside) == 1:
            return inside[0]
    depth = _stated_depth(getattr(model, "config", None))  # the border to any model class
    stated = [name for name, n in lists.items() if n == depth]
    if len(stated) > 1:
        stated = [name for name in stated if _is_of_text(model, name)]
    if len(stated) == 1:
        return stated[0]
    if len(lists) == 1:
        return next(iter(lists))
    found = ", ".join(f"{name!r} ({n} modules)" for name, n in lists.items()) or "none"
    raise LayersNotFoundError(
        f"The layers of {type(model).__name__} cannot be told. Lists of modules in it: {found}. "
        "Name one with ReftConfig(layers_path='...'), or name the modules to edit with "
        "target_modules=[...]."
    )


def pads_right(model: nn.Module) -> bool:
    """Return whether a model pads what it is given to whole windows or blocks of attention.

    Longformer, LED, BigBird: by methods of these names, on the right.
    """
    names = ("_pad_to_window_size", "_pad_to_block_size")
    return any(hasattr(module, name) for module in model.modules() for name in names)


def decoder_of(model: Any) -> nn.Module | None:
    """Return the decoder of an encoder-decoder, all of whose tokens are generated."""
    config = getattr(model, "config", None)  # the border to any model class
    if not getattr(config, "is_encoder_decoder", False) or not hasattr(model, "get_decoder"):
        return None
    decoder = model.get_decoder()
    return decoder if isinstance(decoder, nn.Module) and decoder is not model else None


def _outermost_lists(model: nn.Module) -> dict[str, int]:
    """Return the paths and lengths of the lists of modules that lie in no other list."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            found[name] = len(module)
    return found


def _prompt_towers(model: nn.Module) -> list[str]:
    """Return where the tower that reads the prompt may be, by what transformers' models say."""
    config = getattr(model, "config", None)
    getter = "get_encoder" if getattr(config, "is_encoder_decoder", False) else "get_decoder"
    if not hasattr(model, getter):
        return []
    tower = getattr(model, getter)()
    if not isinstance(tower, nn.Module) or tower is model:
        return []
    return [name for name, module in model.named_modules() if module is tower]


def _refuse_decoder(model: nn.Module, names: list[str]) -> None:
    """Raise where a module lies in the decoder of an encoder-decoder, whose prompt is elsewhere."""
    decoder = decoder_of(model)
    inside = set() if decoder is None else {id(module) for module in decoder.modules()}
    for name in names:
        if id(model.get_submodule(name)) in inside:
            raise ReftConfigError(
                f"{name!r} is in the decoder of {type(model).__name__}, an encoder-decoder: its "
                "tokens are generated, and ReFT edits the prompt, which the encoder reads. Edit "
                "the encoder (leave layers_path out), or generated tokens with edit_generated=True."
            )


def _is_of_text(model: nn.Module, path: str) -> bool:
    """Return whether a list holds layers that read the text, by the configuration around them.

    Layers are modules made of modules; a list of projections is none of layers.
    """
    if not any(True for module in model.get_submodule(path).children() for _ in module.children()):
        return False
    own: Any = getattr(model, "config", None)  # the border to any model class
    text = own.get_text_config() if hasattr(own, "get_text_config") else own
    while path:
        path = path.rpartition(".")[0]
        config = getattr(model.get_submodule(path), "config", None)
        if config is not None:
            return config is text or config is own
    return True


def _stated_depth(config: Any) -> int | None:
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    depth = getattr(config, "num_hidden_layers", None)
    return depth if isinstance(depth, int) else None


def _numbered(model: nn.Module, path: str, layers: str | list[int]) -> list[str]:
    try:
        container = model.get_submodule(path)
    except AttributeError:
        container = None
    if not isinstance(container, nn.ModuleList | nn.Sequential):
        lists = sorted(_outermost_lists(model))
        raise LayersNotFoundError(
            f"layers_path={path!r} is no list of modules of {type(model).__name__}; "
            f"its lists are {lists}."
        )
    if layers == "all":
        return [f"{path}.{i}" for i in range(len(container))]
    for i in layers:
        if not 0 <= int(i) < len(container):
            raise LayersNotFoundError(
                f"There is no layer {i}: {type(model).__name__} has layers 0 to "
                f"{len(container) - 1} at {path!r}. Layers are counted from 0."
            )
    return [f"{path}.{i}" for i in layers]


def _matching_modules(model: nn.Module, wanted: list[str] | str) -> list[str]:
    """Return the modules that PEFT's rule matches: a regular expression, or endings of names."""
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(wanted, str):
        found = [name for name in names if re.fullmatch(wanted, name)]
    else:
        found = [n for n in names if any(n == w or n.endswith(f".{w}") for w in wanted)]
    found = [n for n in found if ".reft" not in n]
    if not found:
        raise LayersNotFoundError(
            f"target_modules={wanted!r} matches no module of {type(model).__name__}. Its top "
            f"modules are {[name for name, _ in model.named_children()]}."
        )
    return found


def _width(model: nn.Module, name: str, config: ReftConfig) -> int:
    if config.hidden_size is not None:
        return config.hidden_size
    module = model.get_submodule(name)
    module = getattr(module, "base_layer", module)  # a LoRA layer: its base has the same width
    for attribute in _WIDTH_ATTRIBUTES:
        if isinstance(width := getattr(module, attribute, None), int):
            return width
    path = name
    while path:
        path = path.rpartition(".")[0]
        width = _config_width(getattr(model.get_submodule(path), "config", None))
        if width is not None:
            return width
    raise ReftConfigError(
        f"The width of the output of {name!r} cannot be told. Give it with "
        "ReftConfig(hidden_size=...)."
    )


def _config_width(config: Any) -> int | None:
    width = getattr(config, "hidden_size", None)
    if width is None and hasattr(config, "get_text_config"):
        width = getattr(config.get_text_config(), "hidden_size", None)
    return width if isinstance(width, int) else None
