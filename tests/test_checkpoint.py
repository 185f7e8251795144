"""A checkpoint that does not fit is an error that names the tensor, and changes no model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from reftune import AdapterMismatchError, ReftConfig
from tiny import tiny_llama

# PEFT 0.21 asks a model for a property that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

IDS = torch.randint(3, 259, (2, 9), generator=torch.Generator().manual_seed(0))
WEIGHTS = "adapter_model.safetensors"
KEY = "base_model.model.model.layers.1.reft.reft_phi.W"
SHORT = "model.layers.1.reft.reft_phi.W"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    config = ReftConfig(task_type="CAUSAL_LM", r=4, positions="f2+l2")
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    return tmp_path


def edit(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return apply


def widen(tensors: dict[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if tensor.shape[-1] == 32:
            tensors[key] = torch.cat([tensor, tensor], dim=-1)


def truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def poison(value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[KEY][0, 1, 2] = value

    return change


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing tensor": (edit(lambda t: t.__delitem__(KEY)), f"missing tensors {SHORT}"),
    "tensor too many": (
        edit(lambda t: t.update({KEY.replace(".1.", ".7."): torch.zeros(1, 4, 32)})),
        f"too many tensors {SHORT.replace('.1.', '.7.')}",
    ),
    "wrong shape": (
        edit(lambda t: t.update({KEY: torch.zeros(1, 5, 32)})),
        rf"{SHORT} has shape \(1, 5, 32\), this model and config need \(1, 4, 32\)",
    ),
    "other base": (edit(widen), r"trained on a model of width 64, this one has 32"),
    "truncated": (truncate, "cannot be read as safetensors.*truncated"),
    "nan": (edit(poison(float("nan"))), f"{SHORT} has values that are not finite"),
    "infinity": (edit(poison(float("inf"))), f"{SHORT} has values that are not finite"),
}


def snapshot(model: nn.Module) -> dict[str, Any]:
    with torch.no_grad():
        return {
            "output": model(IDS).logits,
            "state": {k: v.clone() for k, v in model.state_dict().items()},
            "grads": {n: p.requires_grad for n, p in model.named_parameters()},
            "modules": [(n, type(m)) for n, m in model.named_modules()],
            "hooks": [
                (n, len(m._forward_hooks), len(m._forward_pre_hooks))
                for n, m in model.named_modules()
            ],
            "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
            "adapters": sorted(getattr(model, "peft_config", {})),
        }


def assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert torch.equal(before.pop("output"), after.pop("output"))
    states = before.pop("state"), after.pop("state")
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    assert before == after


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("damage", DAMAGE)
def test_from_pretrained_names_the_tensor_and_changes_nothing(damage, low_cpu_mem_usage, saved):
    spoil, message = DAMAGE[damage]
    spoil(saved)
    model = tiny_llama()
    before = snapshot(model)
    with pytest.raises(AdapterMismatchError, match=message):
        PeftModel.from_pretrained(model, saved, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_unchanged(before, snapshot(model))


@pytest.mark.parametrize("damage", DAMAGE)
def test_load_adapter_names_the_tensor_and_changes_nothing(damage, saved):
    model = PeftModel.from_pretrained(tiny_llama(), saved).eval()
    spoil, message = DAMAGE[damage]
    spoil(saved)
    before = snapshot(model)
    with pytest.raises(AdapterMismatchError, match=message):
        model.load_adapter(saved, "second")
    assert_unchanged(before, snapshot(model))


def test_another_base_is_told_by_its_width(saved):
    config = tiny_llama().config
    config.hidden_size, config.head_dim = 64, 16
    model = LlamaForCausalLM(config).eval()
    before = snapshot(model)
    with pytest.raises(AdapterMismatchError, match="of width 32, this one has 64"):
        PeftModel.from_pretrained(model, saved)
    assert_unchanged(before, snapshot(model))


def test_a_missing_file_is_an_error_that_names_the_folder(saved):
    (saved / WEIGHTS).unlink()
    with pytest.raises((AdapterMismatchError, OSError, ValueError), match=str(saved)):
        PeftModel.from_pretrained(tiny_llama(), saved)
