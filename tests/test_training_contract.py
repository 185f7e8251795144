"""Training in every way people do it computes the gradients of the plain forward and backward."""

import copy
import io
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from reftune import METHODS, ReftConfig, ReftConfigError, ReftuneError, reft_layers
from tiny import tiny_llama

pytestmark = [
    # PEFT 0.21 and transformers 5.23 rename gradient checkpointing, each at its own pace.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    # Without gradients a reentrant checkpoint has nothing to do, and says so.
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning"),
    # torch.utils.checkpoint asks the CPU for a device context that it deprecates itself.
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),
]

GREEDY = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
Grads = dict[str, Tensor]


def attach(model: Any | None = None, **config: Any) -> PeftModel:
    torch.manual_seed(0)
    given = {"task_type": "CAUSAL_LM", "positions": "f2+l2", **config}
    adapted = get_peft_model(tiny_llama() if model is None else model, ReftConfig(**given))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name.endswith((".W", ".bias")) and "reft_phi" in name:
                parameter.mul_(3).add_(0.1)
    return adapted.train()


def batch(seed: int = 0, rows: int = 2, length: int = 12, prompt: int = 7) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 259, (rows, length), generator=g)
    labels = ids.clone()
    labels[:, :prompt] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def gradients(model: nn.Module) -> Grads:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def step(model: Any, data: dict[str, Tensor]) -> tuple[Tensor, Grads]:
    model.zero_grad()
    loss = model(**data).loss
    loss.backward()
    return loss.detach(), gradients(model)


def assert_same(got: Grads, expected: Grads, **tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            got[name], gradient, msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )


def checkpointed(model: PeftModel, use_reentrant: bool) -> PeftModel:
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    return model


class CheckpointedWithHooks(LlamaDecoderLayer):
    def __call__(self, h: Tensor, **kwargs: Any) -> Any:
        return self._gradient_checkpointing_func(partial(super().__call__, **kwargs), h)


# --- what is trained ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_only_the_adapter_gets_gradients_and_all_of_it(method):
    model = attach(method=method)
    _, grads = step(model, batch())
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == grads.keys()
    assert all(".reft_phi.default." in n for n in trainable)
    if method != "reft_r1":  # its ReLU may be off at every token of a random model
        assert all(g.abs().sum() > 0 for g in grads.values())


def test_the_labels_say_where_the_prompt_is():
    model, data = attach(), batch(prompt=5)
    mask = torch.arange(12) < 5
    loss, grads = step(model, data)
    explicit, explicit_grads = step(model, {**data, "prompt_mask": mask.expand(2, 12)})
    other, _ = step(model, {**data, "prompt_lengths": torch.tensor([12, 12])})
    assert torch.equal(loss, explicit)
    assert_same(explicit_grads, grads)
    assert (other - loss).abs() > 1e-3


