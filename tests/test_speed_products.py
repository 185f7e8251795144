"""Attention by plain products, against torch's own in float64."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from reftune.speed import attention, products

SHAPES = [  # B, H, K, S, T, D
    (2, 6, 2, 70, 70, 8),
    (3, 4, 4, 33, 33, 16),
    (2, 4, 1, 20, 50, 8),
    (1, 2, 2, 2, 2, 4),
]
ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 0.03}


def inputs(B: int, H: int, K: int, S: int, T: int, D: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(B * H * S)
    query = torch.randn(B, S, H, D, dtype=dtype).transpose(1, 2)
    return [query, torch.randn(B, K, T, D, dtype=dtype), torch.randn(B, K, T, D, dtype=dtype)]


def mask_of(kind: str, B: int, S: int, T: int) -> Tensor | None:
    torch.manual_seed(5)
    if kind == "causal":
        return None
    if kind == "added":
        return torch.randn(B, 1, S, T)
    mask = torch.rand(B, 1, 1 if kind == "keys" else S, T) > 0.3
    mask[..., 0] = True
    return mask


def run(forward, tensors: list[Tensor], weights: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = forward(*leaves)
    grads = torch.autograd.grad((out * weights.to(out.dtype)).sum(), leaves)
    return [out.detach(), *grads]


@pytest.mark.parametrize("kept", [0, products.KEPT])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("kind", ["causal", "added", "keys", "any"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients_are_torchs(
    shape: tuple[int, ...], kind: str, dtype: torch.dtype, kept: int, monkeypatch
) -> None:
    monkeypatch.setattr(products, "KEPT", kept)
    B, H, _, S, T, D = shape
    if kind == "causal" and S != T:
        pytest.skip("causal attention is of a sequence to itself")
    tensors, mask = inputs(*shape, dtype), mask_of(kind, B, S, T)
    weights = torch.randn(B, H, S, D, dtype=torch.float64)

    def oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        exact = mask.double() if kind == "added" and mask is not None else mask
        return scaled_dot_product_attention(
            q, k, v, exact, is_causal=mask is None, scale=0.3, enable_gqa=True
        )

    ours = run(
        lambda q, k, v: products.attention(q, k, v, mask, mask is None, 0.3), tensors, weights
    )
    theirs = run(oracle, [t.double() for t in tensors], weights)
    for got, wanted in zip(ours, theirs, strict=True):
        assert got.dtype == dtype
        assert (got.double() - wanted).norm() <= ROUNDING[dtype] * (wanted.norm() + 1e-3)


def test_a_row_that_may_attend_to_nothing_spoils_no_other() -> None:
    tensors = inputs(1, 2, 2, 4, 6, 8, torch.float32)
    mask = torch.ones(1, 1, 4, 6, dtype=torch.bool)
    mask[:, :, 2] = False
    read = torch.tensor([1.0, 1.0, 0.0, 1.0]).view(1, 1, 4, 1).expand(1, 2, 4, 8)
    ours = run(lambda q, k, v: products.attention(q, k, v, mask, False, 0.3), tensors, read)
    theirs = run(
        lambda q, k, v: scaled_dot_product_attention(q, k, v, mask, scale=0.3), tensors, read
    )
    torch.testing.assert_close(ours[0][:, :, [0, 1, 3]], theirs[0][:, :, [0, 1, 3]])
    for got, wanted in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(got, wanted)


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    q, k, v = inputs(8, 4, 4, 64, 64, 8, torch.float32)
    torch.manual_seed(1)
    kept = products.attention(q, k, torch.ones_like(v), None, True, 0.3, dropout=0.25)
    assert kept.mean().item() == pytest.approx(1.0, abs=0.02)
    assert kept.std() > 0.05
    first_row = kept[:, :, 0]  # attends to itself alone: kept whole, or dropped
    assert sorted(first_row.unique().tolist()) == pytest.approx([0.0, 1 / 0.75])


def test_gradients_with_dropout_are_those_of_the_same_draw(monkeypatch) -> None:
    monkeypatch.setattr(products, "KEPT", 33)
    tensors = [t.double() for t in inputs(2, 4, 2, 40, 40, 4, torch.float32)]

    def draw(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(3)
        return products.attention(q, k, v, None, True, 0.5, dropout=0.4)

    assert torch.autograd.gradcheck(draw, [t.requires_grad_() for t in tensors])


@pytest.mark.parametrize(
    ("mask", "given"),
    [
        (None, {"is_causal": False}),
        (None, {"softcap": 30.0}),
        (None, {"position_bias": torch.zeros(1, 2, 8, 8)}),
        (torch.ones(1, 2, 8, 8), {}),
    ],
)
def test_what_products_do_not_know_is_left_to_transformers(mask, given) -> None:
    q, k, v = inputs(1, 2, 2, 8, 8, 4, torch.float32)
    assert attention._short(nn.Module(), q, k, v, mask, given) is None
    assert attention._short(nn.Module(), q, k, v, None, {}) == 0.5
    assert attention._short(nn.Module(), q, k, v, None, {"scaling": 0.7}) == 0.7


def test_under_autocast_transformers_attention_is_used() -> None:
    q, k, v = inputs(1, 2, 2, 8, 8, 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention._short(nn.Module(), q, k, v, None, {}) is None


def test_the_output_may_be_changed_in_place() -> None:
    q, k, v = (torch.randn(1, 2, 40, 4) for _ in range(3))
    q.requires_grad_()
    out = products.attention(q, k, v, None, True, 0.5).transpose(1, 2).contiguous()
    out.mul_(2)
    (grad,) = torch.autograd.grad(out.sum(), q)
    (half,) = torch.autograd.grad(products.attention(q, k, v, None, True, 0.5).sum(), q)
    torch.testing.assert_close(grad, 2 * half)
