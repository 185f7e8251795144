"""RMS norms in closed form: values and gradients as transformers' own, and whose they are."""

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


def test_norms_that_are_trained_or_compute_something_else_stay() -> None:
    class OddRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(hidden_states)

    trained = LlamaRMSNorm(48)
    model = nn.ModuleList([trained, frozen(OddRMSNorm), nn.LayerNorm(48), frozen(LlamaRMSNorm)])
    with norms.faster(model):
        assert ["forward" in vars(m) for m in model] == [False, False, False, True]
