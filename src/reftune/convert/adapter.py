"""An adapter on its way from one format to another, and reftune's own format at both ends."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from reftune.checkpoint import WEIGHTS
from reftune.config import ReftConfig
from reftune.convert.foreign import read_json, read_tensors
from reftune.errors import ConversionError, ReftuneError
from reftune.layers import find_targets
from reftune.models import resolve

PEFT_PREFIX = "base_model.model."
MARK = ".reft.reft_phi."
LORA = "lora"
# PEFT's and transformers' names of what a model is for: PEFT's task type -> transformers' class
_TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
_ENDINGS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


@dataclass(frozen=True)
class Answers:
    """What a checkpoint may not record, as its user knows it; None is not said.

    Attributes:
        base: the base model, a directory or Hub name.
        positions: which tokens of the prompt are edited, as in `ReftConfig`.
        act_fn: the activation on W h + b, a name of transformers' `ACT2FN`; "linear" for none.
        method: the method, where the tensors of two look alike.
        dropout: the probability, for training on; it changes nothing of what is computed.
        layers_path: the path of the list of layers, where the base model cannot be read.
        task_type: PEFT's, where the base model's own class is not the one that was trained.
        lora_alpha: of a LoRA saved beside the interventions.
    """

    base: str | None = None
    positions: str | None = None
    act_fn: str | None = None
    method: str | None = None
    dropout: float | None = None
    layers_path: str | None = None
    task_type: str | None = None
    lora_alpha: int | None = None


def require(what: str, **missing: str) -> None:
    """Raise ConversionError for what a checkpoint does not record; each with what to say."""
    if missing:
        flags = " ".join(f"--{name.replace('_', '-')}" for name in missing)
        reasons = " ".join(
            f"--{name.replace('_', '-')}: {meaning}." for name, meaning in missing.items()
        )
        raise ConversionError(
            f"{what} does not record all that it takes to compute what it was trained to. Give "
            f"{flags}. {reasons}"
        )


@dataclass
class Adapter:
    """A ReFT adapter as tensors in memory.

    Attributes:
        config: what it is; its `layers` or `target_modules` name what is in `phis`.
        phis: by path of the edited module, our parameters by name, each (G, ...).
        saved: weights of the base model trained in full (a head), by their names in it.
        lora: weights of a LoRA beside it by PEFT's names, without adapter name; and its config.
        notes: what a user should know about this conversion.
    """

    config: ReftConfig
    phis: dict[str, dict[str, Tensor]]
    saved: dict[str, Tensor] = field(default_factory=dict)
    lora: dict[str, Tensor] = field(default_factory=dict)
    lora_config: LoraConfig | None = None
    notes: list[str] = field(default_factory=list)


class Base:
    """The base model's structure, without its weights.

    Raises ConversionError where the model's config cannot be read and no `layers_path` is given.
    """

    def __init__(self, name: str, answers: Answers) -> None:
        self.name = name
        self.layers_path = answers.layers_path
        self.model: nn.Module | None = None
        self.task_type = answers.task_type
        if answers.task_type is not None and answers.task_type not in _TASKS:
            raise ConversionError(
                f"task_type is {answers.task_type!r}; accepted are {', '.join(_TASKS)}."
            )
        if answers.layers_path is None:
            self.model = _skeleton(name, answers.task_type)
            if self.task_type is None:
                kind = type(self.model).__name__
                known = (task for end, task in _ENDINGS.items() if kind.endswith(end))
                self.task_type = next(known, None)

    def paths(self, config: ReftConfig, width: int) -> list[str]:
        """Return the paths of the edited modules, in the order of `config.layers`.

        Raises ConversionError where the model's states do not have this width, and what
        `find_targets` raises.
        """
        if self.model is None:
            if config.target_modules is not None:
                return list(config.target_modules)
            assert isinstance(config.layers, list)
            return [f"{self.layers_path}.{layer}" for layer in config.layers]
        targets = find_targets(self.model, config)
        for path, found in targets.items():
            if found != width:
                raise ConversionError(
                    f"The checkpoint edits states of width {width}, those of {path!r} in "
                    f"{self.name!r} have {found}: it was trained on another base model."
                )
        return list(targets)

    def modules(self) -> dict[str, nn.Module]:
        """Return the base model's modules by path; nothing where its config was not read."""
        return {} if self.model is None else dict(self.model.named_modules())


