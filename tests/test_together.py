"""A ReFT and a LoRA on one model: trained, saved, loaded, served, switched and taken out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

from adapted_tiny import batch, config, logits, optimise, phis, prompts, reft, strong
from reftune import MergeError, add_reft, load_reft, set_composition, set_strength
from reftune.errors import AdapterMismatchError, ReftConfigError
from tiny import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

GREEDY = {"max_new_tokens": 4, "do_sample": False}


def lora(**settings: Any) -> PeftModel:
    torch.manual_seed(0)
    given = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | settings
    return get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", **given)).eval()


def both(**settings: Any) -> PeftModel:
    model = lora()
    add_reft(model, config(**settings))
    return strong(model).eval()


def kinds(model: nn.Module) -> set[str]:
    """Return which adapters are trainable."""
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    return {"lora" if ".lora_" in n else "reft" if ".reft_phi." in n else n for n in names}


def test_both_act_and_each_alone() -> None:
    model = both()
    outputs = {"both": logits(model)}
    for name in ("default", "edits"):
        model.set_adapter(name)
        outputs[name] = logits(model)
    with model.disable_adapter():
        outputs["none"] = logits(model)
    model.base_model.set_adapter(["default", "edits"])
    assert torch.equal(logits(model), outputs["both"])
    assert torch.equal(outputs["default"], logits(lora()))
    assert torch.equal(outputs["none"], logits(tiny_llama()))
    torch.testing.assert_close(outputs["edits"], logits(reft_of(model)))
    set_strength(model, 0.0)
    torch.testing.assert_close(logits(model), outputs["default"])
    values = list(outputs.values())
    assert not any(torch.allclose(a, b) for i, a in enumerate(values) for b in values[i + 1 :])


def reft_of(model: PeftModel) -> PeftModel:
    """Return a model with the ReFT alone."""
    alone = reft()
    for mine, theirs in zip(phis(alone), phis(model), strict=True):
        mine.load_state_dict(theirs.state_dict())
    return alone


def test_the_edit_is_of_the_states_that_lora_makes() -> None:
    """In a layer LoRA comes first: it is in the weights, the edit is on the output."""
    model = both(layers=[0], positions="all", method="direft")
    ids = torch.tensor([[1, 10, 11, 12]])
    with torch.no_grad():
        edited = model(ids, output_hidden_states=True).hidden_states[1]
        model.set_adapter("default")
        h = model(ids, output_hidden_states=True).hidden_states[1]
    (phi,) = phis(model)
    tensors = {k: t[0] for k, t in phi.tensors().items()}
    expected = h + phi(h, tensors, torch.ones(1, 4, dtype=torch.bool))
    torch.testing.assert_close(edited, expected)


def test_they_are_trained_together() -> None:
    model = both()
    assert kinds(model) == {"lora", "reft"}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.train()
    first = model(**batch()).loss.item()
    optimise(model, torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 1e-2), 5)
    assert model(**batch()).loss.item() < first
    for name, parameter in model.named_parameters():
        is_adapter = ".lora_" in name or ".reft_phi." in name
        assert torch.equal(parameter, before[name]) != is_adapter, name


def test_what_was_frozen_stays_so() -> None:
    """A ReFT is trained on a finished LoRA, or a LoRA beside a finished ReFT."""
    model = lora()
    model.requires_grad_(False)
    add_reft(model, config())
    assert kinds(model) == {"reft"}
    model = lora()
    frozen = config()
    frozen.inference_mode = True
    add_reft(model, frozen)
    assert kinds(model) == {"lora"}


def test_both_are_saved_and_each_is_an_adapter_of_its_own(tmp_path: Path) -> None:
    model = both()
    expected, generated = logits(model), model.generate(**prompts(), **GREEDY)
    model.save_pretrained(tmp_path)
    keys = {
        where: set(load_file(tmp_path / where / "adapter_model.safetensors"))
        for where in (".", "edits")
    }
    assert all("lora_" in key for key in keys["."])
    assert all(".reft.reft_phi." in key for key in keys["edits"])
    assert not any(".base_layer" in key for key in keys["edits"])
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert load_reft(loaded, tmp_path / "edits") is loaded
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(loaded.generate(**prompts(), **GREEDY), generated)
    assert kinds(loaded) == set()
    alone = PeftModel.from_pretrained(tiny_llama(), tmp_path / "edits")
    torch.testing.assert_close(logits(alone), logits(reft_of(model)))
    again = load_reft(lora(), tmp_path / "edits", is_trainable=True)
    assert kinds(again) == {"lora", "reft"}


def test_generation_uses_both() -> None:
    model = both()
    tokens = {"both": model.generate(**prompts(), **GREEDY)}
    for name in ("default", "edits"):
        model.set_adapter(name)
        tokens[name] = model.generate(**prompts(), **GREEDY)
    assert len({tuple(t.flatten().tolist()) for t in tokens.values()}) == 3
    model.base_model.set_adapter(["default", "edits"])
    uncached = model.generate(**prompts(), **GREEDY, use_cache=False)
    assert torch.equal(uncached, tokens["both"])


def test_trainer_trains_and_saves_both(tmp_path: Path) -> None:
    model = both()
    args = TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    row = {k: v[0] for k, v in batch().items()}
    Trainer(model, args, train_dataset=[row, row]).train()  # type: ignore[arg-type]
    model.eval()
    saved = tmp_path / "checkpoint-2"
    loaded = PeftModel.from_pretrained(tiny_llama(), saved)
    load_reft(loaded, saved / "edits")
    assert torch.equal(logits(loaded), logits(model))


def test_several_refts_beside_a_lora_are_composed() -> None:
    model = both()
    add_reft(model, config("direft"), "more")
    strong(model, 2)
    assert model.active_adapters == ["default", "edits", "more"]
    in_order = logits(model)
    set_composition(model, "sum")
    assert not torch.allclose(logits(model), in_order)
    model.base_model.set_adapter(["default", "edits"])
    one = logits(model)
    model.delete_adapter("more")
    assert torch.equal(logits(model), one)
    assert sorted(model.peft_config) == ["default", "edits"]
    model.delete_adapter("edits")
    assert torch.equal(logits(model), logits(lora()))


def test_unload_takes_both_out_and_merging_is_refused() -> None:
    model = both()
    with pytest.raises(MergeError, match="merge_and_unload"):
        model.merge_and_unload()
    base = model.unload()
    assert torch.equal(logits(base), logits(tiny_llama()))
    assert set(base.state_dict()) == set(tiny_llama().state_dict())


def test_a_lora_can_be_merged_before() -> None:
    """What MergeError tells to do."""
    model = both()
    expected = logits(model)
    alone = lora().merge_and_unload()
    merged = add_reft_alone(alone, model)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


def add_reft_alone(base: nn.Module, like: PeftModel) -> PeftModel:
    model = get_peft_model(base, config()).eval()
    for mine, theirs in zip(phis(model), phis(like), strict=True):
        mine.load_state_dict(theirs.state_dict())
    return model


def test_other_methods_than_lora() -> None:
    model = get_peft_model(
        tiny_llama(),
        IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]),
    )
    add_reft(model, config())
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {
        *("edits", "ia3_l")
    }


def refused(model: Any, adapter: PeftConfig, message: str, name: str = "edits") -> None:
    with pytest.raises(ReftConfigError, match=message):
        add_reft(model, adapter, name)  # type: ignore[arg-type]


def test_what_is_not_possible_is_said(tmp_path: Path) -> None:
    refused(tiny_llama(), config(), "got LlamaForCausalLM")
    refused(reft(), config(), "make the LoRA first")
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    refused(get_peft_model(tiny_llama(), prompt), config(), "tokens before the prompt")
    refused(lora(), config(), "'default' already", "default")
    model = both()
    refused(model, config("direft"), "none can be named 'reft'", "reft")
    assert sorted(model.peft_config) == ["default", "edits"]
    with pytest.raises(ReftConfigError, match="one adapter for each example"):
        model(**batch(), adapter_names=["default", "edits"])
    lora().save_pretrained(tmp_path)
    with pytest.raises(ReftConfigError, match="type LORA, no ReFT"):
        load_reft(lora(), tmp_path)
    with pytest.raises(ValueError, match="not compatible with the .PeftMixedModel"):
        get_peft_model(tiny_llama(), config(), mixed=True)


def test_a_reft_of_another_width_leaves_the_lora_as_it_was(tmp_path: Path) -> None:
    wide = tiny_llama().config
    wide.hidden_size = 64
    other = get_peft_model(type(tiny_llama())(wide), config())
    other.save_pretrained(tmp_path)
    model = lora()
    with pytest.raises(AdapterMismatchError, match="width 64"):
        load_reft(model, tmp_path)
    assert sorted(model.peft_config) == ["default"]
    assert torch.equal(logits(model), logits(lora()))
