"""Methods to compare ReFT with, through the same runner: PEFT's own, and weights that are trained.

    lora, prompt_tuning, prefix_tuning, ia3, ln_tuning, beft    PEFT's, by its own config classes
    full, bitfit, none                                          weights of the base model itself

What is trained of the base model is kept by `Weights`, with the values that it had before, so that
the base can be computed as it was (`as_base`), as PEFT's `disable_adapter` does for the others.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, get_args, get_type_hints

import peft
import torch
from peft import PeftConfig, PeftModel
from pydantic import BaseModel, ConfigDict, Field, create_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reftune.errors import AdapterMismatchError, ReftConfigError

WEIGHTS_CONFIG = "trained_weights.json"
WEIGHTS_FILE = "weights.safetensors"
_STATE = "_reftune_weights"

# The paper's prefix tuning has 0.039% of LLaMA-7B's parameters: 10 tokens in each layer.
_PREFIX_TOKENS = 10
# The setting of LLM-Adapters (Hu et al. 2023), whose LoRA the paper compares with.
_LORA = {
    "r": 32,
    "lora_alpha": 64,
    "lora_dropout": 0.05,
    "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
}


@dataclass(frozen=True)
class PeftMethod:
    """A method of PEFT's: its config class, and our defaults where they differ from PEFT's."""

    config: type[PeftConfig]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)


PEFT_METHODS: Mapping[str, PeftMethod] = MappingProxyType(
    {
        "lora": PeftMethod(peft.LoraConfig, _LORA),
        "prompt_tuning": PeftMethod(peft.PromptTuningConfig, {"num_virtual_tokens": 20}),
        "prefix_tuning": PeftMethod(
            peft.PrefixTuningConfig, {"num_virtual_tokens": _PREFIX_TOKENS}
        ),
        "ia3": PeftMethod(peft.IA3Config),
        "ln_tuning": PeftMethod(peft.LNTuningConfig),
        "beft": PeftMethod(peft.BeftConfig),
    }
)
# Facts about the base model, which PEFT fills in, and what needs more than a config.
_NOT_SET = ("token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers")
_PLAIN = (int, float, bool, str, type(None), list, dict, tuple)

WeightMethod: TypeAlias = Literal["full", "bitfit", "none"]
WEIGHT_METHODS: Mapping[str, str] = MappingProxyType(
    {
        "full": "every weight of the base model is trained",
        "bitfit": "the base model's biases are trained (Ben Zaken et al. 2022)",
        "none": "the base model stays as it is; a classifier's head is trained",
    }
)

BASELINES: tuple[str, ...] = (*PEFT_METHODS, *WEIGHT_METHODS)
"""The methods that are not ReFT."""


def settings_of(method: str) -> type[BaseModel]:
    """Return the model of a baseline's section `adapter` in a run's YAML.

    PEFT's fields keep their names, types and help; those that hold another config are left out.
    """
    fields: dict[str, Any] = {
        "method": (Literal[method], Field(method, description=_help(method))),
    }
    if method in PEFT_METHODS:
        kind = PEFT_METHODS[method]
        inherited = {field.name for field in dataclasses.fields(PeftConfig)}
        hints = get_type_hints(kind.config)
        for field in dataclasses.fields(kind.config):
            if field.name in inherited or field.name in _NOT_SET:
                continue
            hint = str | None if field.name == "prompt_tuning_init" else hints[field.name]
            if _is_plain(hint):
                default = kind.defaults.get(field.name, _default(field))
                # PEFT writes `int` where it means `int | None`.
                hint = hint | None if default is None else hint
                description = str(field.metadata.get("help", field.name))
                fields[field.name] = (hint, Field(default, description=description))
    name = "".join(part.title() for part in method.split("_"))
    config = ConfigDict(extra="forbid", frozen=True)
    return create_model(f"{name}Settings", __config__=config, **fields)


def peft_config(method: str, fields: Mapping[str, Any], task_type: str) -> PeftConfig:
    """Return PEFT's config of one of `PEFT_METHODS`. Raises ReftConfigError."""
    values = {name: value for name, value in fields.items() if name != "method"}
    try:
        return PEFT_METHODS[method].config(task_type=task_type, **values)
    except (ValueError, TypeError) as error:
        raise ReftConfigError(f"PEFT does not accept this for {method}: {error}") from error


def is_prompt_learning(model: Any) -> bool:
    """Return whether virtual tokens are put before a model's input (prompt and prefix tuning)."""
    return isinstance(model, PeftModel) and bool(model.active_peft_config.is_prompt_learning)


def takes_no_padding(model: Any) -> bool:
    """Return whether prompts of a batch must be equally long.

    PEFT puts virtual tokens before the padding on the left, and counts it in the positions: a
    prompt would be read farther from them than it was in training (prefix tuning does not).
    """
    return is_prompt_learning(model) and model.active_peft_config.peft_type != "PREFIX_TUNING"


