"""What an adapter is: `ReftConfig`, PEFT's configuration of a representation finetuning."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.utils import PeftType

from reftune.errors import ReftConfigError, did_you_mean
from reftune.interventions import METHODS, Intervention, Shape
from reftune.positions import SHORT_PROMPTS, TIED, Positions

_DTYPES = ("float32", "float16", "bfloat16", "float64")


def _peft_type() -> PeftType:
    """Return `PeftType.REFT`, added to PEFT's enum where PEFT does not have it.

    PEFT and transformers read `peft_type.value` and look the member up by name, so a plain string
    will not do; Python's enums cannot be subclassed once they have members.
    """
    if "REFT" not in PeftType.__members__:
        member = str.__new__(PeftType, "REFT")
        member._name_, member._value_ = "REFT", "REFT"
        type.__setattr__(PeftType, "REFT", member)
        PeftType._member_map_["REFT"] = member
        PeftType._member_names_.append("REFT")
        PeftType._value2member_map_["REFT"] = member
    return PeftType("REFT")


REFT = _peft_type()


@dataclass
class ReftConfig(PeftConfig):  # type: ignore[misc]
    """Configure a ReFT adapter: which method edits which tokens of which layers.

    The defaults are the paper's setting for commonsense and arithmetic reasoning (Wu et al. 2024).

    Args:
        method: the formula; see `reftune.METHODS`.
        r: rank, the number of directions that are edited; default 8. `red` has none, `reft_r1` 1.
        layers: "all", or the layers' numbers from 0: [3, 9, 18, 24] or "3;9;18;24". The output of
            each is edited.
        positions: which tokens of the prompt: "f7+l7" (its first 7 and last 7), "f3", "l1", "all".
        tied: "all" one Phi per layer; "sides" one for the prefix and one for the suffix (what the
            paper's code calls untied); "none" one per position.
        act_fn: activation applied to W h + b, a name of transformers' `ACT2FN`; None is linear.
        dropout: probability, in training only.
        dropout_on: "edit" drops out the edit; "output" drops out h + edit, as pyreft does.
        init: "paper" (random), or "noop": the adapter starts as the identity.
        short_prompts: how positions shrink in a prompt with fewer tokens than they name: by the
            rule of the "paper", of "pyreft" (floors both sides, always), or by "overlap" (of
            adapters: the suffix in full, the prefix what is left).
        edit_generated: edit generated tokens, too (steering); they get the Phi of the suffix.
        subspaces: names for sets of rows of R, e.g. {"german": [0, 1], "chat": [2, 3]}; an example
            that names some edits only these rows.
        topk: how many of an example's tokens `reft_r1` averages over.
        dtype: of the adapter's parameters and of its arithmetic.
        target_modules: names (or one regular expression) of modules whose output is edited, in
            place of `layers`.
        layers_path: the module path of the list of layers, e.g. "model.layers", for a model where
            it cannot be told.
        hidden_size: width of the edited states, where it cannot be told.
        modules_to_save: modules trained and saved in full, such as a classification head.
    """

    method: str = field(
        default="loreft",
        metadata={"help": "formula of the edit: loreft, noreft, direft, ... (reftune.METHODS)"},
    )
    r: int | None = field(
        default=None, metadata={"help": "rank, how many directions are edited; default 8"}
    )
    layers: str | list[int] = field(
        default="all", metadata={"help": 'numbers from 0, as [3, 9] or "3;9", or all'}
    )
    positions: str = field(
        default="f7+l7", metadata={"help": "prompt tokens to edit: f7+l7, f3, l1, all"}
    )
    tied: str = field(
        default="all", metadata={"help": "which positions share a Phi: all, sides or none"}
    )
    act_fn: str | None = field(
        default=None, metadata={"help": "activation on W h + b, a name of transformers' ACT2FN"}
    )
    dropout: float = field(default=0.0, metadata={"help": "dropout probability"})
    dropout_on: str = field(
        default="edit", metadata={"help": "what is dropped out: edit, or output as in pyreft"}
    )
    init: str = field(
        default="paper", metadata={"help": "paper (random), or noop: starts as the identity"}
    )
    short_prompts: str = field(
        default="paper",
        metadata={"help": "rule for prompts shorter than the positions: paper, pyreft, overlap"},
    )
    edit_generated: bool = field(default=False, metadata={"help": "edit generated tokens, too"})
    subspaces: dict[str, list[int]] | None = field(
        default=None, metadata={"help": "named sets of rows of R"}
    )
    topk: int = field(default=8, metadata={"help": "tokens that reft_r1 averages over"})
    dtype: str = field(
        default="float32", metadata={"help": "of the adapter's parameters and arithmetic"}
    )
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "modules to edit in place of layers"}
    )
    layers_path: str | None = field(default=None, metadata={"help": "path of the layer list"})
    hidden_size: int | None = field(default=None, metadata={"help": "width of the states"})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "modules trained and saved in full"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = REFT
        for name, accepted in (
            ("method", tuple(METHODS)),
            ("tied", TIED),
            ("dropout_on", ("edit", "output")),
            ("init", ("paper", "noop")),
            ("short_prompts", SHORT_PROMPTS),
            ("dtype", _DTYPES),
        ):
            _check_choice(name, getattr(self, name), accepted)
        self.layers = _parse_layers(self.layers)
        self.r = self._check_rank()
        self._check_combination()
        if isinstance(self.target_modules, set | tuple):
            self.target_modules = sorted(self.target_modules)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> ReftConfig:
        """Load a config from a directory or the Hub, as `peft.PeftConfig.from_pretrained` does.

        It remembers a directory, so that the weights beside it are checked before a model is
        touched.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        if isinstance(config, ReftConfig):
            object.__setattr__(config, "_checkpoint", folder if folder.is_dir() else None)
        assert isinstance(config, PeftConfig)
        return cast(ReftConfig, config)

    @property
    def checkpoint(self) -> Path | None:
        """Return the directory that this config was loaded from."""
        return vars(self).get("_checkpoint")

    @property
    def is_loaded(self) -> bool:
        """Return whether this config was saved with an adapter."""
        return "_checkpoint" in vars(self)

    @property
    def intervention(self) -> type[Intervention]:
        """Return the class of the method."""
        return METHODS[self.method]

    @property
    def parsed_positions(self) -> Positions:
        """Return `positions` as numbers."""
        return Positions.parse(self.positions)

    def shape(self, hidden_size: int) -> Shape:
        """Return what determines the parameters of one layer of width `hidden_size`.

        Raises ReftConfigError where the rank exceeds the width.
        """
        rank = self.r or 0
        if rank > hidden_size:
            raise ReftConfigError(
                f"r={rank} is more than the width of the hidden states, {hidden_size}. "
                "Give an r of at most that; 4 to 32 is usual."
            )
        return Shape(
            hidden_size=hidden_size,
            rank=rank,
            groups=self.parsed_positions.num_groups(self.tied),
            act_fn=self.act_fn,
            topk=self.topk,
            init=self.init,
        )

    def build(self, hidden_size: int) -> Intervention:
        """Return a fresh intervention for one layer of width `hidden_size`."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return self.intervention(self.shape(hidden_size), dtype)

    def formula(self, hidden_size: int) -> Intervention:
        """Return what `build` does, without values, shared by all that have the same shape."""
        return _formula(self.intervention, self.shape(hidden_size), getattr(torch, self.dtype))

    def subspace_rows(self, names: list[str]) -> list[int]:
        """Return the rows of R that the named subspaces have.

        Raises ReftConfigError for a name that the config does not have.
        """
        known = self.subspaces or {}
        for name in names:
            if name not in known:
                raise ReftConfigError(
                    f"There is no subspace {name!r}; this adapter has {sorted(known) or 'none'}."
                    + did_you_mean(name, sorted(known))
                )
        return sorted({row for name in names for row in known[name]})

    def _check_rank(self) -> int | None:
        method = self.intervention
        if not method.has_rank:
            if self.r is not None:
                raise ReftConfigError(f"method={self.method!r} has no rank; leave r out.")
            return None
        if method.fixed_rank is not None:
            if self.r not in (None, method.fixed_rank):
                raise ReftConfigError(
                    f"method={self.method!r} has rank {method.fixed_rank}, got r={self.r}."
                )
            return method.fixed_rank
        r = 8 if self.r is None else self.r
        if not isinstance(r, int) or isinstance(r, bool) or r < 1:
            raise ReftConfigError(f"r is {r!r}; accepted is a whole number from 1.")
        return r

    def _check_combination(self) -> None:
        positions, method = self.parsed_positions, self.intervention
        if not 0.0 <= self.dropout < 1.0:
            raise ReftConfigError(f"dropout is {self.dropout}; accepted is 0 <= dropout < 1.")
        if self.topk < 1:
            raise ReftConfigError(f"topk is {self.topk}; accepted is a whole number from 1.")
        if self.act_fn is not None and not method.has_activation:
            raise ReftConfigError(f"method={self.method!r} has no activation; leave act_fn out.")
        if self.tied == "none" and (positions.everything or method.pools_tokens):
            raise ReftConfigError(
                "tied='none' has one Phi per position, which needs counted positions such as "
                f"'f7+l7' and a method that edits tokens one by one; got positions="
                f"{self.positions!r}, method={self.method!r}. Use tied='all'."
            )
        if self.subspaces is not None:
            self._check_subspaces(self.r)

    def _check_subspaces(self, r: int | None) -> None:
        if r is None or self.intervention.pools_tokens:
            raise ReftConfigError(f"method={self.method!r} has no subspaces; leave them out.")
        for name, rows in (self.subspaces or {}).items():
            if not rows or not all(isinstance(i, int) and 0 <= i < r for i in rows):
                raise ReftConfigError(
                    f"subspace {name!r} has rows {rows}; accepted are row numbers 0 to {r - 1}."
                )


def _check_choice(name: str, value: object, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ReftConfigError(
            f"{name} is {value!r}; accepted are {', '.join(accepted)}."
            + did_you_mean(str(value), list(accepted))
        )


def _parse_layers(layers: str | list[int] | tuple[int, ...] | int) -> str | list[int]:
    if layers == "all":
        return "all"
    try:
        if isinstance(layers, str):
            numbers = [int(part) for part in layers.replace(",", ";").split(";")]
        else:
            numbers = [layers] if isinstance(layers, int) else list(layers)
        if not numbers or not all(type(n) is int for n in numbers):
            raise ValueError
    except (TypeError, ValueError):
        raise ReftConfigError(
            f"layers is {layers!r}; accepted are 'all', a list of layer numbers, or '3;9;18;24'."
        ) from None
    if len(set(numbers)) != len(numbers):
        raise ReftConfigError(f"layers is {layers!r}; it names a layer twice.")
    return sorted(numbers)


@functools.lru_cache(maxsize=256)
def _formula(kind: type[Intervention], shape: Shape, dtype: torch.dtype) -> Intervention:
    """Return an intervention without values: its formula, its parameters' names and shapes."""
    with torch.device("meta"):
        return kind(replace(shape, init="paper"), dtype).requires_grad_(False).eval()
