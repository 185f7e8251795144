"""A tiny model with an adapter and a batch: what the tests of pyreft's flaws share."""

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from reftune import METHODS, Intervention, ReftConfig, reft_layers
from reftune.data import Collator
from tiny import tiny_llama

EOS = 2


def config(method: str = "loreft", **settings: Any) -> ReftConfig:
    settings = {"positions": "f1+l2", "task_type": "CAUSAL_LM"} | settings
    if METHODS[method].has_rank and METHODS[method].fixed_rank is None:
        settings = {"r": 4} | settings
    return ReftConfig(method=method, **settings)


def phis(model: nn.Module) -> list[Intervention]:
    return [layer.phi(name) for layer in reft_layers(model).values() for name in layer.reft_phi]


@torch.no_grad()
def strong(model: PeftModel, seed: int = 1) -> PeftModel:
    """Make the edits large (R is left as it is), so that whatever is wrong with them shows."""
    generator = torch.Generator().manual_seed(seed)
    for phi in phis(model):
        for name, parameter in phi.named_parameters():
            if name != "R" or not phi.orthonormal:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def reft(method: str = "loreft", **settings: Any) -> PeftModel:
    torch.manual_seed(0)
    return strong(get_peft_model(tiny_llama(), config(method, **settings))).eval()


def batch() -> dict[str, Tensor]:
    """Return prompts of 5 and 3 tokens with completions of 3 and 4, padded on the right."""
    rows = [
        {"input_ids": [1, 10, 11, 12, 13, 40, 41, EOS], "labels": [-100] * 5 + [40, 41, EOS]},
        {"input_ids": [1, 20, 21, 50, 51, 52, EOS], "labels": [-100] * 3 + [50, 51, 52, EOS]},
    ]
    return Collator(pad_token_id=0)(rows)


def prompts() -> dict[str, Tensor]:
    """Return the prompts of `batch`, padded on the left."""
    ids = torch.tensor([[1, 10, 11, 12, 13], [0, 0, 1, 20, 21]])
    return {"input_ids": ids, "attention_mask": ids.ne(0).long()}


def on_gpu(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cuda() for name, tensor in inputs.items()}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(**batch()).logits


def edited_columns(model: PeftModel, inputs: dict[str, Tensor]) -> list[list[int]]:
    """Return which columns of each row the edit of the first layer changes."""
    with torch.no_grad():
        edited = model(**inputs, output_hidden_states=True).hidden_states[1]
        with model.disable_adapter():
            base = model(**inputs, output_hidden_states=True).hidden_states[1]
    return [row.nonzero().flatten().tolist() for row in (edited - base).abs().amax(-1) > 1e-6]


def optimise(model: PeftModel, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        optimizer.step()


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def assert_orthonormal(model: PeftModel) -> None:
    logits(model)  # R is orthonormal in a forward
    for phi in phis(model):
        R = phi.get_parameter("R").detach()
        torch.testing.assert_close(
            R @ R.mT, torch.eye(R.shape[-2]).expand(R.shape[0], -1, -1), rtol=0, atol=1e-5
        )