def is_trained_in_full(model: Any) -> bool:
    """Return whether every weight of a base model is trained."""
    weights = weights_of(model)
    return weights is not None and weights.method == "full"


@dataclass
class Weights:
    """The weights of a base model that are trained, with the values they had before.

    Attributes:
        method: "full", "bitfit" or "none".
        before: value of each at first, on the CPU.
    """

    method: str
    before: dict[str, Tensor]


def train_weights(model: nn.Module, method: str) -> nn.Module:
    """Let a method's weights of a model be trained, and no others; a classifier's head always is.

    Raises ReftConfigError where there is nothing to train.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_trains(model, method, name))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    only_head = {n for n in trained if _in_head(model, n)}
    if method == "bitfit" and len(trained) == len(only_head):
        raise ReftConfigError(
            f"method 'bitfit' trains biases, and {type(model).__name__} has none. Nearest to it "
            "are ln_tuning (the weights of its norms) and beft (adds a bias to each value)."
        )
    if not trained:
        raise ReftConfigError(
            f"method {method!r} trains nothing of a {type(model).__name__}: it is for classifiers, "
            "whose head is trained. Leave the run out; every run also measures its base model."
        )
    _keep(model, method)
    return model


def weights_of(model: Any) -> Weights | None:
    """Return what is trained of a base model; None for one with adapters, or as it was loaded."""
    found = vars(model).get(_STATE)
    assert found is None or isinstance(found, Weights)
    return found


@contextmanager
def as_base(model: Any) -> Iterator[None]:
    """Let a model compute in a block what its base model computes."""
    weights = weights_of(model)
    if weights is None:
        with model.disable_adapter():
            yield
        return
    with torch.no_grad():
        parameters = {n: p for n, p in model.named_parameters() if n in weights.before}
        after = {name: p.detach().cpu().clone() for name, p in parameters.items()}
        for name, parameter in parameters.items():
            parameter.copy_(weights.before[name])
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(after[name])


def count_parameters(model: Any) -> tuple[int, int]:
    """Return how many parameters are trained, and how many the base model has."""
    if weights_of(model) is None:
        trained, both = model.get_nb_trainable_parameters()
        return int(trained), int(both - trained)
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def save_weights(model: Any, directory: Path, base: str) -> None:
    """Save the trained weights, and no others, with the base model's name."""
    weights = weights_of(model)
    assert weights is not None
    directory.mkdir(parents=True, exist_ok=True)
    values = {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if name in weights.before
    }
    save_file(values, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    about = {"method": weights.method, "base_model_name_or_path": base}
    (directory / WEIGHTS_CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def load_weights(model: nn.Module, directory: Path) -> nn.Module:
    """Put trained weights into their base model. Raises AdapterMismatchError."""
    about = read_weights_config(directory)
    values = load_file(directory / WEIGHTS_FILE)
    parameters = dict(model.named_parameters())
    wrong = [n for n, t in values.items() if n not in parameters or parameters[n].shape != t.shape]
    if wrong:
        raise AdapterMismatchError(
            f"{directory} has weights that {type(model).__name__} has not in that shape: "
            f"{', '.join(wrong[:3])}. Name its own base model."
        )
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in values)
    _keep(model, str(about["method"]))
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
    return model


def read_weights_config(directory: Path) -> dict[str, str]:
    """Return method and base model of a directory that `save_weights` wrote."""
    found: dict[str, str] = json.loads((directory / WEIGHTS_CONFIG).read_text(encoding="utf-8"))
    return found


def _keep(model: nn.Module, method: str) -> None:
    before = {n: p.detach().cpu().clone() for n, p in model.named_parameters() if p.requires_grad}
    object.__setattr__(model, _STATE, Weights(method, before))


def _trains(model: nn.Module, method: str, name: str) -> bool:
    own = {"full": True, "bitfit": name.endswith(".bias"), "none": False}[method]
    return own or _in_head(model, name)


def _in_head(model: Any, name: str) -> bool:
    """Return whether a parameter belongs to a classifier's head, which a base model has not."""
    is_classifier = type(model).__name__.endswith("ForSequenceClassification")
    encoder = f"{model.base_model_prefix}."
    return is_classifier and (
        not name.startswith(encoder) or name.startswith(f"{encoder}pooler.")  # as in BERT
    )


def _help(method: str) -> str:
    if method in WEIGHT_METHODS:
        return WEIGHT_METHODS[method]
    return f"PEFT's {PEFT_METHODS[method].config.__name__}"


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    default = field.default
    return getattr(default, "value", default)  # an enum's member, as YAML writes it


def _is_plain(hint: Any) -> bool:
    """Return whether YAML can hold what a type hint allows."""
    args = [arg for arg in get_args(hint) if not isinstance(arg, str | bool)]
    return all(map(_is_plain, args)) if args or get_args(hint) else hint in _PLAIN