def test_a_training_span_is_the_generation_span():
    model, data = attach().eval(), batch(prompt=7)
    with torch.no_grad():
        logits = model(**data).logits[:, 6]
        prompt = model(data["input_ids"][:, :7]).logits[:, 6]
    torch.testing.assert_close(logits, prompt, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", ["all", "sides", "none"])
def test_packed_rows_are_each_sequence_alone(tied):
    model, parts = attach(tied=tied), [batch(1, 1, 9, 5), batch(2, 1, 6, 2), batch(3, 1, 7, 4)]
    packed = {k: torch.cat([p[k] for p in parts], dim=1) for k in ("input_ids", "labels")}
    packed["position_ids"] = torch.cat([torch.arange(p["labels"].shape[1]) for p in parts])[None]
    start = 0
    model.eval()
    with torch.no_grad():
        logits = model(**packed, use_cache=False).logits[0]
        for p in parts:
            n = p["labels"].shape[1]
            alone = model(**p).logits[0]
            torch.testing.assert_close(logits[start : start + n], alone, rtol=1e-4, atol=1e-4)
            start += n


# --- order of forwards and backwards ------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_two_forwards_before_one_backward_and_one_without_gradients_between(use_reentrant):
    first, second = batch(1, prompt=4), batch(2, rows=3, length=9, prompt=6)
    model = attach()
    expected = step(model, first)[1]
    for name, gradient in step(model, second)[1].items():
        expected[name] += gradient
    if use_reentrant is not None:
        checkpointed(model, use_reentrant)
    model.zero_grad()
    loss = model(**first).loss
    with torch.no_grad():
        model(**batch(3, rows=1, length=20, prompt=15))
    (loss + model(**second).loss).backward()
    assert_same(gradients(model), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"tied": "none", "method": "direft"},
        {"positions": "all"},
        {"target_modules": ["mlp"]},
        {"target_modules": ["self_attn", "mlp"], "positions": "l2"},
        {"target_modules": ["o_proj"], "hidden_size": 32},
    ],
    ids=str,
)
def test_checkpointing_does_not_change_gradients(config, use_reentrant):
    model, data = attach(**config), batch()
    loss, expected = step(model, data)
    again, got = step(checkpointed(model, use_reentrant), data)
    assert torch.equal(again, loss)
    assert_same(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_span_is_carried_where_hooks_are_recomputed(use_reentrant):
    """transformers before 5.23, and models with their own code, checkpoint a layer's hooks, too."""
    model, data = attach(), batch()
    loss, expected = step(model, data)
    checkpointed(model, use_reentrant)
    for layer in model.get_base_model().model.layers:
        layer.gradient_checkpointing = False
        layer.__class__ = CheckpointedWithHooks
    again, got = step(model, data)
    assert torch.equal(again, loss)
    assert_same(got, expected, rtol=1e-4, atol=1e-6)


def test_a_trainer_that_would_copy_the_model_to_several_gpus_is_an_error(tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    arguments._n_gpu = 2
    with pytest.raises(ReftConfigError, match=r"DataParallel.*torchrun.*CUDA_VISIBLE_DEVICES=0"):
        Trainer(attach(), arguments)


def wrapped(model: PeftModel, impl: CheckpointImpl) -> PeftModel:
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=partial(checkpoint_wrapper, checkpoint_impl=impl),
        check_fn=lambda module: isinstance(module, LlamaDecoderLayer),
    )
    return model


def test_a_span_is_carried_into_torchs_checkpoint_wrapper():
    """FSDP's `activation_checkpointing` of accelerate puts it around the layers."""
    model, data = attach(), batch()
    loss, expected = step(model, data)
    wrapped(model, CheckpointImpl.NO_REENTRANT)
    again, got = step(model, data)
    assert torch.equal(again, loss)
    got = {name.replace("_checkpoint_wrapped_module.", ""): g for name, g in got.items()}
    assert_same(got, expected, rtol=1e-4, atol=1e-6)


def test_an_adapter_below_torchs_checkpoint_wrapper_is_saved_and_loaded(tmp_path):
    """PEFT looks for the names of modules, which have the wrapper's in them."""
    model = wrapped(attach(), CheckpointImpl.NO_REENTRANT)
    model.save_pretrained(tmp_path)
    saved, expected = load_file(tmp_path / "adapter_model.safetensors"), trained_names(attach())
    assert sorted(saved) == expected
    model.load_adapter(str(tmp_path), "default", is_trainable=True)
    fresh = PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    data = batch()
    torch.testing.assert_close(model.eval()(**data).loss, fresh.eval()(**data).loss)


def trained_names(model: PeftModel) -> list[str]:
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    return sorted(name.replace(".default", "") for name in trained)


class Recomputing(torch.nn.Module):
    """A wrapper of a user's own, which reftune knows nothing of."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self.layer, *args, use_reentrant=False, **kwargs)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_wrapper_that_recomputes_a_layer_unseen_is_an_error_and_not_another_gradient(reentrant):
    model = attach()
    layers = model.get_base_model().model.layers
    if reentrant:
        model.enable_input_require_grads()
        wrapped(model, CheckpointImpl.REENTRANT)
    for number, layer in enumerate([] if reentrant else list(layers)):
        layers[number] = Recomputing(layer)
    loss = model(**batch()).loss
    with pytest.raises(ReftuneError, match="gradient_checkpointing_enable"):
        loss.backward()


@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_hidden_states_are_those_after_the_edit(use_reentrant):
    model, data = attach(), batch()
    if use_reentrant is not None:
        checkpointed(model, use_reentrant)
    states = model(**data, output_hidden_states=True).hidden_states
    with model.disable_adapter():
        base = model(**data, output_hidden_states=True).hidden_states
    moved = (states[1] - base[1]).norm(dim=-1) > 1e-3
    assert moved.tolist() == [[i in (0, 1, 5, 6) for i in range(12)]] * 2
    # the last of them goes into the head: a model whose norm is the identity shows it
    logits = model(**data).logits
    head = model.get_base_model().lm_head
    torch.testing.assert_close(head(states[-1]), logits)


# --- precision and placement --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bfloat16_base_keeps_its_stream_and_the_adapter_its_dtype(dtype):
    model, data = attach(tiny_llama().to(torch.bfloat16), dtype=dtype), batch()
    reference = attach()
    reference.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    loss, grads = step(model, data)
    expected, reference_grads = step(reference, data)
    assert loss == pytest.approx(expected.item(), rel=0.05)
    assert model(**data).logits.dtype == torch.bfloat16
    for name, gradient in grads.items():
        assert gradient.dtype == getattr(torch, dtype)
        cosine = torch.cosine_similarity(
            gradient.float().flatten(), reference_grads[name].flatten(), dim=0
        )
        assert cosine > 0.95, name


def test_autocast_leaves_the_arithmetic_of_the_edit_in_float32():
    model, data = attach(), batch()
    layer = next(iter(reft_layers(model).values()))
    h = torch.randn(2, 12, 32)
    expected = layer(h)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(h), expected)
        loss = model(**data).loss
    loss.backward()
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients(model).values())
    assert loss.item() == pytest.approx(step(model, data)[0].item(), rel=0.05)


@pytest.mark.parametrize("where", ["device_map", "cpu_offload", "disk"])
def test_models_that_accelerate_dispatches(where, tmp_path):
    data, base = batch(), tiny_llama()
    expected, expected_grads = step(attach(), data)
    if where == "cpu_offload":
        cpu_offload(base, execution_device="cpu")
    else:
        disk = {"model.layers.1": "disk"} if where == "disk" else {}
        rest = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
        device_map = dict.fromkeys(rest, "cpu") | {"model.layers.1": "cpu"} | disk
        dispatch_model(base, device_map, main_device="cpu", offload_dir=str(tmp_path))
    model = attach(base)
    got, grads = step(model, data)
    torch.testing.assert_close(got, expected)
    assert_same(grads, expected_grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", ["deepcopy", "deepcopy-checkpointing", "pickle"])
def test_a_copy_of_a_model_is_its_own(how):
    model, data = attach(), batch()
    if how == "deepcopy-checkpointing":
        checkpointed(model, False)
    loss, grads = step(model, data)
    ids = data["input_ids"][:, :7]
    before = model.eval().get_base_model().generate(ids, **GREEDY)
    model.train()
    if how == "pickle":
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    else:
        twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    again, twin_grads = step(twin, data)
    torch.testing.assert_close(again, loss)
    assert_same(twin_grads, grads, rtol=1e-4, atol=1e-6)
    twin.eval()
    for use_cache in (True, False):
        got = twin.get_base_model().generate(ids, **GREEDY, use_cache=use_cache)
        assert torch.equal(got, before)


# --- transformers' Trainer ----------------------------------------------------------------------


def trainer(model: PeftModel, folder: Path, steps: int, **more: Any) -> Trainer:
    rows = [{k: v[0] for k, v in batch(i, rows=1, prompt=4 + i % 3).items()} for i in range(16)]
    given = {
        "max_steps": steps,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 1,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        **more,
    }
    arguments = TrainingArguments(str(folder), **given)
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:3])


@pytest.mark.parametrize("method", ["loreft", "direft"])
def test_the_trainer_trains_only_the_adapter(method, tmp_path):
    model = attach(method=method)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run = trainer(model, tmp_path, 3)
    run.train()
    optimised = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for n, p in model.named_parameters() if ".reft_phi." in n}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (".reft_phi." not in name), name
    model.eval()
    with torch.no_grad():
        losses = [model(**{k: v[None] for k, v in row.items()}).loss for row in run.eval_dataset]
    expected = torch.stack(losses).mean().item()
    assert run.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd"])
def test_R_is_orthonormal_after_training_with_any_optimizer(optim, tmp_path):
    model = attach(r=4)
    trainer(model, tmp_path, 4, optim=optim).train()
    Rs = [t for k, t in model.state_dict().items() if k.endswith(".R")]
    for R in Rs:
        torch.testing.assert_close(R @ R.mT, torch.eye(4)[None], rtol=0, atol=1e-5)


@pytest.mark.parametrize("more", [{}, {"gradient_checkpointing": True}], ids=str)
def test_a_resumed_run_is_the_uninterrupted_run(more, tmp_path):
    whole = attach(dropout=0.1)
    trainer(whole, tmp_path / "whole", 4, **more).train()
    interrupted = attach(dropout=0.1)
    trainer(interrupted, tmp_path / "parts", 2, **more).train()
    resumed = attach(dropout=0.1)
    trainer(resumed, tmp_path / "parts", 4, **more).train(
        resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2")
    )
    states = whole.state_dict(), resumed.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-6, atol=1e-7)
