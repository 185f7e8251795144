"""What a run is: `RunConfig`, one YAML file, every key with a type, a default and a help text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from peft import PeftConfig
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, create_model

from reftune.config import ReftConfig
from reftune.errors import PositionError, ReftConfigError, did_you_mean
from reftune.interventions import METHODS
from reftune.methods import BASELINES, WEIGHT_METHODS, peft_config, settings_of
from reftune.models import DType
from reftune.prompts import LongPrompts, TemplateName
from reftune.quantised import Trainable
from reftune.tasks.leaks import LeakRule
from reftune.train import TrainSettings

_FROZEN = ConfigDict(extra="forbid", frozen=True)


def _adapter_settings() -> type[BaseModel]:
    """Return a model of `ReftConfig`'s own fields: defaults and help are written once, there."""
    inherited = {field.name for field in dataclasses.fields(PeftConfig)}
    hints = get_type_hints(ReftConfig)
    fields: dict[str, Any] = {
        f.name: (hints[f.name], Field(f.default, description=f.metadata["help"]))
        for f in dataclasses.fields(ReftConfig)
        if f.name not in inherited
    }
    return create_model("AdapterSettings", __config__=_FROZEN, **fields)


AdapterSettings = _adapter_settings()
BaselineSettings: Mapping[str, type[BaseModel]] = {name: settings_of(name) for name in BASELINES}


def _kind(values: Any) -> str:
    """Return which model reads a section `adapter`: "reft", or the name of a baseline."""
    found = values.get("method") if isinstance(values, Mapping) else values.method
    return found if isinstance(found, str) and found in BASELINES else "reft"


# Union[...] of what is only known at run time: | does not make it.
AnySettings: Any = Annotated[
    Union[
        (
            Annotated[AdapterSettings, Tag("reft")],
            *(Annotated[model, Tag(name)] for name, model in BaselineSettings.items()),
        )
    ],
    Discriminator(_kind),
]


class DataSettings(BaseModel):
    """What to learn from."""

    model_config = _FROZEN

    train: str | list[str] = Field(
        description="files (json, jsonl, csv, parquet), directories, Hub data sets, or 'demo'; "
        "or names of tasks that have a training split, read from data_dir"
    )
    heldout: str | None = Field(None, description="a data set whose loss is measured at the end")
    heldout_fraction: float = Field(
        0.0, ge=0, lt=1, description="share of the training data to hold out instead"
    )
    data_dir: str | None = Field(
        None,
        description="folder of task data, in LLM-Adapters' layout; null or 'hub': the Hub's own",
    )
    leaks: LeakRule = Field(
        "refuse",
        description="training data with questions that evaluate.tasks ask; drop: not to train on "
        "them",
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="our column names to the data's, e.g. {prompt: question}"
    )
    system: str | None = Field(None, description="system message before each prompt")
    template: TemplateName = Field("auto", description="how a prompt becomes text")
    max_length: int = Field(512, ge=2, description="tokens of prompt and completion")
    long_prompts: LongPrompts = Field("error", description="prompts that leave no room")
    limit: int | None = Field(None, ge=1, description="use the first so many examples")
    cache_dir: str | None = Field(
        "auto",
        description="folder where tokens are kept for the next run; auto: tokens in $REFTUNE_CACHE "
        "(~/.cache/reftune), for large data; null: they are not kept",
    )
    num_proc: int | None = Field(
        None, ge=1, description="processes that tokenise; default: more than one for large data"
    )
    streaming: bool = Field(
        False, description="read Hub data sets row by row, anew in each run, without a download"
    )


class EvaluateSettings(BaseModel):
    """What to measure after training."""

    model_config = _FROZEN

    tasks: list[str] = Field(default_factory=list, description="names of tasks")
    split: Literal["test", "validation"] = Field(
        "test", description="validation: training rows held out, to tune settings on"
    )
    decoding: Literal["published", "greedy", "sampling"] = Field(
        "published", description="published: as the paper's commands decode a task"
    )
    max_new_tokens: int | None = Field(None, ge=1, description="default: the task's own")
    limit: int | None = Field(None, ge=1, description="the first so many examples of each task")
    batch_size: int = Field(16, ge=1, description="prompts per batch")
    base: bool = Field(True, description="also evaluate the base model")
    show: int = Field(4, ge=0, description="replies of base and adapter shown side by side")


