"""ReFT on bases in 8 and 4 bits: trained, saved, loaded, generated with; the base is untouched."""

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from adapted_tiny import (
    EOS,
    batch,
    config,
    logits,
    on_gpu,
    optimise,
    phis,
    prompts,
    strong,
    trainable,
)
from reftune import add_reft, options
from reftune.errors import ReftConfigError, RunError
from reftune.models import load_model, own_device
from reftune.quantised import Quantization, quantization_config
from reftune.run import execute, load_adapter
from reftune.settings import parse_config
from runs import tiny_model_directory, tiny_run
from tiny import tiny_llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    # bitsandbytes scripts functions when it is imported
    pytest.mark.filterwarnings("ignore:`torch.jit.script.*:DeprecationWarning"),
    # and says on a GPU that the tiny model is narrower than a block
    pytest.mark.filterwarnings("ignore:inner dimension .* is not aligned:UserWarning"),
]

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
)
NAMES = (
    "bnb-4bit",
    "bnb-8bit",
    pytest.param("torchao-int8", marks=needs_torchao),
    pytest.param("torchao-int4", marks=needs_torchao),
)
GREEDY = {"max_new_tokens": 4, "do_sample": False}


def base(tmp_path: Path, name: str) -> Any:
    """Return the tiny Llama, freshly quantised."""
    directory = tiny_model_directory(tmp_path)
    return load_model(str(directory), "float32", quantization=name)[0].eval()


