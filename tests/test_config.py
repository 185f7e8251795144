"""What a config accepts, says when it does not, and keeps when it is saved."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftType, get_peft_config

from reftune import METHODS, PositionError, ReftConfig, ReftConfigError

# One value for each field of our own that is not its default, and what it needs beside it.
OTHER: dict[str, dict[str, Any]] = {
    "method": {"method": "direft"},
    "r": {"r": 3},
    "layers": {"layers": [1, 4]},
    "positions": {"positions": "f2+l1"},
    "tied": {"tied": "sides"},
    "act_fn": {"act_fn": "gelu"},
    "dropout": {"dropout": 0.25},
    "dropout_on": {"dropout_on": "output"},
    "init": {"init": "noop"},
    "short_prompts": {"short_prompts": "pyreft"},
    "edit_generated": {"edit_generated": True},
    "subspaces": {"subspaces": {"german": [0, 1], "chat": [2]}},
    "topk": {"topk": 5},
    "dtype": {"dtype": "bfloat16"},
    "target_modules": {"target_modules": ["mlp", "o_proj"]},
    "layers_path": {"layers_path": "model.layers"},
    "hidden_size": {"hidden_size": 48},
    "modules_to_save": {"modules_to_save": ["score"]},
}
OWN = [f.name for f in fields(ReftConfig) if f.name not in {g.name for g in fields(PeftConfig)}]
INHERITED: dict[str, Any] = {
    "base_model_name_or_path": "some/model",
    "revision": "main",
    "task_type": "CAUSAL_LM",
    "inference_mode": True,
}


def test_each_field_is_covered() -> None:
    assert set(OTHER) == set(OWN)


@pytest.mark.parametrize("name", OWN)
def test_each_field_survives_saving(name: str, tmp_path: Path) -> None:
    config = ReftConfig(**OTHER[name])
    assert getattr(config, name) != getattr(ReftConfig(), name)
    config.save_pretrained(tmp_path)
    for loaded in (ReftConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path)):
        assert isinstance(loaded, ReftConfig)
        assert loaded.to_dict() == config.to_dict()
        assert getattr(loaded, name) == getattr(config, name)
        assert type(getattr(loaded, name)) is type(getattr(config, name))


@pytest.mark.parametrize("name", INHERITED)
def test_fields_of_peft_survive_saving(name: str, tmp_path: Path) -> None:
    config = ReftConfig(**{name: INHERITED[name]})
    config.save_pretrained(tmp_path)
    assert getattr(ReftConfig.from_pretrained(tmp_path), name) == INHERITED[name]


@pytest.mark.parametrize("method", METHODS)
def test_each_method_survives_saving(method: str, tmp_path: Path) -> None:
    config = ReftConfig(method=method)
    config.save_pretrained(tmp_path)
    loaded = ReftConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.intervention is METHODS[method]
    assert loaded.checkpoint == tmp_path
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == "REFT"
    assert "_checkpoint" not in stored


def test_peft_knows_the_type() -> None:
    assert ReftConfig().peft_type is PeftType("REFT")
    assert PeftType("REFT") in list(PeftType)
    assert isinstance(get_peft_config({"peft_type": "REFT", "r": 2}), ReftConfig)


@pytest.mark.parametrize(
    ("method", "r"),
    [(name, None if not cls.has_rank else cls.fixed_rank or 8) for name, cls in METHODS.items()],
)
def test_default_rank(method: str, r: int | None) -> None:
    assert ReftConfig(method=method).r == r


WRONG: list[tuple[dict[str, Any], list[str]]] = [
    ({"method": "loraft"}, ["method is 'loraft'", "noreft", "Did you mean 'loreft'?"]),
    ({"method": "zzz"}, ["method is 'zzz'", "accepted are loreft, noreft"]),
    ({"tied": "side"}, ["tied is 'side'", "all, sides, none", "Did you mean 'sides'?"]),
    ({"tied": True}, ["tied is True", "all, sides, none"]),
    ({"dropout_on": "edits"}, ["dropout_on is 'edits'", "edit, output", "Did you mean 'edit'?"]),
    ({"init": "zero"}, ["init is 'zero'", "paper, noop"]),
    ({"short_prompts": "pyref"}, ["short_prompts is 'pyref'", "Did you mean 'pyreft'?"]),
    ({"dtype": "float"}, ["dtype is 'float'", "bfloat16", "Did you mean"]),
    ({"dtype": torch.float32}, ["dtype is torch.float32", "Did you mean 'float32'?"]),
    ({"r": 0}, ["r is 0", "a whole number from 1"]),
    ({"r": True}, ["r is True", "a whole number from 1"]),
    ({"r": 1.5}, ["r is 1.5", "a whole number from 1"]),
    ({"method": "red", "r": 4}, ["'red' has no rank", "leave r out"]),
    ({"method": "reft_r1", "r": 4}, ["'reft_r1' has rank 1", "got r=4"]),
    ({"layers": "first"}, ["layers is 'first'", "'all', a list of layer numbers, or '3;9;18;24'"]),
    ({"layers": []}, ["layers is []", "'all'"]),
    ({"layers": [1.0]}, ["layers is [1.0]", "'all'"]),
    ({"layers": [True]}, ["layers is [True]", "'all'"]),
    ({"layers": None}, ["layers is None", "'all'"]),
    ({"layers": "3;9;3"}, ["'3;9;3'", "names a layer twice"]),
    ({"dropout": 1.0}, ["dropout is 1.0", "0 <= dropout < 1"]),
    ({"dropout": -0.1}, ["dropout is -0.1", "0 <= dropout < 1"]),
    ({"topk": 0}, ["topk is 0", "a whole number from 1"]),
    ({"method": "consreft", "act_fn": "relu"}, ["'consreft' has no activation", "act_fn"]),
    ({"tied": "none", "positions": "all"}, ["tied='none'", "positions='all'", "Use tied='all'"]),
    ({"tied": "none", "method": "reft_r1"}, ["tied='none'", "method='reft_r1'"]),
    ({"subspaces": {"a": [8]}}, ["subspace 'a' has rows [8]", "row numbers 0 to 7"]),
    ({"subspaces": {"a": [-1]}}, ["subspace 'a' has rows [-1]"]),
    ({"subspaces": {"a": []}}, ["subspace 'a' has rows []"]),
    ({"subspaces": {"a": [0]}, "method": "red"}, ["'red' has no subspaces"]),
    ({"subspaces": {"a": [0]}, "method": "reft_r1"}, ["'reft_r1' has no subspaces"]),
]


@pytest.mark.parametrize(("settings", "says"), WRONG, ids=[str(s) for s, _ in WRONG])
def test_errors_say_what_we_got_and_what_is_accepted(
    settings: dict[str, Any], says: list[str]
) -> None:
    with pytest.raises(ReftConfigError) as error:
        ReftConfig(**settings)
    assert [part for part in says if part not in str(error.value)] == []
    assert isinstance(error.value, ValueError)


def test_wrong_positions() -> None:
    with pytest.raises(PositionError, match="positions is 'first'; accepted are 'f7'"):
        ReftConfig(positions="first")


def test_rank_over_the_width() -> None:
    with pytest.raises(ReftConfigError, match=r"r=33 is more than the width .* 32"):
        ReftConfig(r=33).shape(32)
    assert ReftConfig(r=32).shape(32).rank == 32


def test_unknown_subspace() -> None:
    config = ReftConfig(subspaces={"german": [1, 0], "chat": [5, 1]})
    assert config.subspace_rows(["chat", "german"]) == [0, 1, 5]
    with pytest.raises(ReftConfigError, match=r"'germn'.*\['chat', 'german'\].*mean 'german'"):
        config.subspace_rows(["germn"])


def test_unknown_key_is_an_error() -> None:
    with pytest.raises(TypeError, match="rank"):
        ReftConfig(rank=4)


@pytest.mark.parametrize("key", ["postions", "loraft_alpha"])
def test_unknown_key_in_a_file_is_not_silent(key: str, tmp_path: Path) -> None:
    """A misspelt setting must not become its default without a word."""
    ReftConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: "f1"}))
    with pytest.warns(UserWarning, match=key):
        ReftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("given", "layers"),
    [
        ("all", "all"),
        ("3;9;18", [3, 9, 18]),
        ("18, 3", [3, 18]),
        ([9, 3], [3, 9]),
        ((1, 0), [0, 1]),
        (5, [5]),
        ("0", [0]),
    ],
)
def test_layers_are_read(given: Any, layers: Any) -> None:
    assert ReftConfig(layers=given).layers == layers


def test_sets_of_modules_are_sorted_for_the_file(tmp_path: Path) -> None:
    config = ReftConfig(target_modules={"b", "a"})
    assert config.target_modules == ["a", "b"]
    config.save_pretrained(tmp_path)
    assert ReftConfig.from_pretrained(tmp_path).target_modules == ["a", "b"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_parameters_have_the_dtype(dtype: str) -> None:
    phi = ReftConfig(dtype=dtype).build(16)
    assert {p.dtype for p in phi.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize(("tied", "groups"), [("all", 1), ("sides", 2), ("none", 5)])
@pytest.mark.parametrize("method", METHODS)
def test_number_of_parameters(method: str, tied: str, groups: int) -> None:
    """Count as in the paper: 2 d r + r for each Phi, d r + r where the edit is constant."""
    if tied == "none" and METHODS[method].pools_tokens:
        tied, groups = "sides", 2
    phi = ReftConfig(method=method, tied=tied, positions="f2+l3").build(16)
    each = {"red": 2 * 16, "reft_r1": 16, "consreft": 8 * 17, "lobireft": 8 * 17}
    expected = groups * each.get(method, 2 * 16 * 8 + 8)
    assert sum(p.numel() for p in phi.parameters()) == expected