class ClassifySettings(BaseModel):
    """How a classifier is scored (task_type: seq_cls)."""

    model_config = _FROZEN

    protocol: Literal["paper", "plain"] = Field(
        "paper",
        description="paper: one part of the validation split chooses the epoch, the other is "
        "scored; plain: the last epoch is scored on the whole",
    )
    head_dropout: float | None = Field(
        None, ge=0, lt=1, description="dropout of the head; default: the model's own"
    )


class RunConfig(BaseModel):
    """One run: train an adapter on a model, evaluate it, and keep all that in a directory."""

    model_config = _FROZEN

    name: str = Field(description="the run's directory below output_dir", pattern=r"^\w[\w.\-]*$")
    model: str = Field("smollm2-135m", description="an embedded model, a directory or a Hub id")
    task_type: Literal["causal_lm", "seq_cls"] = Field(
        "causal_lm", description="seq_cls: an encoder and its head learn a set of GLUE"
    )
    dtype: DType = Field("auto", description="of the base model's weights")
    quantization: Trainable | None = Field(
        None, description="load the base in 8 or 4 bits, by bitsandbytes or torchao"
    )
    attn_implementation: str | None = Field(None, description="as transformers names it")
    seed: int = Field(42, ge=0, description="of initialisation, data order and dropout")
    output_dir: str = Field("runs", description="where runs are kept")
    adapter: AnySettings = Field(
        default_factory=AdapterSettings,
        description="see ReftConfig; or another method to compare with, and its own keys",
    )
    data: DataSettings
    train: TrainSettings = Field(default_factory=TrainSettings)  # type: ignore[arg-type]
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings)  # type: ignore[arg-type]
    classify: ClassifySettings = Field(default_factory=ClassifySettings)  # type: ignore[arg-type]

    @property
    def directory(self) -> Path:
        """Return where the run is kept."""
        return Path(self.output_dir).expanduser() / self.name

    @property
    def method(self) -> str:
        """Return what is trained: a method of ReFT's, or one of `methods.BASELINES`."""
        return str(self.adapter.method)

    def reft_config(self) -> ReftConfig:
        """Return the adapter's PEFT config, of a run of ReFT. Raises ReftConfigError."""
        config = self.peft_config()
        assert isinstance(config, ReftConfig), self.method
        return config

    def peft_config(self) -> PeftConfig | None:
        """Return the config that PEFT attaches; None where the base model's weights are trained.

        Raises ReftConfigError.
        """
        fields = self.adapter.model_dump()
        if self.method in WEIGHT_METHODS:
            return None
        if self.method in BASELINES:
            return peft_config(self.method, fields, self.task_type.upper())
        return ReftConfig(task_type=self.task_type.upper(), **fields)

    def to_yaml(self) -> str:
        """Return every key with its value."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML; `overrides` are "train.learning_rate=1e-3", "adapter.r=4", ...

    Raises ReftConfigError naming the key and what is accepted; for an unknown key, the nearest.
    """
    values = read_yaml(path)
    for override in overrides:
        apply_override(values, override)
    if found := [key for key in ("methods", "grid", "seeds") if key in values]:
        raise ReftConfigError(
            f"{path} has {' and '.join(found)}: it is an experiment of several runs. Run it by: "
            f"reftune experiment {path}"
        )
    return parse_config(values, str(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return a YAML file's keys and values. Raises ReftConfigError."""
    path = Path(path)
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ReftConfigError(
            f"There is no config file {str(path)!r}."
            + did_you_mean(str(path), near)
            + " A config is a YAML file; `reftune config` prints every key."
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ReftConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ReftConfigError(f"{path} holds {type(values).__name__}, a config is keys and values.")
    return values


def parse_config(values: Mapping[str, Any], where: str) -> RunConfig:
    """Check a run's keys and values; see `load_config`."""
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise ReftConfigError(f"{where}: " + "; ".join(_problems(error))) from error
    try:
        if config.method not in (*METHODS, *BASELINES):
            raise ReftConfigError(
                f"method is {config.method!r}; accepted: {', '.join((*METHODS, *BASELINES))}."
                + did_you_mean(config.method, [*METHODS, *BASELINES])
            )
        _check_dtype(config)
        _check_quantization(config)
        config.peft_config()  # its own checks, before any model is loaded
    except (ReftConfigError, PositionError) as error:
        raise ReftConfigError(f"{where}: adapter: {error}") from error
    return config


def _check_dtype(config: RunConfig) -> None:
    if config.task_type == "seq_cls" and config.dtype == "float16":
        raise ReftConfigError(
            "dtype: float16 does not go with task_type: seq_cls, whose head is trained in it and "
            "soon has no numbers. Use float32 or bfloat16."
        )


def _check_quantization(config: RunConfig) -> None:
    if config.quantization is None:
        return
    unfit = {
        "task_type: seq_cls": config.task_type == "seq_cls",
        f"method: {config.method}, which trains weights": config.method in WEIGHT_METHODS,
        "train.offload_base": config.train.offload_base,
        "train.fsdp, which does not spread quantised weights": config.train.fsdp,
    }
    for key, is_so in unfit.items():
        if is_so:
            raise ReftConfigError(
                f"quantization: {config.quantization} does not go with {key}; leave one out."
            )


def describe(method: str = "loreft") -> Iterator[tuple[str, str, str, str]]:
    """Yield (key, type, default, help) of every key, in the order of the file.

    The keys of `adapter` are those of `method`; all methods of ReFT have the same.
    """
    yield from _describe(RunConfig, "", BaselineSettings.get(method, AdapterSettings))


def _describe(
    model: type[BaseModel], prefix: str, adapter: type[BaseModel]
) -> Iterator[tuple[str, str, str, str]]:
    for name, field in model.model_fields.items():
        annotation = adapter if prefix + name == "adapter" else field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from _describe(annotation, f"{prefix}{name}.", adapter)
            continue
        default = (
            "(required)"
            if field.is_required()
            else yaml_value(field.get_default(call_default_factory=True))
        )
        yield f"{prefix}{name}", _type_name(annotation), default, field.description or ""


def keys_ending(name: str, methods: Sequence[str] = ("loreft", *BASELINES)) -> list[str]:
    """Return the keys of runs of these methods that end in `name`: of "r", "adapter.r"."""
    rows = (row for method in methods for row in describe(method))
    return list(dict.fromkeys(key for key, *_ in rows if key.rpartition(".")[2] == name))


def yaml_value(value: Any) -> str:
    """Return a value as YAML writes it on one line."""
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def _type_name(annotation: Any) -> str:
    args = get_args(annotation)
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, args))
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(_type_name(a) for a in args)
    if annotation is type(None):
        return "null"
    return annotation.__name__ if isinstance(annotation, type) and not args else str(annotation)


def apply_override(values: dict[str, Any], text: str) -> None:
    """Set what "train.learning_rate=1e-3" says. Raises ReftConfigError."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ReftConfigError(
            f"{text!r} is no override; accepted is key=value, e.g. train.learning_rate=1e-3."
        )
    try:
        set_key(values, key, yaml.safe_load(value))
    except yaml.YAMLError as error:
        raise ReftConfigError(f"{text!r}: {value!r} is not a YAML value: {error}") from error


def set_key(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a key such as "train.learning_rate", making its section. Raises ReftConfigError."""
    at, (*sections, last) = values, key.split(".")
    for part in sections:
        at = at.setdefault(part, {})
        if not isinstance(at, dict):
            raise ReftConfigError(f"{key!r}: {part!r} is a value, it has no keys below it.")
    at[last] = value


def _problems(error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        place = [str(part) for part in problem["loc"]]
        method = "loreft"
        if place[0] == "adapter" and len(place) > 1:
            method = place.pop(1)  # which of the sections `adapter` was meant
        keys = [row[0] for row in describe(method)]
        key = ".".join(place)
        if problem["type"] == "extra_forbidden":
            same = " or ".join(map(repr, keys_ending(place[-1], [method])))
            near = (
                (f" Did you mean {same}?" if same else "")
                or did_you_mean(key, keys)
                or did_you_mean(place[-1], [k.rpartition(".")[2] for k in keys])
            )
            yield f"there is no key {key!r}.{near or ' `reftune config` prints every key.'}"
        elif problem["type"] == "missing":
            yield f"the key {key!r} is missing"
        else:
            yield f"{key} is {problem['input']!r}: {problem['msg'].lower()}"
