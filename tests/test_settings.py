"""RunConfig: what a YAML says, and what it says when it is wrong."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from peft import PeftConfig

from reftune.config import ReftConfig
from reftune.errors import ReftConfigError
from reftune.settings import RunConfig, describe, load_config, parse_config

MINIMAL = {"name": "x", "data": {"train": "demo"}}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_a_resolved_config_reads_back_as_itself(tmp_path: Path) -> None:
    config = parse_config({**MINIMAL, "adapter": {"r": 3, "layers": [1, 2]}}, "here")
    assert load_config(write(tmp_path, config.to_yaml())) == config


def test_the_adapter_section_has_exactly_reft_configs_own_fields() -> None:
    inherited = {f.name for f in dataclasses.fields(PeftConfig)}
    own = {f.name for f in dataclasses.fields(ReftConfig)} - inherited
    described = {k.removeprefix("adapter.") for k, *_ in describe() if k.startswith("adapter.")}
    assert described == own


def test_every_key_has_a_meaning() -> None:
    assert [key for key, _, _, meaning in describe() if not meaning] == []


def test_adapter_settings_reach_the_peft_config() -> None:
    config = parse_config({**MINIMAL, "adapter": {"r": 3, "positions": "l2"}}, "here")
    adapter = config.reft_config()
    assert (adapter.r, adapter.positions, adapter.task_type) == (3, "l2", "CAUSAL_LM")


def test_overrides_are_read_as_yaml_and_make_sections() -> None:
    path = Path(__file__).parent.parent / "recipes" / "demo.yaml"
    config = load_config(path, ["train.learning_rate=1e-3", "adapter.layers=[3, 4]", "name=b"])
    assert config.train.learning_rate == 1e-3
    assert config.reft_config().layers == [3, 4]
    assert config.name == "b"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"train": {"learning_rat": 1}}, "Did you mean 'train.learning_rate'"),
        ({"modle": "x"}, "Did you mean 'model'"),
        ({"adapter": {"rank": 4}}, "no key 'adapter.rank'"),
        ({"train": {"batch_size": 0}}, "train.batch_size is 0"),
        ({"train": {"epochs": "many"}}, "train.epochs is 'many'"),
        ({"adapter": {"method": "lorefft"}}, "Did you mean 'loreft'"),
        ({"adapter": {"positions": "f7-l7"}}, "accepted are 'f7'"),
        ({"name": "a/b"}, "name is 'a/b'"),
        ({"data": {}}, "'data.train' is missing"),
    ],
)
def test_a_wrong_config_says_what_is_accepted(change: dict[str, object], says: str) -> None:
    with pytest.raises(ReftConfigError, match=says.replace("(", r"\(")):
        parse_config({**MINIMAL, **change}, "run.yaml")


def test_bad_files_and_overrides_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ReftConfigError, match="no config file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ReftConfigError, match="not YAML"):
        load_config(write(tmp_path, "a: [1"))
    with pytest.raises(ReftConfigError, match="holds list"):
        load_config(write(tmp_path, "- 1"))
    good = write(tmp_path, yaml.safe_dump(MINIMAL))
    with pytest.raises(ReftConfigError, match="no override"):
        load_config(good, ["train.epochs"])
    with pytest.raises(ReftConfigError, match="no keys below"):
        load_config(good, ["name.x=1"])


@pytest.mark.parametrize(
    "recipe", sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
)
def test_recipes_are_valid(recipe: Path) -> None:
    assert isinstance(load_config(recipe), RunConfig)


def test_a_classifier_is_not_trained_in_float16() -> None:
    values = {**MINIMAL, "task_type": "seq_cls", "dtype": "float16"}
    with pytest.raises(ReftConfigError, match="float16 does not go with task_type: seq_cls"):
        parse_config(values, "x")