def read_adapter(directory: Path) -> Adapter:
    """Read reftune's own format. Raises ConversionError, ReftConfigError."""
    directory = _inside_run(directory)
    if read_json(directory / "adapter_config.json").get("peft_type") != "REFT":
        raise ConversionError(f"{directory} holds an adapter of PEFT's that is not a ReFT.")
    try:
        config = ReftConfig.from_pretrained(str(directory))
    except (TypeError, ValueError) as error:
        if isinstance(error, ReftuneError):
            raise
        raise ConversionError(
            f"{directory}: adapter_config.json does not fit ({error})."
        ) from error
    phis: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, tensor in read_tensors(directory / WEIGHTS).items():
        key = key.removeprefix(PEFT_PREFIX)
        if MARK in key:
            path, _, name = key.partition(MARK)
            phis.setdefault(path, {})[name] = tensor.float()
        else:
            saved[key] = tensor
    if not phis:
        raise ConversionError(f"{directory / WEIGHTS} holds no interventions.")
    return Adapter(config, phis, saved)


def write_adapter(adapter: Adapter, directory: Path, card: str) -> None:
    """Write reftune's own format; a LoRA beside it into a folder of its own."""
    adapter.config.save_pretrained(str(directory))
    tensors = {
        f"{PEFT_PREFIX}{path}{MARK}{name}": tensor
        for path, parameters in adapter.phis.items()
        for name, tensor in parameters.items()
    }
    tensors |= {f"{PEFT_PREFIX}{name}": tensor for name, tensor in adapter.saved.items()}
    _save(tensors, directory / WEIGHTS)
    (directory / "README.md").write_text(card, encoding="utf-8")
    if adapter.lora_config is not None:
        folder = directory / LORA
        adapter.lora_config.save_pretrained(str(folder))
        _save({f"{PEFT_PREFIX}{k}": t for k, t in adapter.lora.items()}, folder / WEIGHTS)


def write_directory(target: Path, build: Callable[[Path], None], *, overwrite: bool) -> None:
    """Fill a directory by `build(scratch)` beside it and rename it: it is whole or not there.

    Raises ConversionError where the target exists, unless `overwrite`.
    """
    if target.exists() and not overwrite:
        raise ConversionError(f"{target} exists already. Give another name, or --overwrite.")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.parent / f".{target.name}-{uuid.uuid4().hex}"
    scratch.mkdir()
    try:
        build(scratch)
        if target.is_dir() and not target.is_symlink():
            replaced = target.parent / f".{target.name}-{uuid.uuid4().hex}"
            target.rename(replaced)
            scratch.rename(target)
            shutil.rmtree(replaced)
        else:
            target.unlink(missing_ok=True)
            scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def build_config(**settings: Any) -> ReftConfig:
    """Return a ReftConfig. Raises ConversionError with its reason."""
    try:
        return ReftConfig(inference_mode=True, **settings)
    except ReftuneError as error:
        raise ConversionError(f"The converted adapter would not be one: {error}") from error


def verify(adapter: Adapter, width: int) -> Adapter:
    """Return the adapter if its tensors are those of its config. Raises ConversionError."""
    try:
        phi = adapter.config.build(width)
    except ReftuneError as error:
        raise ConversionError(f"The converted adapter would not be one: {error}") from error
    expected = {name: tuple(p.shape) for name, p in phi.named_parameters()}
    for path, parameters in adapter.phis.items():
        found = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
        if found != expected:
            raise ConversionError(
                f"At {path} the checkpoint has {found}; an adapter with its settings has "
                f"{expected}."
            )
    return adapter


