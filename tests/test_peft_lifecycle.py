"""PEFT's life cycle: attach, save, load, switch, mix, delete, unload; by PEFT and transformers."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

from reftune import METHODS, MergeError, ReftConfig, ReftConfigError, options, reft_layers
from tiny import tiny_llama

# PEFT 0.21 asks a model for a property that transformers 5.23 deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
    # It says what several tests here do on purpose: two adapters, without a PeftModel.
    pytest.mark.filterwarnings("ignore:Already found a .peft_config. attribute:UserWarning"),
]

IDS = torch.randint(3, 259, (2, 9), generator=torch.Generator().manual_seed(0))
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5}


def config(**given: Any) -> ReftConfig:
    return ReftConfig(**{"task_type": "CAUSAL_LM", "positions": "f2+l2", **given})


def randomise(model: nn.Module, seed: int = 1) -> None:
    """Move the adapters far from where they started."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".reft_phi." in name or ".lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=g))


def attach(seed: int = 1, **given: Any) -> PeftModel:
    torch.manual_seed(seed)
    model = get_peft_model(tiny_llama(), config(**given)).eval()
    randomise(model, seed)
    return model


@torch.no_grad()
def logits(model: Any, **given: Any) -> Tensor:
    return model(IDS, **given).logits


BASE = logits(tiny_llama())


def fingerprint(model: nn.Module) -> Any:
    """Return everything that a method attached to a model could leave behind."""
    hooks = {
        name: [
            len(getattr(module, kind))
            for kind in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs")
        ]
        for name, module in model.named_modules()
    }
    attributes = {
        name: sorted(key for key in vars(module) if not key.startswith("_hf_peft"))
        for name, module in model.named_modules()
    }
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    return hooks, attributes, grads, list(model.state_dict())


# --- attach, save, load -------------------------------------------------------------------------


def test_print_trainable_parameters(capsys):
    model = attach(method="loreft", r=4)
    model.print_trainable_parameters()
    expected = 2 * (2 * 4 * 32 + 4)  # two layers of 2dr + r
    assert model.get_nb_trainable_parameters()[0] == expected
    assert f"trainable params: {expected}" in capsys.readouterr().out


@pytest.mark.parametrize("tied", ["all", "sides", "none"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load_is_the_same_function(method, tied, low_cpu_mem_usage, tmp_path):
    if METHODS[method].pools_tokens and tied == "none":
        tied = "all"
    model = attach(method=method, tied=tied)
    expected = logits(model)
    assert (expected - BASE).norm() > 0.05 * BASE.norm()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    torch.testing.assert_close(logits(loaded), logits(model))
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-3, atol=1e-3)
    assert not any(p.requires_grad for p in loaded.parameters())
    trainable = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    found = {n for n, p in trainable.named_parameters() if p.requires_grad}
    assert found == {n for n, _ in trainable.named_parameters() if ".reft_phi." in n}
    saved = ReftConfig.from_pretrained(tmp_path)
    assert (saved.method, saved.tied, saved.positions) == (method, tied, "f2+l2")


def test_a_file_is_about_the_size_of_the_parameters(tmp_path):
    model = attach(r=4, tied="sides")
    model.save_pretrained(tmp_path)
    numbers = model.get_nb_trainable_parameters()[0]
    size = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert size < numbers * 4 + 64 * 1024
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == numbers
    assert not any(t.shape[-2:] == (32, 32) for t in tensors.values())
    assert not any(
        b.shape[-2:] == (32, 32) for layer in reft_layers(model).values() for b in layer.buffers()
    )


def test_an_auto_class_finds_the_base(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    base = type(tiny_llama()).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, config()).eval()
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(model))
    assert torch.equal(loaded.generate(IDS, **GREEDY), model.generate(IDS, **GREEDY))


def test_state_dicts_in_and_out():
    model, other = attach(1), attach(2)
    state = get_peft_model_state_dict(model)
    assert state.keys() == {
        k.replace(".default", "") for k in model.state_dict() if "reft_phi" in k
    }
    result = set_peft_model_state_dict(other, state)
    assert not result.unexpected_keys
    assert not [k for k in result.missing_keys if "reft_phi" in k]
    assert torch.equal(logits(other), logits(model))


# --- several adapters ---------------------------------------------------------------------------


