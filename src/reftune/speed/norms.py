"""RMS norms on CPUs with a backward in closed form, where their weights are frozen.

transformers writes them operator by operator, and autograd goes back through each of those. With
n = x / rms(x) and y = w n, the gradient of x is (g w - n mean(g w n)) / rms(x) (Zhang and Sennrich
2019, section 4.1).

Shapes: x, n, g (..., d), w (d,).
"""

from __future__ import annotations

import copy
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
    found = {m: tried for m in model.modules() if (tried := _tried(m)) is not None}
    return forward_replaced(list(found), lambda module: _forward(module, *found[module]))


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
        ctx.save_for_backward(x, inverse, scale)
        n: Tensor = exact * inverse
        return n.mul_(scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse, scale = ctx.saved_tensors
        g, n = grads[0].float() * scale, x.float() * inverse
        mean = torch.linalg.vecdot(g, n).div_(n.shape[-1]).unsqueeze(-1)
        dx = g.addcmul_(n, mean, value=-1).mul_(inverse)
        return dx.to(x.dtype), None, None


def _forward(
    module: nn.Module, weight: Tensor, offset: int, epsilon: float
) -> Callable[..., Tensor]:
    plain, version, scale = module.forward, weight._version, _scale(weight, offset)

    def run(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal version, scale
        x = args[0] if len(args) == 1 and not kwargs else None
        as_tried = (
            isinstance(x, Tensor)
            and x.device.type == "cpu"
            and module._parameters["weight"] is weight
            and not weight.requires_grad
            and x.dtype is weight.dtype
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled("cpu")
        )
        if not as_tried or x is None:
            return plain(*args, **kwargs)  # type: ignore[no-any-return]
        if weight._version != version:  # as when a checkpoint is loaded into the model
            version, scale = weight._version, _scale(weight, offset)
        return rms_norm(x, scale, epsilon)

    return run


def _scale(weight: Tensor, offset: int) -> Tensor:
    """Return what n is multiplied with, float32: offset + weight, and Gemma's offset is 1."""
    exact = weight.detach().float()
    return exact + offset if offset else exact


def _tried(module: nn.Module) -> tuple[Tensor, int, float] | None:
    """Return an RMS norm's weight, its offset and its epsilon, or None.

    What a module computes is tried on a copy in float32, on rows with a mean, with halves of
    different size, and as small as epsilon.
    """
    weight = module._parameters.get("weight")
    given = [getattr(module, name, None) for name in _EPSILON]
    epsilon = next((value for value in given if isinstance(value, float)), None)
    plain = (
        type(module).__name__.endswith("RMSNorm")
        and len(list(module.parameters())) == 1
        and not any(module.children())
        and "forward" not in vars(module)
    )
    if not plain or weight is None or epsilon is None or weight.ndim != 1:
        return None
    if weight.requires_grad or weight.device.type != "cpu" or weight.is_inference():
        return None
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    x = torch.randn(5, len(weight), generator=torch.Generator().manual_seed(0))
    x[1] += 3
    x[2, len(weight) // 2 :] *= 100
    x[3] *= epsilon**0.5
    x[4] *= epsilon
    try:
        with torch.no_grad():
            expected = copy.deepcopy(module).float().forward(x)
    except Exception:  # whatever it is that a module of this name cannot
        return None
    for offset in (0, 1):
        found = rms_norm(x, _scale(weight, offset), epsilon)
        if expected.shape == x.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-6):
            return weight, offset, epsilon
    return None