def stack(groups: list[dict[str, Tensor]], where: str) -> dict[str, Tensor]:
    """Join the parameters of each Phi of a layer into (G, ...). Raises ConversionError."""
    if any({k: t.shape for k, t in g.items()} != {k: t.shape for k, t in groups[0].items()}
           for g in groups):  # fmt: skip
        raise ConversionError(f"The interventions at {where} have different shapes.")
    return {name: torch.stack([g[name] for g in groups]) for name in groups[0]}


def one_shape(phis: Mapping[str, Mapping[str, Tensor]]) -> tuple[int, int | None]:
    """Return the width and the rank that all layers share. Raises ConversionError."""
    shapes = {tuple(t.shape) for p in phis.values() for n, t in p.items() if n in ("R", "scale")}
    if len(shapes) != 1:
        raise ConversionError(
            f"The layers have interventions of different shapes: {sorted(shapes)}. An adapter has "
            "one rank; convert each group of layers by itself."
        )
    (shape,) = shapes
    return shape[-1], shape[-2] if len(shape) == 3 else None


def split_trained_weights(
    state: Mapping[str, Tensor], base: Base, answers: Answers
) -> dict[str, Any]:
    """Sort weights of the base model that were trained beside the interventions.

    Returns the fields of `Adapter` (`saved`, `lora`, `lora_config`) that they make. Raises
    ConversionError for a LoRA whose alpha was not said, or that is no plain one.
    """
    lora: dict[str, Tensor] = {}
    saved: dict[str, Tensor] = {}
    for name, tensor in state.items():
        plain = name.removeprefix(PEFT_PREFIX).replace(".modules_to_save.default.", ".")
        kind = lora if ".lora_" in plain else saved
        kind[plain.replace(".default.weight", ".weight")] = tensor.detach().contiguous()
    if not lora:
        return {"saved": saved}
    if answers.lora_alpha is None:
        require(
            "The LoRA beside the interventions",
            lora_alpha="the lora_alpha of its LoraConfig (PEFT's own default is 8)",
        )
    parts = {name.rpartition(".lora_")[2] for name in lora}
    ranks = {t.shape[0] for name, t in lora.items() if name.endswith(".lora_A.weight")}
    if len(ranks) != 1 or parts != {"A.weight", "B.weight"}:
        raise ConversionError(
            f"The LoRA beside the interventions has ranks {sorted(ranks)} and tensors lora_"
            f"{', lora_'.join(sorted(parts))}; converted is a plain LoRA of one rank "
            "(lora_A.weight and lora_B.weight)."
        )
    config = LoraConfig(
        r=ranks.pop(),
        lora_alpha=answers.lora_alpha,
        target_modules=sorted({name.partition(".lora_")[0] for name in lora}),
        base_model_name_or_path=base.name,
        task_type=base.task_type,
        inference_mode=True,
    )
    return {"saved": saved, "lora": lora, "lora_config": config}


def head_modules(saved: Mapping[str, Tensor]) -> list[str] | None:
    """Return the modules that weights trained in full belong to, for `modules_to_save`."""
    modules = {name.rpartition(".")[0] for name in saved}
    return sorted(modules) or None


def _skeleton(name: str, task_type: str | None) -> nn.Module:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(resolve(name))
        (architecture, *_) = getattr(config, "architectures", None) or [None]
        with torch.device("meta"):
            own = getattr(transformers, architecture, None) if architecture else None
            if task_type is None and own is not None:
                model = own(config)
            else:
                auto = getattr(transformers, _TASKS[task_type or "FEATURE_EXTRACTION"])
                model = auto.from_config(config)
    except (OSError, ValueError, ReftuneError) as error:
        raise ConversionError(
            f"The config of the base model {name!r} cannot be read, which says where its layers "
            "are. Give a directory that has its config.json, or --layers-path with the path of the "
            f"list of layers, such as model.layers. ({' '.join(str(error).split())})"
        ) from error
    assert isinstance(model, nn.Module)
    return model


def _inside_run(directory: Path) -> Path:
    """Return the adapter of a run's directory, or the directory itself."""
    inner = directory / "adapter"
    return inner if (inner / "adapter_config.json").is_file() else directory


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({k: t.contiguous() for k, t in tensors.items()}, path, metadata={"format": "pt"})