def test_adapters_are_added_switched_and_deleted(tmp_path):
    model = attach(1)
    first = logits(model)
    model.add_adapter("second", config(method="direft", r=2, positions="l1"))
    for name, parameter in model.named_parameters():  # the active one goes on training alone
        assert parameter.requires_grad == (".reft_phi.default." in name), name
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".reft_phi.second." in name), name
    second = logits(model)
    assert not torch.allclose(first, second)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "second" / "adapter_model.safetensors").is_file()
    model.load_adapter(tmp_path / "second", "third")
    model.set_adapter("third")
    assert torch.equal(logits(model), second)
    model.delete_adapter("second")
    assert sorted(model.peft_config) == ["default", "third"]
    assert not any(".second." in key for key in model.state_dict())
    assert torch.equal(logits(model), second)


def test_what_is_active_after_a_deletion_is_the_same_on_all_layers():
    model = attach(1, positions="l1")  # "default", on both layers
    model.add_adapter("b", config(layers=[0], positions="l1"))
    model.add_adapter("c", config(layers=[1], positions="l1"))
    randomise(model, 3)
    model.set_adapter("b")
    expected = logits(model)
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="was active which is now deleted"):  # PEFT, by layer
        model.delete_adapter("default")
    assert model.base_model.active_adapters == ["b"]
    assert torch.equal(logits(model), expected)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".reft_phi.b." in name), name
    model.requires_grad_(False)
    model.delete_adapter("c")  # which was not active: nothing else changes
    assert model.base_model.active_adapters == ["b"]
    assert not any(p.requires_grad for p in model.parameters())
    model.delete_adapter("b")
    assert torch.equal(logits(model.base_model.model), BASE)


def test_the_last_adapter_of_a_model_with_a_head_can_be_deleted() -> None:
    base = LlamaForSequenceClassification(tiny_llama().config)
    model = get_peft_model(base, ReftConfig(task_type="SEQ_CLS", r=2, positions="l1"))
    model.delete_adapter("default")
    assert model.base_model.active_adapters == []
    assert not model.peft_config


def test_saved_modules_may_have_counters(tmp_path: Path) -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.out = nn.BatchNorm1d(32), nn.Linear(32, 2)

    def base() -> nn.Module:
        torch.manual_seed(0)
        model = tiny_llama()
        model.head = Head()
        return model

    model = get_peft_model(base(), config(modules_to_save=["head"]))
    model.base_model.model.head.modules_to_save["default"].norm.num_batches_tracked.fill_(7)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    head = loaded.base_model.model.head.modules_to_save["default"]
    assert int(head.norm.num_batches_tracked) == 7


def test_two_active_adapters_edit_one_after_the_other():
    model = attach(1, layers=[0], positions="l1")
    model.add_adapter("second", config(layers=[1], positions="l1"))
    randomise(model, 3)
    alone = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        alone[name] = logits(model)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    assert not torch.allclose(both, alone["default"])
    assert not torch.allclose(both, alone["second"])
    states = model(IDS, output_hidden_states=True).hidden_states
    model.set_adapter("default")
    torch.testing.assert_close(model(IDS, output_hidden_states=True).hidden_states[1], states[1])


@pytest.mark.parametrize("method", METHODS)
def test_disabling_gives_the_base_bit_for_bit(method):
    model = attach(method=method)
    edited = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), BASE)
        assert torch.equal(model.generate(IDS, **GREEDY), tiny_llama().generate(IDS, **GREEDY))
    assert torch.equal(logits(model), edited)
    assert not torch.equal(edited, BASE)
    assert torch.equal(logits(model, adapter_names=["__base__"] * 2), BASE)


