"""torch.compile: one graph, and what it computes is what eager computes."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from reftune import METHODS, ReftConfig, options
from tiny import tiny_llama

# PEFT 0.21 asks a model for a property that transformers 5.23 deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
    # Dynamo itself instantiates a Function to trace one.
    pytest.mark.filterwarnings("ignore:.*Function.> should not be instantiated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def attach(**config: Any) -> PeftModel:
    torch.manual_seed(0)
    given = {"task_type": "CAUSAL_LM", "positions": "f2+l2", **config}
    model = get_peft_model(tiny_llama(), ReftConfig(**given)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".W", ".bias")) and "reft_phi" in name:
                parameter.mul_(3).add_(0.1)
    return model


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :7] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def step(model: Any, run: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = run(**batch()).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def check_step(model: Any, run: Any) -> None:
    expected, gradients = step(model, model)
    gradients = {n: g.clone() for n, g in gradients.items()}
    loss, got = step(model, run)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    assert got.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_forward_is_one_graph(method):
    model, data = attach(method=method), batch()
    run = torch.compile(model.get_base_model(), backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(run(**data).logits, model(**data).logits)
        with model.disable_adapter():
            base = model(**data).logits
    if method != "red":  # RED starts as the identity; here it does not
        assert not torch.allclose(base, model(**data).logits, atol=1e-2)


@pytest.mark.parametrize(
    "config",
    [
        {"tied": "sides"},
        {"tied": "none"},
        {"positions": "all"},
        {"edit_generated": True},
        {"positions": "f3", "act_fn": "relu"},
        {"subspaces": {"a": [0, 1]}},
    ],
    ids=str,
)
def test_configurations_are_one_graph(config):
    model, data = attach(**config), batch()
    run = torch.compile(model.get_base_model(), backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(run(**data).logits, model(**data).logits)


@pytest.mark.parametrize("method", ["loreft", "direft", "reft_r1"])
def test_a_training_step_has_the_gradients_of_eager(method):
    model = attach(method=method).train()
    run = torch.compile(model.get_base_model(), backend="aot_eager", fullgraph=True)
    check_step(model, run)


def test_the_peft_model_compiles_too():
    model = attach().train()
    check_step(model, torch.compile(model, backend="aot_eager"))


def test_several_optimizer_steps_keep_R_orthonormal_and_equal_eager():
    losses = {}
    for compiled in (False, True):
        model = attach(r=4).train()
        run = torch.compile(model.get_base_model(), backend="aot_eager") if compiled else model
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        losses[compiled] = []
        for _ in range(4):
            loss, _ = step(model, run)
            losses[compiled].append(loss)
            optimizer.step()
        for name, R in model.state_dict().items():
            if name.endswith(".R"):
                torch.testing.assert_close(R @ R.mT, torch.eye(4)[None], rtol=0, atol=1e-5)
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-3, atol=1e-3)
    assert losses[True][-1] < losses[True][0]


def test_options_are_seen_by_a_compiled_model():
    model, data = attach(), batch()
    run = torch.compile(model.get_base_model(), backend="eager")
    with torch.no_grad():
        for strength in (1.0, 0.0, -1.0):
            with options(strength=strength):
                torch.testing.assert_close(run(**data).logits, model(**data).logits)
        for n in (3, 9):
            with options(prompt_lengths=torch.tensor([n, n])):
                torch.testing.assert_close(run(**data).logits, model(**data).logits)


@pytest.mark.parametrize("edit_generated", [False, True])
def test_generate_with_a_static_cache_and_a_compiled_forward(edit_generated):
    model = attach(edit_generated=edit_generated)
    ids = batch()["input_ids"]
    given: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    expected = model.generate(ids, **given)
    base = model.get_base_model()
    base.forward = torch.compile(base.forward, backend="eager")
    got = base.generate(ids, **given, cache_implementation="static", disable_compile=True)
    assert torch.equal(got, expected)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="inductor needs a C++ compiler")
# inductor imports a part of torch that torch deprecates
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_inductor():
    model = attach().train()
    check_step(model, torch.compile(model.get_base_model(), fullgraph=True))