def stored(model: Any) -> dict[str, Tensor]:
    """Return the numbers in which a model's weights are kept, adapters left out."""
    found = {}
    for name, parameter in model.named_parameters():
        if ".reft_phi." in name:
            continue
        inner = getattr(parameter, "tensor_data_names", None)  # torchao's tensors have several
        if inner is None:
            found[name] = parameter.detach().clone()
        for part in inner or ():
            found[f"{name}.{part}"] = getattr(parameter, part).detach().clone()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_it_is_quantised(name: str, tmp_path: Path) -> None:
    plain, quantised = (load_model(str(tiny_model_directory(tmp_path)), "float32")[0], None)
    quantised = base(tmp_path, name)
    error = (logits(quantised) - logits(plain)).abs().max()
    assert 1e-3 < error < 20
    kept = stored(quantised)
    small = [
        n for n, t in kept.items() if "self_attn" in n and t.dtype in (torch.int8, torch.uint8)
    ]
    assert len(small) >= 2 * 4
    assert quantised.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_train_save_load_generate(name: str, tmp_path: Path) -> None:
    quantised = base(tmp_path, name)
    before = stored(quantised)
    torch.manual_seed(0)
    model = get_peft_model(quantised, config())
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    assert all(".reft_phi." in n for n in trainable(model))
    model.train()
    first = model(**batch()).loss.item()
    optimise(model, torch.optim.AdamW(trainable(model).values(), 1e-2), 8)
    assert model(**batch()).loss.item() < 0.9 * first
    model.eval()
    after = stored(model.get_base_model())
    assert all(torch.equal(after[n], t) for n, t in before.items())
    assert set(after) == set(before)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base(tmp_path, name)))

    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(base(tmp_path, name), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    tokens = model.generate(**prompts(), **GREEDY)
    assert torch.equal(loaded.generate(**prompts(), **GREEDY), tokens)
    with model.disable_adapter():
        assert not torch.equal(model.generate(**prompts(), **GREEDY), tokens)
    assert model.unload() is quantised
    assert torch.equal(logits(quantised), logits(base(tmp_path, name)))


@pytest.mark.parametrize("name", [n for n in NAMES if n != "bnb-8bit"])
def test_cached_is_uncached_and_padding_does_not_matter(name: str, tmp_path: Path) -> None:
    """Not of bnb-8bit, which quantises activations, too, by what else is in the batch."""
    model = strong(get_peft_model(base(tmp_path, name), config())).eval()
    both = model.generate(**prompts(), **GREEDY)
    assert torch.equal(model.generate(**prompts(), **GREEDY, use_cache=False), both)
    alone = model.generate(prompts()["input_ids"][1:, 2:], **GREEDY)
    assert torch.equal(alone[0], both[1, 2:])


def test_bnb_8bit_lets_examples_of_a_batch_influence_each_other(tmp_path: Path) -> None:
    """The base itself does: which columns are outliers is decided for all rows together."""
    model = base(tmp_path, "bnb-8bit")
    ids = batch()["input_ids"]
    with torch.no_grad():
        together, alone = model(ids).logits[:1], model(ids[:1]).logits
    assert not torch.allclose(together, alone, rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("name", ["bnb-4bit", "bnb-8bit"])
def test_gradient_checkpointing_and_two_adapters_in_a_batch(name: str, tmp_path: Path) -> None:
    model = strong(get_peft_model(base(tmp_path, name), config()))
    model.train()
    model(**batch()).loss.backward()
    expected = {n: p.grad.clone() for n, p in trainable(model).items()}
    model.zero_grad()
    model.get_base_model().activation_checkpointing_enable()
    model(**batch()).loss.backward()
    for n, p in trainable(model).items():
        torch.testing.assert_close(p.grad, expected[n], msg=n)
    model.eval()
    with torch.no_grad(), options(adapter_names=["default", "__base__"]):
        mixed = model(**batch()).logits
    atol = 0.05 if name == "bnb-8bit" else 1e-4  # see the test above
    with model.disable_adapter():
        plain = logits(model)
    torch.testing.assert_close(mixed[1], plain[1], rtol=0.0, atol=atol)
    torch.testing.assert_close(mixed[0], logits(model)[0], rtol=0.0, atol=atol)
    assert (plain - logits(model)).abs().amax((1, 2)).min() > 1.0


@pytest.mark.parametrize("name", ["bnb-4bit", "bnb-8bit"])
@pytest.mark.parametrize("ours", [True, False])
def test_an_evaluation_changes_neither_the_base_nor_gradients(
    name: str, ours: bool, tmp_path: Path
) -> None:
    """bitsandbytes packs 4-bit weights at an evaluation on some CPUs: no gradient passes them."""
    if ours:
        quantised = base(tmp_path, name)
    else:  # as `docs/quantised.md` has it for Python
        quantised = AutoModelForCausalLM.from_pretrained(
            tiny_model_directory(tmp_path),
            quantization_config=quantization_config(name, torch.float32),
        )
    model = strong(get_peft_model(quantised, config())).train()
    before = stored(quantised)
    model(**batch()).loss.backward()
    expected = {n: p.grad.clone() for n, p in trainable(model).items()}
    model.zero_grad()
    model.eval()
    logits(model)
    model.train()
    after = stored(quantised)
    assert all(torch.equal(after[n], t) for n, t in before.items())
    model(**batch()).loss.backward()
    for n, p in trainable(model).items():
        assert torch.equal(p.grad, expected[n]), n


def test_weights_packed_for_inference_are_not_trained_on(tmp_path: Path) -> None:
    quantised = base(tmp_path, "bnb-4bit")
    layer = quantised.model.layers[1].mlp.down_proj
    layer.weight.quant_state.packing_format_for_cpu = True  # what bitsandbytes notes there
    with pytest.raises(ReftConfigError, match=r"layers.1.mlp.down_proj.*Load the model anew"):
        get_peft_model(quantised, config())
    get_peft_model(quantised, config(inference_mode=True))


class Int4TilePackedTo4dTensor(torch.Tensor):
    """A stand-in for torchao's type, whose product has no derivative."""


def test_weights_whose_product_has_no_derivative_are_not_trained_on() -> None:
    packed = tiny_llama()
    linear = packed.model.layers[1].mlp.down_proj
    linear.weight = nn.Parameter(
        linear.weight.detach().as_subclass(Int4TilePackedTo4dTensor), requires_grad=False
    )
    with pytest.raises(ReftConfigError, match="layers.1.mlp.down_proj.weight is packed in 4 bits"):
        get_peft_model(packed, config())
    model = get_peft_model(packed, config(inference_mode=True))
    with pytest.raises(ReftConfigError, match="is packed in 4 bits"):
        model.add_adapter("other", config())
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("name", ["bnb-4bit", "bnb-8bit"])
def test_reft_beside_qlora(name: str, tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = add_reft(get_peft_model(base(tmp_path, name), lora), config())
    model.train()
    first = model(**batch()).loss.item()
    optimise(model, torch.optim.AdamW(trainable(model).values(), 1e-2), 5)
    assert model(**batch()).loss.item() < first
    grads = {n: p.grad for n, p in trainable(model).items()}
    assert {"lora" if ".lora_" in n else "reft" for n in grads} == {"lora", "reft"}
    assert all(g is not None for g in grads.values())


# --- through `reftune train` --------------------------------------------------------------------


def quantised_run(tmp_path: Path, name: str | None, **sections: Any) -> Any:
    values = tiny_run(tmp_path, **sections).model_dump(mode="json")
    return parse_config(values | {"quantization": name, "dtype": "float32"}, "tiny")


@pytest.mark.parametrize("name", ["bnb-4bit", "bnb-8bit", NAMES[2]])
def test_a_run_trains_and_is_loaded_as_it_was_trained(name: str, tmp_path: Path) -> None:
    run = quantised_run(tmp_path, name, evaluate={"show": 1})
    results = execute(run)
    losses = [row["loss"] for row in read_log(run.directory) if "loss" in row]
    assert losses[-1] < losses[0]
    assert results["train"]["steps"] == 6
    assert f'quantization="{name}"' in (run.directory / "adapter" / "README.md").read_text()

    loaded = load_adapter(run.directory, dtype="float32")  # the run's config says how
    assert type(loaded.model.get_base_model().hf_quantizer).__name__ in {
        *("Bnb4BitHfQuantizer", "Bnb8BitHfQuantizer", "TorchAoHfQuantizer")
    }
    moved = tmp_path / "elsewhere"
    (run.directory / "adapter").rename(moved)  # beside no config: it has to be said
    again = load_adapter(moved, dtype="float32", quantization=name)
    assert torch.equal(logits(again.model), logits(loaded.model))
    plain = load_adapter(moved, dtype="float32")
    assert not torch.allclose(logits(plain.model), logits(loaded.model))


def read_log(directory: Path) -> list[dict[str, Any]]:
    import json

    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def test_training_is_the_same_with_and_without_shortcuts(tmp_path: Path) -> None:
    """What `fit` leaves out is exact on a quantised base, too."""
    losses = []
    for shortcuts in (True, False):
        run = quantised_run(tmp_path / str(shortcuts), "bnb-4bit", train={"shortcuts": shortcuts})
        execute(run)
        losses.append([row["loss"] for row in read_log(run.directory) if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization": "bnb-4bits"}, "quantization is 'bnb-4bits'"),
        ({"quantization": "torchao-int4"}, "quantization is 'torchao-int4'"),
        ({"adapter": {"method": "full"}}, "method: full, which trains weights"),
        (
            {"train": {"offload_base": True, "gradient_checkpointing": True}},
            "train.offload_base",
        ),
        ({"task_type": "seq_cls"}, "task_type: seq_cls"),
        ({"train": {"fsdp": True}}, "train.fsdp"),
    ],
)
def test_what_does_not_go_with_it_is_said(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    values = tiny_run(tmp_path).model_dump(mode="json") | {"quantization": "bnb-4bit"}
    for key, value in changes.items():
        merged = isinstance(value, dict) and key != "adapter"
        values[key] = values[key] | value if merged else value
    with pytest.raises(ReftConfigError, match=message):
        parse_config(values, "tiny")


def test_names_and_missing_libraries_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ReftConfigError, match="accepted: bnb-4bit.*Did you mean 'bnb-8bit'"):
        quantization_config("bnb8bit", torch.float32)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match="needs torchao.*pip install torchao"):
        quantization_config("torchao-int8", torch.float32)


def test_what_bitsandbytes_repeats_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = base(tmp_path, "bnb-8bit")
    with caplog.at_level(logging.WARNING):
        logits(model)
        logits(model)
    assert sum("inputs will be cast" in r.getMessage() for r in caplog.records) <= 1


def test_each_process_loads_to_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert own_device() == "cuda:0"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_device() == "cuda:3"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert own_device() == "cpu"


# --- what runs on a GPU only --------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES[:3])
def test_on_a_gpu(name: Quantization, tmp_path: Path) -> None:
    fresh = loads_on_gpu(name, tmp_path)
    torch.manual_seed(0)
    model = get_peft_model(fresh(), config())
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    inputs = on_gpu(batch())
    first = model(**inputs).loss.item()
    optimizer = torch.optim.AdamW(trainable(model).values(), 1e-2)
    for _ in range(8):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
    assert model(**inputs).loss.item() < first
    check_saved_adapter(model, fresh, tmp_path)


@pytest.mark.gpu
@needs_torchao
def test_packed_weights_are_used_on_a_gpu_and_not_trained_on(tmp_path: Path) -> None:
    """In bfloat16, which torchao's packed int4 asks for."""
    fresh = loads_on_gpu("torchao-int4", tmp_path)
    with pytest.raises(ReftConfigError, match="no gradient passes.*bnb-4bit"):
        get_peft_model(fresh(), config())
    model = strong(get_peft_model(fresh(), config(inference_mode=True)))
    inputs = on_gpu(batch())
    with torch.no_grad():
        edited = model(**inputs).logits
        with model.disable_adapter():
            assert not torch.equal(model(**inputs).logits, edited)
    check_saved_adapter(model, fresh, tmp_path)


def loads_on_gpu(name: Quantization, tmp_path: Path) -> Callable[[], Any]:
    """Return what loads the tiny model, quantised, to the GPU."""
    directory = str(tiny_model_directory(tmp_path))
    return lambda: load_model(directory, "bfloat16", quantization=name)[0].eval()


def check_saved_adapter(model: Any, fresh: Callable[[], Any], tmp_path: Path) -> None:
    """Check that an adapter, saved and loaded onto a fresh base, does the same."""
    inputs = on_gpu(batch())
    model.eval().save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(fresh(), tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)
    asked = on_gpu(prompts())
    assert torch.equal(loaded.generate(**asked, **GREEDY), model.generate(**asked, **GREEDY))


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_checkpoint_that_is_quantised_already(method: str, tmp_path: Path) -> None:
    """GPTQ is made here, from the tiny model; AWQ's loader is GPTQModel's, too."""
    pytest.importorskip("gptqmodel")
    from transformers import AutoModelForCausalLM, AutoTokenizer, AwqConfig, GPTQConfig

    directory = tiny_model_directory(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    how = {"bits": 4, "group_size": 32}
    asked = (
        GPTQConfig(dataset=["say aa a!"] * 8, tokenizer=tokenizer, **how)
        if method == "gptq"
        else AwqConfig(**how)
    )
    made = AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=asked, device_map={"": "cuda:0"}
    )
    made.save_pretrained(tmp_path / method)
    tokenizer.save_pretrained(tmp_path / method)
    model = get_peft_model(load_model(str(tmp_path / method))[0].cuda(), config())
    inputs = on_gpu(batch())
    first = model(**inputs).loss.item()
    optimizer = torch.optim.AdamW(trainable(model).values(), 1e-2)
    for _ in range(8):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
    assert model(**inputs).loss.item() < first
    assert int(inputs["labels"][0, -1]) == EOS
    assert {p.dtype for phi in phis(model) for p in phi.parameters()} == {torch.float32}
