"""`adapter: reft` in axolotl, against its published plugin interface."""

import inspect
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model
from pydantic import ValidationError

import axolotl_standin as axolotl
from adapted_tiny import batch, logits, optimise, strong, trainable
from reftune import ReftConfig
from reftune.errors import ReftConfigError
from tiny import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

ROOT = Path(__file__).parent.parent
YAML = {"adapter": "reft", "reft": {"r": 2, "positions": "f1+l2", "layers": [1]}}


@pytest.fixture
def plugin() -> Iterator[Any]:
    """Return the plugin that the entry point names."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    with axolotl.installed():
        yield axolotl.load_plugin(points["axolotl.plugins"]["reft"])


def test_its_hooks_have_the_published_parameters(plugin: Any) -> None:
    assert isinstance(plugin, axolotl.BasePlugin)
    own = {name for name in vars(type(plugin)) if not name.startswith("_")}
    assert own == set(axolotl.SIGNATURES)
    for name, parameters in axolotl.SIGNATURES.items():
        assert list(inspect.signature(getattr(type(plugin), name)).parameters) == parameters


def test_the_adapter_is_what_its_keys_say(plugin: Any) -> None:
    torch.manual_seed(0)
    model, config = plugin.load_adapter(tiny_llama(), axolotl.validated(plugin, YAML))
    wanted = ReftConfig(task_type="CAUSAL_LM", r=2, positions="f1+l2", layers=[1])
    for key in ("method", "r", "positions", "layers", "task_type", "tied", "dropout"):
        assert getattr(config, key) == getattr(wanted, key), key
    torch.manual_seed(0)
    ours = get_peft_model(tiny_llama(), wanted)
    assert torch.equal(logits(strong(model.eval())), logits(strong(ours.eval())))
    assert set(trainable(model)) == set(trainable(ours))


def test_what_it_trained_is_loaded_again(plugin: Any, tmp_path: Path) -> None:
    model, _ = plugin.load_adapter(tiny_llama(), axolotl.validated(plugin, YAML))
    before = model(**batch()).loss.item()
    optimise(model, torch.optim.AdamW(trainable(model).values(), lr=1e-2), 20)
    assert model(**batch()).loss.item() < before
    model.save_pretrained(str(tmp_path))
    cfg = axolotl.validated(plugin, YAML | {"lora_model_dir": str(tmp_path)})
    loaded, config = plugin.load_adapter(tiny_llama(), cfg, inference=True)
    assert isinstance(loaded, PeftModel)
    assert torch.equal(logits(loaded.eval()), logits(model.eval()))
    assert not trainable(loaded)
    assert config.layers == [1]
    again, _ = plugin.load_adapter(tiny_llama(), cfg)
    assert trainable(again)


def test_trainers_of_preferences_get_the_config_alone(plugin: Any) -> None:
    base = tiny_llama()
    model, config = plugin.load_adapter(base, axolotl.validated(plugin, YAML), config_only=True)
    assert model is None
    assert isinstance(config, ReftConfig)
    assert not any("reft" in name for name, _ in base.named_modules())


def test_defaults_are_the_papers_and_other_adapters_are_not_touched(plugin: Any) -> None:
    _, config = plugin.load_adapter(tiny_llama(), axolotl.validated(plugin, {"adapter": "reft"}))
    assert (config.r, config.positions, config.method) == (8, "f7+l7", "loreft")
    assert plugin.load_adapter(tiny_llama(), axolotl.DictDefault(adapter="lora")) is None


def test_the_example_is_accepted(plugin: Any) -> None:
    values = yaml.safe_load((ROOT / "examples" / "axolotl.yaml").read_text())
    _, config = plugin.load_adapter(tiny_llama(), axolotl.validated(plugin, values))
    assert (config.positions, config.layers) == ("f7+l7", "all")


def test_wrong_keys_are_said(plugin: Any) -> None:
    with pytest.raises(ValidationError, match="postions"):
        axolotl.validated(plugin, {"adapter": "reft", "reft": {"postions": "f1"}})
    with pytest.raises(ReftConfigError, match="lora_r are LoRA's.*below `reft:`"):
        plugin.load_adapter(tiny_llama(), axolotl.validated(plugin, YAML | {"lora_r": 8}))


def test_packing_is_for_attention_that_keeps_examples_apart(plugin: Any) -> None:
    packed = YAML | {"sample_packing": True}
    with pytest.raises(ReftConfigError, match="flash_attention_2, or sample_packing: false"):
        plugin.load_adapter(tiny_llama(), axolotl.validated(plugin, packed))
    apart = packed | {"attn_decontaminates_packing": True}
    assert plugin.load_adapter(tiny_llama(), axolotl.validated(plugin, apart)) is not None