def test_names_of_adapters_are_checked():
    model = attach()
    before = logits(model)
    with pytest.raises(ValueError, match="non-existing adapter.*defualt.*Did you mean 'default'"):
        model(IDS, adapter_names=["defualt", "__base__"])
    with pytest.raises(ValueError, match="3 names for a batch of 2"):
        model(IDS, adapter_names=["default"] * 3)
    for names, rows in ((["default"], 2), ([], 2), (["default", "__base__"], 4)):
        ids = IDS.repeat(rows // 2, 1)
        for call in (model, model.generate):  # two names are not two examples' each
            with pytest.raises(ValueError, match=f"{len(names)} names for a batch of {rows}"):
                call(input_ids=ids, adapter_names=names)
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        model(IDS, adapter_names=["default"] * 2)
    model.eval()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("positions", ["f1+l2", "all"])
def test_a_model_that_was_cast_mixes_adapters(dtype, positions):
    model = attach(positions=positions).to(dtype)
    mixed = logits(model, adapter_names=["default", "__base__"])
    assert mixed.dtype == dtype
    torch.testing.assert_close(mixed[0], logits(model)[0], rtol=1e-2, atol=0.1)
    with model.disable_adapter():
        torch.testing.assert_close(mixed[1], logits(model)[1], rtol=1e-2, atol=0.1)


@pytest.mark.parametrize(
    "names", [("0", "1"), ("default", "bias"), ("R", "W"), ("model", "layers"), ("a", "model")]
)
def test_adapters_named_like_parts_of_keys_are_saved_whole(names, tmp_path):
    """PEFT by itself leaves such tensors of the others out of what it saves."""
    model = get_peft_model(tiny_llama(), config(), names[0]).eval()
    model.add_adapter(names[1], config(layers=[1]))
    randomise(model)
    model.save_pretrained(tmp_path)
    for name in names:
        folder = tmp_path if name == "default" else tmp_path / name
        again = PeftModel.from_pretrained(tiny_llama(), folder).eval()
        model.set_adapter(name)
        torch.testing.assert_close(logits(again), logits(model))


def test_an_adapter_left_on_the_base_by_an_earlier_call_is_named():
    base = tiny_llama()
    get_peft_model(base, config(layers=[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT's own, which says less
        with pytest.raises(ReftConfigError, match=r"already, on other layers.*unload\(\)"):
            get_peft_model(base, config(layers=[1]))


def test_saved_modules_follow_names_in_beam_search():
    model = attach(modules_to_save=["lm_head"])
    model.add_adapter("b", config(modules_to_save=["lm_head"]))
    model.eval()
    beams = {**GREEDY, "num_beams": 3}
    mixed = model.generate(input_ids=IDS, adapter_names=["default", "b"], **beams)
    for row, name in enumerate(("default", "b")):
        model.set_adapter(name)
        alone = model.generate(input_ids=IDS[row : row + 1], **beams)
        assert torch.equal(mixed[row, : alone.shape[1]], alone[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_the_dtype_of_the_config_is_kept(dtype, tmp_path):
    model = attach(dtype=dtype)
    model.save_pretrained(tmp_path)
    for m in (model, PeftModel.from_pretrained(tiny_llama(), tmp_path)):
        found = {p.dtype for layer in reft_layers(m).values() for p in layer.parameters()}
        assert found == {getattr(torch, dtype)}
        mixed = logits(m, adapter_names=["default", "__base__"])
        torch.testing.assert_close(mixed[0], logits(m)[0], rtol=1e-2, atol=0.1)


# --- other modules, other methods ---------------------------------------------------------------


def classifier() -> LlamaForSequenceClassification:
    model_config = tiny_llama().config
    model_config.num_labels = 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForSequenceClassification(model_config).eval()


def test_a_classification_head_is_trained_and_saved(tmp_path):
    base = logits(classifier())
    model = get_peft_model(classifier(), config(task_type="SEQ_CLS"))
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("score.modules_to_save" in n for n in trainable)
    model(IDS, labels=torch.tensor([0, 2])).loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trainable
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    optimizer.step()
    model.eval()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(classifier(), tmp_path)
    torch.testing.assert_close(logits(loaded), expected)
    mixed = logits(loaded, adapter_names=["default", "__base__"])
    torch.testing.assert_close(mixed, torch.stack([expected[0], base[1]]))
    unloaded = loaded.unload()  # as with LoRA, the trained head stays
    with torch.no_grad():
        unloaded.score.weight.copy_(classifier().score.weight)
    assert torch.equal(logits(unloaded), base)


@pytest.mark.parametrize("order", [("reft", "lora"), ("lora", "reft")])
def test_reft_and_lora_on_one_model(order, tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    alone = inject_adapter_in_model(lora, tiny_llama(), "lora")
    lora_keys = {k for k in alone.state_dict() if "lora_" in k}
    model = tiny_llama()
    for name in order:
        model = inject_adapter_in_model(lora if name == "lora" else config(), model, name)
    randomise(model)
    model.eval()
    assert {k for k in model.state_dict() if "lora_" in k} == lora_keys
    both = logits(model)
    with options(strength=0.0):
        only_lora = logits(model)
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    for layer in layers:
        layer.enable_adapters(False)
    only_reft = logits(model)
    reference = inject_adapter_in_model(config(), tiny_llama(), "reft").eval()
    reference.load_state_dict(
        {k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if "lora_" not in k}
    )
    torch.testing.assert_close(only_reft, logits(reference))
    for i, one in enumerate((both, only_lora, only_reft, BASE)):
        for other in (both, only_lora, only_reft, BASE)[i + 1 :]:
            assert not torch.allclose(one, other)
    reft_state = (
        get_peft_model_state_dict(model, adapter_name="reft")
        if order[-1] == "reft"
        else {k: v for k, v in model.state_dict().items() if ".reft_phi." in k}
    )
    assert len(reft_state) == 2 * 3


# --- taking it out ------------------------------------------------------------------------------


def test_unload_restores_the_base_exactly():
    untouched = fingerprint(tiny_llama().requires_grad_(False))
    model = attach()
    model.add_adapter("second", config(positions="all"))
    model.generate(IDS, **GREEDY)
    base = model.unload()
    assert fingerprint(base) == untouched
    assert "generate" not in vars(base)
    assert torch.equal(logits(base), BASE)
    again = get_peft_model(base, config()).eval()
    randomise(again)
    assert not torch.allclose(logits(again), BASE)


def test_merging_is_refused_with_the_reason():
    model = attach()
    expected = logits(model)
    for merge in (model.merge_and_unload, model.merge_adapter, model.base_model.merge_adapter):
        with pytest.raises(MergeError, match="edits the hidden states"):
            merge()
    with pytest.raises(NotImplementedError):
        model.merge_and_unload(safe_merge=True)
    assert torch.equal(logits(model), expected)


def test_the_base_keeps_its_structure():
    model = attach().get_base_model()
    layer = model.model.layers[0]
    assert type(layer) is LlamaDecoderLayer
    assert type(layer.self_attn) is LlamaAttention
    base = tiny_llama().state_dict()
    own = {k: v for k, v in model.state_dict().items() if ".reft." not in k}
    assert own.keys() == base.keys()
    assert all(torch.equal(own[k], v) for k, v in base.items())


def test_status():
    model = attach()
    model.add_adapter("second", config(layers=[0]))
    status = get_model_status(model)
    assert status.enabled is True
    assert status.active_adapters == ["default"]
    assert status.available_adapters == ["default", "second"]
    assert status.merged_adapters == []
    assert status.requires_grad == {"default": True, "second": False}
    assert status.num_adapter_layers == 2
    assert status.trainable_params == model.get_nb_trainable_parameters()[0]
    layers = get_layer_status(model)
    assert [s.name for s in layers] == ["model.model.layers.0.reft", "model.model.layers.1.reft"]
    assert [s.available_adapters for s in layers] == [["default", "second"], ["default"]]
    with model.disable_adapter():
        assert get_model_status(model).enabled is False


# --- transformers' own methods ------------------------------------------------------------------


def native() -> Any:
    model = tiny_llama()
    model.add_adapter(config(), adapter_name="default")
    randomise(model)
    return model.eval()


def test_transformers_adds_switches_and_deletes(tmp_path):
    model = native()
    edited = logits(model)
    assert not torch.allclose(edited, BASE)
    assert not torch.equal(model.generate(IDS, **GREEDY), tiny_llama().generate(IDS, **GREEDY))
    model.disable_adapters()
    assert torch.equal(logits(model), BASE)
    model.enable_adapters()
    assert torch.equal(logits(model), edited)
    model.add_adapter(config(positions="all"), adapter_name="second")
    randomise(model, 4)
    assert model.active_adapters() == ["second"]
    model.set_adapter("default")
    assert model.active_adapters() == ["default"]
    model.delete_adapter("second")
    assert not any(".second." in key for key in model.state_dict())
    model.delete_adapter("default")
    assert torch.equal(logits(model), BASE)


@pytest.mark.parametrize("saver", ["peft", "transformers"])
def test_transformers_loads_what_either_saved(saver, tmp_path):
    model = attach() if saver == "peft" else native()
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == {
        f"base_model.model.model.layers.{i}.reft.reft_phi.{k}"
        for i in range(2)
        for k in ("R", "W", "bias")
    }
    loaded = tiny_llama()
    loaded.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits(loaded), logits(model))
    assert torch.equal(loaded.generate(IDS, **GREEDY), model.generate(IDS, **GREEDY))
    state = loaded.get_adapter_state_dict()
    assert len(state) == 6
    by_peft = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(by_peft), logits(model))


def test_transformers_loads_a_model_with_its_adapter(tmp_path: Path):
    tiny_llama().save_pretrained(tmp_path / "base")
    base = type(tiny_llama()).from_pretrained(tmp_path / "base")
    base.add_adapter(config())
    randomise(base)
    expected = logits(base.eval())
    base.save_pretrained(tmp_path / "adapter")
    loaded = type(base).from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), expected)
