"""Adapters that exist, on their base models: for evaluation, generation and more training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from reftune.callbacks import CHECKPOINTS
from reftune.encoder import classifier_config, load_classifier
from reftune.errors import RunError
from reftune.methods import WEIGHTS_CONFIG, load_weights, read_weights_config
from reftune.models import EMBEDDED, load_model, own_device
from reftune.stored import CONFIG, base_of, find_adapter, quantization_of

AS_TRAINED: Final = "as-trained"


@dataclass
class Loaded:
    """A model with its adapter, its tokenizer, its base's name, and of a run the base's commit."""

    model: Any
    tokenizer: Any
    base: str
    revision: str | None = None


def load_adapter(
    path: str | Path,
    *,
    base: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    name: str = "default",
    quantization: str | None = AS_TRAINED,
) -> Loaded:
    """Load an adapter (its directory, a run's directory, or a Hub name) on its base model.

    `base` overrides the model that the adapter was trained on, `quantization` how a run's config
    beside the adapter says that it was loaded (None: it is not quantised). It is put on `device`,
    by default this process's GPU, or the CPU where there is none. Raises RunError.
    """
    import peft

    device = device or own_device()
    where = find_adapter(path)
    if (Path(where) / WEIGHTS_CONFIG).is_file():
        base = base or read_weights_config(Path(where))["base_model_name_or_path"]
        model, tokenizer = _load_base(where, base, dtype, device)
        return Loaded(load_weights(model, Path(where)), tokenizer, base)
    try:
        config = peft.PeftConfig.from_pretrained(str(where))
    except ValueError as error:
        raise RunError(
            f"{str(path)!r} is no adapter: {error}. An adapter is a directory with an "
            "adapter_config.json, a run's directory, or a Hub name." + _unfinished(Path(path))
        ) from error
    base = base or base_of(config)
    if not base:
        raise RunError(f"{where} does not say which model it is for; name it with --model.")
    if quantization == AS_TRAINED:
        quantization = quantization_of(where)
    model, tokenizer = _load_base(where, base, dtype, device, quantization)
    adapted = peft.PeftModel.from_pretrained(model, str(where), adapter_name=name)
    return Loaded(adapted, tokenizer, base)


def _load_base(
    adapter: Path | str,
    base: str,
    dtype: Any,
    device: str,
    quantization: str | None = None,
) -> tuple[Any, Any]:
    """Load a causal model, or the encoder of a classifier, whose adapter has a config of its own.

    The embedded model is taken for its Hub name: it needs no Hub.
    """
    base = {hub: embedded for embedded, (_, hub) in EMBEDDED.items()}.get(base, base)
    settings = classifier_config(adapter)
    if settings is None:
        return load_model(base, dtype, device, quantization=quantization)
    return load_classifier(base, settings, dtype, device)


def _unfinished(path: Path) -> str:
    if not (path / CHECKPOINTS).is_dir():
        return ""
    return f" This run is not finished: reftune train --resume {path / CONFIG}"
