"""RMS norms on CPUs with a backward in closed form, where their weights are frozen.

transformers writes them operator by operator, and autograd goes back through each of those. With
n = x / rms(x) and y = w n, the gradient of x is (g w - n mean(g w n)) / rms(x) (Zhang and Sennrich
2019, section 4.1).

Shapes: x, n, g (..., d), w (d,).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from reftune.speed.patch import forward_replaced

_EPSILON = ("variance_epsilon", "eps")


def faster(model: nn.Module) -> AbstractContextManager[None]:
    """Let the RMS norms of a model on a CPU be computed so, in a block."""
    found = {m: w for m in model.modules() if (w := _scale(m)) is not None}
    return forward_replaced(list(found), lambda module: _forward(module, found[module]))


def rms_norm(x: Tensor, scale: Tensor, epsilon: float) -> Tensor:
    """Return x (..., d) over the root of the mean of its squares, times `scale` (d,), float32."""
    out: Tensor = _RMSNorm.apply(x, scale, epsilon)  # type: ignore[no-untyped-call]
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, epsilon: float) -> Tensor:
        exact = x.float()
        squares = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square_()
        inverse = squares.div_(x.shape[-1]).add_(epsilon).rsqrt_()
        n: Tensor = exact * inverse
        ctx.save_for_backward(n.to(x.dtype), inverse, scale)
        return (n * scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        n, inverse, scale = ctx.saved_tensors
        g, exact = grads[0].float() * scale, n.float()
        mean = torch.linalg.vecdot(g, exact).div_(n.shape[-1]).unsqueeze(-1)
        dx = g.addcmul_(exact, mean, value=-1).mul_(inverse)
        return dx.to(n.dtype), None, None


def _forward(module: nn.Module, scale: Tensor) -> Callable[[Tensor], Tensor]:
    plain, epsilon = module.forward, _epsilon(module)

    def run(x: Tensor) -> Tensor:
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return plain(x)  # type: ignore[no-any-return]
        return rms_norm(x, scale, epsilon)

    return run


def _scale(module: nn.Module) -> Tensor | None:
    """Return what a module multiplies n with, in float32, if it is an RMS norm; else None.

    Gemma's multiply with 1 + weight. What a module computes is tried, not told by its name.
    """
    weight = dict(module.named_parameters()).get("weight")
    if not type(module).__name__.endswith("RMSNorm") or weight is None or weight.ndim != 1:
        return None
    plain = len(list(module.parameters())) == 1 and not any(module.children())
    if not plain or weight.requires_grad or weight.device.type != "cpu":
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, len(weight), generator=generator).to(weight.dtype)
    rounding = 8 * torch.finfo(weight.dtype).eps
    with torch.no_grad():
        expected = module(x)
        for scale in (weight.detach().float(), 1 + weight.detach().float()):
            found = rms_norm(x, scale, _epsilon(module))
            if torch.allclose(found, expected, rtol=rounding, atol=rounding):
                return scale
    return None


def _epsilon(module: nn.Module) -> float:
    return float(next(getattr(module, name) for name in _EPSILON if hasattr(module, name)))
