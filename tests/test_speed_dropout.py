"""Dropout by 16-bit numbers: its share, its mean, its seed, and whose it is."""

import pytest
import torch
from torch import nn

from reftune.speed import dropout


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_the_share_that_is_dropped_and_the_mean(p: float) -> None:
    torch.manual_seed(0)
    n = 400_000
    drawn = dropout.kept(torch.empty(n), p)
    error = 5 * (p * (1 - p) / n) ** 0.5  # five standard errors
    assert (drawn == 0).float().mean().item() == pytest.approx(p, abs=error)
    assert drawn[drawn != 0].unique().tolist() == pytest.approx([1 / (1 - p)], rel=1e-3)
    pairs = drawn.bool()[: n // 2 * 2].view(-1, 2)
    both = (~pairs[:, 0] & ~pairs[:, 1]).float().mean().item()
    assert both == pytest.approx(p * p, abs=2 * error)  # neighbours of one draw are independent


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 3, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    like = torch.empty(shape, dtype=dtype)
    drawn = dropout.kept(like, 0.5)
    assert (drawn.shape, drawn.dtype) == (like.shape, like.dtype)


def test_the_seed_decides_and_the_mask_of_the_forward_is_that_of_the_backward() -> None:
    model = nn.Sequential(nn.Dropout(0.3), nn.Dropout(0.0), nn.Dropout(0.2, inplace=True))
    x = torch.ones(50, 8, requires_grad=True)
    with dropout.faster(model[:1]):
        torch.manual_seed(7)
        first = model[0](x)
        torch.manual_seed(7)
        again = model[0](x)
        assert torch.equal(first, again)
        assert not torch.equal(first, model[0](x))
        (grad,) = torch.autograd.grad(first.sum(), x)
        assert torch.equal(grad, first.detach())
        assert torch.equal(model.eval()[0](x), x)
    assert "forward" not in vars(model[0])


def test_only_plain_dropout_is_replaced_and_put_back() -> None:
    class Own(nn.Dropout):
        pass

    model = nn.ModuleList([nn.Dropout(0.3), nn.Dropout(0.0), nn.Dropout(0.2, inplace=True), Own()])
    with dropout.faster(model):
        assert ["forward" in vars(m) for m in model] == [True, False, False, False]
    assert not any("forward" in vars(m) for m in model)
