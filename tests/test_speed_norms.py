"""RMS norms in closed form: values and gradients as transformers' own, and whose they are."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from reftune.speed import norms

KINDS = [LlamaRMSNorm, Gemma3RMSNorm, Qwen3RMSNorm]


def frozen(kind: type[nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    norm = kind(48, eps=1e-3)
    generator = torch.Generator().manual_seed(3)
    weight = torch.empty(48).uniform_(-1, 2, generator=generator)
    norm.load_state_dict({"weight": weight})
    return norm.to(dtype).requires_grad_(False)


def value_and_gradient(norm: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = norm(x)
    weights = torch.linspace(-1, 1, y.numel()).view(y.shape)
    (grad,) = torch.autograd.grad((y.float() * weights).sum(), x)
    return y.detach(), grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_values_and_gradients_are_those_of_transformers(
    kind: type[nn.Module], dtype: torch.dtype, tolerance: float
) -> None:
    norm = frozen(kind, dtype)
    x = (3 * torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(1))).to(dtype)
    expected = value_and_gradient(norm, x)
    with norms.faster(norm):
        assert "forward" in vars(norm)
        found = value_and_gradient(norm, x)
    assert "forward" not in vars(norm)
    for a, b in zip(expected, found, strict=True):
        assert b.dtype is dtype
        error = (a - b).float().norm() / a.float().norm()
        assert error < tolerance


def test_gradients_are_those_of_finite_differences() -> None:
    scale = torch.linspace(-1, 2, 6)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    (grad,) = torch.autograd.grad(norms.rms_norm(x.requires_grad_(), scale, 0.1)[:, 2].sum(), x)
    step = 1e-3
    for i in range(6):
        moved = x.detach().clone()
        moved[:, i] += step
        up = norms.rms_norm(moved, scale, 0.1)[:, 2]
        moved[:, i] -= 2 * step
        down = norms.rms_norm(moved, scale, 0.1)[:, 2]
        assert torch.allclose((up - down) / (2 * step), grad[:, i], atol=2e-3)


def test_rows_of_zeros_have_finite_gradients() -> None:
    x = torch.zeros(2, 48)
    with norms.faster(norm := frozen(LlamaRMSNorm)):
        value, grad = value_and_gradient(norm, x)
    assert torch.equal(value, x)
    assert grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_along_the_normed_row_lose_no_digits_in_bfloat16(kind: type[nn.Module]) -> None:
    """What of g is along n cancels, and n must not have been rounded."""
    norm = frozen(kind, torch.bfloat16)
    x = torch.randn(4, 48, generator=torch.Generator().manual_seed(2)).bfloat16()
    g = (30 * norm(x).float() / norm.weight.float().square().clamp(min=0.1)).bfloat16()
    grads = []
    exact = kind(48, eps=1e-3).double().requires_grad_(False)
    exact.load_state_dict({"weight": norm.weight.double()})
    for module, given in ((exact, x.double()), (norm, x), (norm, x)):
        leaf = given.clone().requires_grad_()
        with norms.faster(module) if len(grads) == 2 else nullcontext():
            (grad,) = torch.autograd.grad(module(leaf), leaf, g.to(leaf.dtype))
        grads.append(grad.double())
    theirs, ours = ((grad - grads[0]).norm() for grad in grads[1:])
    assert ours < 1.5 * theirs


class RenamedRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.tiny = nn.Parameter(torch.ones(48)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, (48,), self.weight, self.tiny)


class TwoArgumentsRMSNorm(LlamaRMSNorm):
    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * gate


class CentredRMSNorm(LlamaRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


class GroupedRMSNorm(LlamaRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * torch.nn.functional.rms_norm(x.view(*x.shape[:-1], 2, 24), (24,)).view(
            x.shape
        )


@pytest.mark.parametrize(
    "make",
    [
        lambda: RenamedRMSNorm(),
        lambda: nn.RMSNorm(48),
        lambda: TwoArgumentsRMSNorm(48),
        lambda: CentredRMSNorm(48),
        lambda: GroupedRMSNorm(48),
        lambda: LlamaRMSNorm(48).double(),
    ],
)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_is_no_such_norm_is_left_alone(make: Any, dtype: torch.dtype | None) -> None:
    norm = make().requires_grad_(False)
    if dtype is not None and norm.weight.dtype is torch.float32:
        norm = norm.to(dtype)
    with norms.faster(norm):
        assert "forward" not in vars(norm)


def test_trying_a_norm_calls_no_hooks() -> None:
    norm = frozen(LlamaRMSNorm)
    seen: list[torch.Size] = []
    norm.register_forward_hook(lambda module, given, out: seen.append(out.shape))
    with norms.faster(norm):
        assert seen == []
        norm(torch.ones(1, 2, 48))
    assert seen == [(1, 2, 48)]


def test_inputs_that_were_not_tried_and_trained_weights_take_the_forward_of_the_norm() -> None:
    x = torch.randn(2, 48, generator=torch.Generator().manual_seed(1))
    norm = frozen(LlamaRMSNorm)
    with norms.faster(norm):
        assert norm(x.bfloat16()).dtype is torch.float32  # as transformers' does
        assert torch.equal(norm(hidden_states=x), LlamaRMSNorm.forward(norm, x))
        norm.requires_grad_(True)
        norm(x).sum().backward()
        assert norm.weight.grad is not None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_loaded_into_a_norm_count_and_the_same_ones_change_no_bit(
    kind: type[nn.Module], dtype: torch.dtype
) -> None:
    """A run resumed from a checkpoint of the whole model goes on as one never interrupted."""
    x = torch.randn(2, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    norm = frozen(kind, dtype)
    weights = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    with norms.faster(norm):
        before = norm(x)
        norm.load_state_dict({"weight": weights["weight"] * 2})
        changed = norm(x)
        assert torch.allclose(changed.float(), kind.forward(norm, x).float(), rtol=1e-2, atol=1e-6)
        assert not torch.allclose(changed, before, rtol=0.1)
        norm.load_state_dict(weights)
        assert torch.equal(norm(x), before)
        assert "_RMSNorm" in norm(x.requires_grad_()).grad_fn.name()


def test_norms_that_are_trained_or_compute_something_else_stay() -> None:
    class OddRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(hidden_states)

    trained = LlamaRMSNorm(48)
    model = nn.ModuleList([trained, frozen(OddRMSNorm), nn.LayerNorm(48), frozen(LlamaRMSNorm)])
    with norms.faster(model):
        assert ["forward" in vars(m) for m in model] == [False, False, False, True]
