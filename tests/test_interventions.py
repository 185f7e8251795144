"""The formulas against loops over tokens and rows of R, written from the paper."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers.activations import ACT2FN

from reftune import METHODS, ReftConfig, ReftConfigError, options, set_strength, set_subspaces
from reftune.interventions import Intervention
from reftune.layer import ReftLayer
from tiny import tiny_llama

# PEFT 0.21 asks a model for a property that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

D, RANK, B, S = 12, 4, 5, 11
RANKED = [name for name, cls in METHODS.items() if cls.has_rank and cls.fixed_rank is None]
ACTIVATED = [name for name, cls in METHODS.items() if cls.has_activation]
NOOP = {"loreft", "noreft", "direft", "direft_orthonormal", "lobireft", "red"}

Parameters = dict[str, Tensor]
Activation = Callable[[Tensor], Tensor]


def in_span_of_R(coefficient: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make an edit, the sum over the rows k that are on of coefficient_k R_k."""

    def edit(p: Parameters, h: Tensor, act: Activation, on: Iterable[int]) -> Tensor:
        total = torch.zeros_like(h)
        for k in on:
            total = total + coefficient(p, h, act, k) * p["R"][k]
        return total

    return edit


def affine(p: Parameters, h: Tensor, act: Activation, k: int) -> Tensor:
    return act(torch.dot(p["W"][k], h) + p["bias"][k])


def difference(p: Parameters, h: Tensor, act: Activation, k: int) -> Tensor:
    return affine(p, h, act, k) - torch.dot(p["R"][k], h)


FORMULAS: dict[str, Callable[..., Tensor]] = {
    "loreft": in_span_of_R(difference),
    "noreft": in_span_of_R(difference),
    "direft": in_span_of_R(affine),
    "direft_orthonormal": in_span_of_R(affine),
    "consreft": in_span_of_R(lambda p, h, act, k: p["bias"][k] - torch.dot(p["R"][k], h)),
    "lobireft": in_span_of_R(lambda p, h, act, k: p["bias"][k]),
    "red": lambda p, h, act, on: p["scale"] * h + p["bias"] - h,
}


def pooled(p: Parameters, tokens: list[Tensor], topk: int) -> Tensor:
    """ReFT-r1: the mean of the k largest ReLU(R h) of an example's tokens, times R."""
    latents = sorted((max(0.0, float(torch.dot(p["R"][0], h))) for h in tokens), reverse=True)
    k = min(topk, len(latents))
    return sum(latents[:k]) / k * p["R"][0]


def slots_of(n: int, config: ReftConfig) -> list[tuple[int, int]]:
    """Return (rank in the prompt, group) of each edited token of a prompt with n tokens."""
    if config.positions == "all":
        return [(i, 0) for i in range(n)]
    parsed = config.parsed_positions
    p, s = parsed.prefix, parsed.suffix
    if n < p + s:
        p, s = min(p, n // 2), min(s, -(-n // 2))
    slots = [(i, i) for i in range(p)]
    slots += [(n - s + i, parsed.prefix + i) for i in range(s)]
    two = bool(parsed.prefix and parsed.suffix)
    group = {
        "all": lambda slot: 0,
        "sides": lambda slot: int(two and slot >= parsed.prefix),
        "none": lambda slot: slot,
    }[config.tied]
    return [(rank, group(slot)) for rank, slot in slots]


def naive(
    config: ReftConfig, phi: Intervention, h: Tensor, prompt: Tensor, on: list[list[int]]
) -> Tensor:
    """Edit one token after the other; `on` are the rows of R for each example."""
    act = ACT2FN[config.act_fn or "linear"]
    tensors = values(phi)
    groups = [
        {k: t[g] for k, t in tensors.items()} for g in range(len(next(iter(tensors.values()))))
    ]
    out = h.clone()
    for b in range(h.shape[0]):
        columns = [t for t in range(h.shape[1]) if prompt[b, t]]
        slots = [(columns[rank], g) for rank, g in slots_of(len(columns), config)]
        for t, g in slots:
            if config.method == "reft_r1":
                tokens = [h[b, u] for u, other in slots if other == g]
                out[b, t] = h[b, t] + pooled(groups[g], tokens, config.topk)
            else:
                out[b, t] = h[b, t] + FORMULAS[config.method](groups[g], h[b, t], act, on[b])
    return out


@torch.no_grad()
def values(phi: Intervention) -> Parameters:
    """Return what the formula takes, (G, ...) each; R as the formula means it."""
    return {name: t.detach() for name, t in phi.tensors().items()}


def make(seed: int = 0, **settings: Any) -> tuple[ReftConfig, ReftLayer]:
    """Return a layer with one float64 adapter whose parameters are all random."""
    torch.manual_seed(seed)
    settings = {"method": "loreft", "dtype": "float64", **settings}
    if settings["method"] in RANKED:
        settings.setdefault("r", RANK)
    config = ReftConfig(**settings)
    layer = ReftLayer(D).eval()
    layer.add("default", config, None)
    if config.method == "red":
        for p in layer.parameters():
            torch.nn.init.normal_(p)
    return config, layer


def hidden(seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, S, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def prompts(seed: int = 2) -> Tensor:
    """Return prompts padded left and right, with a gap, with one token, and a full one."""
    mask = torch.zeros(B, S, dtype=torch.bool)
    mask[0, 4:], mask[1, :6], mask[2, 5], mask[3] = True, True, True, True
    mask[4] = torch.rand(S, generator=torch.Generator().manual_seed(seed)) < 0.4
    return mask


ALL_ROWS = [list(range(RANK))] * B


def test_each_method_has_a_formula() -> None:
    assert set(FORMULAS) | {"reft_r1"} == set(METHODS)


@pytest.mark.parametrize("positions", ["f2+l3", "f3", "l2", "f1+l1", "all"])
@pytest.mark.parametrize("tied", ["all", "sides", "none"])
@pytest.mark.parametrize("method", METHODS)
def test_edit_equals_the_loop(method: str, tied: str, positions: str) -> None:
    if tied == "none" and (positions == "all" or METHODS[method].pools_tokens):
        with pytest.raises(ReftConfigError, match="tied='none'"):
            make(method=method, tied=tied, positions=positions)
        return
    config, layer = make(method=method, tied=tied, positions=positions, topk=2)
    h, prompt = hidden(), prompts()
    with options(prompt_mask=prompt):
        out = layer(h)
    torch.testing.assert_close(out, naive(config, layer.phi("default"), h, prompt, ALL_ROWS))
    assert torch.equal(out[~prompt], h[~prompt])


@pytest.mark.parametrize("act_fn", ["relu", "gelu", "tanh"])
@pytest.mark.parametrize("method", METHODS)
def test_activation(method: str, act_fn: str) -> None:
    if method not in ACTIVATED:
        with pytest.raises(ReftConfigError, match="no activation; leave act_fn out"):
            ReftConfig(method=method, act_fn=act_fn)
        return
    config, layer = make(method=method, positions="f2+l3", act_fn=act_fn)
    h, prompt = hidden(), prompts()
    with options(prompt_mask=prompt):
        out = layer(h)
    torch.testing.assert_close(out, naive(config, layer.phi("default"), h, prompt, ALL_ROWS))


def test_unknown_activation_names_the_known() -> None:
    with pytest.raises(ReftConfigError, match=r"act_fn is 'sine'.*gelu"):
        ReftConfig(act_fn="sine").build(D)


@pytest.mark.parametrize("tied", ["all", "none"])
def test_loreft_replaces_exactly_its_subspace(tied: str) -> None:
    _, layer = make(method="loreft", positions="l1", tied=tied)
    phi = layer.phi("default")
    R, W, b = (values(phi)[name][0] for name in ("R", "W", "bias"))
    h = hidden()
    before, after = h[:, -1], layer(h)[:, -1]
    near = {"atol": 1e-5, "rtol": 0.0}  # R is drawn in float32
    torch.testing.assert_close(after @ R.T, before @ W.T + b, **near)
    outside = torch.eye(D, dtype=R.dtype) - R.T @ R
    torch.testing.assert_close(after @ outside, before @ outside, **near)


@pytest.mark.parametrize("topk", [1, 3, 50])
@pytest.mark.parametrize("positions", ["f2+l3", "l7", "all"])
def test_reft_r1_pools_over_tokens_not_over_empty_slots(positions: str, topk: int) -> None:
    config, layer = make(method="reft_r1", positions=positions, topk=topk)
    h, prompt = hidden(), prompts()
    with options(prompt_mask=prompt):
        out = layer(h)
    torch.testing.assert_close(out, naive(config, layer.phi("default"), h, prompt, ALL_ROWS))
    for b in range(B):
        alone = layer(h[b : b + 1, prompt[b]])
        torch.testing.assert_close(out[b : b + 1, prompt[b]], alone)


SUBSPACES = {"a": [0], "b": [3, 1], "empty-handed": [2]}


@pytest.mark.parametrize("tied", ["all", "sides", "none"])
@pytest.mark.parametrize("method", RANKED)
def test_subspaces_edit_only_their_rows(method: str, tied: str) -> None:
    config, layer = make(method=method, tied=tied, positions="f2+l3", subspaces=SUBSPACES)
    h, prompt, phi = hidden(), prompts(), layer.phi("default")
    with options(prompt_mask=prompt, subspaces=["b"]):
        torch.testing.assert_close(layer(h), naive(config, phi, h, prompt, [[1, 3]] * B))
    names = [["a"], ["b"], ["a", "b"], [], ["empty-handed"]]
    rows = [[0], [1, 3], [0, 1, 3], [], [2]]
    with options(prompt_mask=prompt, subspaces=names):
        torch.testing.assert_close(layer(h), naive(config, phi, h, prompt, rows))
    set_subspaces(layer, ["a"])
    with options(prompt_mask=prompt):
        torch.testing.assert_close(layer(h), naive(config, phi, h, prompt, [[0]] * B))
    set_subspaces(layer, None)
    with options(prompt_mask=prompt):
        torch.testing.assert_close(layer(h), naive(config, phi, h, prompt, ALL_ROWS))


@pytest.mark.parametrize("positions", ["f2+l3", "all"])
def test_subspaces_of_loreft_leave_the_other_rows(positions: str) -> None:
    _, layer = make(positions=positions, subspaces=SUBSPACES)
    phi, h = layer.phi("default"), hidden()
    R, W, b = (values(phi)[name][0] for name in ("R", "W", "bias"))
    with options(subspaces=["b"]):
        out = layer(h)[:, :2]
    near = {"atol": 1e-5, "rtol": 0.0}  # R is drawn in float32
    torch.testing.assert_close(out @ R[[1, 3]].T, h[:, :2] @ W[[1, 3]].T + b[[1, 3]], **near)
    torch.testing.assert_close(out @ R[[0, 2]].T, h[:, :2] @ R[[0, 2]].T, **near)


def test_unknown_subspace_and_wrong_number_of_examples() -> None:
    _, layer = make(subspaces=SUBSPACES)
    with options(subspaces=["aa"]), pytest.raises(ReftConfigError, match="Did you mean 'a'"):
        layer(hidden())
    with options(subspaces=[["a"]] * 3), pytest.raises(ReftConfigError, match="3 examples"):
        layer(hidden())


@pytest.mark.parametrize("positions", ["f2+l3", "all"])
@pytest.mark.parametrize("method", METHODS)
def test_strength_scales_the_edit(method: str, positions: str) -> None:
    _, layer = make(method=method, positions=positions)
    h = hidden()
    edit = layer(h) - h
    assert edit.abs().max() > 1e-3
    for strength in (0.0, 0.5, 1.0, -1.0):
        with options(strength=strength):
            torch.testing.assert_close(layer(h), h + strength * edit)
        set_strength(layer, strength)
        torch.testing.assert_close(layer(h), h + strength * edit)
    set_strength(layer, 0.0)
    assert torch.equal(layer(h), h)


@pytest.mark.parametrize("tied", ["all", "sides"])
@pytest.mark.parametrize("method", METHODS)
def test_init_noop_is_the_identity(method: str, tied: str) -> None:
    config = ReftConfig(method=method, init="noop", tied=tied, dtype="float64")
    if method not in NOOP:
        with pytest.raises(ReftConfigError, match=rf"{method!r}.*Use init='paper'"):
            config.build(D)
        return
    layer = ReftLayer(D)
    layer.add("default", config, None)
    torch.testing.assert_close(layer(hidden()), hidden())


@pytest.mark.parametrize("act_fn", ["relu", "sigmoid"])
@pytest.mark.parametrize("method", ACTIVATED)
def test_init_noop_with_an_activation(method: str, act_fn: str) -> None:
    config = ReftConfig(method=method, init="noop", act_fn=act_fn, dtype="float64")
    if method.startswith("direft") and act_fn == "relu":
        layer = ReftLayer(D)
        layer.add("default", config, None)
        torch.testing.assert_close(layer(hidden()), hidden())
    else:
        with pytest.raises(ReftConfigError, match="Use init='paper'"):
            config.build(D)


@pytest.mark.parametrize("positions", ["f2+l3", "all"])
@pytest.mark.parametrize("dropout_on", ["edit", "output"])
@pytest.mark.parametrize("method", METHODS)
def test_dropout(method: str, dropout_on: str, positions: str) -> None:
    config, layer = make(method=method, positions=positions, dropout=0.5, dropout_on=dropout_on)
    h, prompt = hidden(), prompts()
    with options(prompt_mask=prompt):
        without = layer(h)
        layer.train()
        out = layer(h)
    edited = torch.zeros_like(prompt)
    for b in range(B):
        columns = prompt[b].nonzero()[:, 0]
        edited[b, columns[[rank for rank, _ in slots_of(len(columns), config)]]] = True
    assert torch.equal(out[~edited], h[~edited])
    edit = (without - h)[edited]
    kept, dropped = h[edited] + 2 * edit, h[edited]
    if dropout_on == "output":
        kept, dropped = 2 * without[edited], torch.zeros_like(dropped)
    is_kept = torch.isclose(out[edited], kept)
    assert (is_kept | torch.isclose(out[edited], dropped)).all()
    assert 0.35 < is_kept.double().mean() < 0.65
    layer.eval()
    with options(prompt_mask=prompt):
        assert torch.equal(layer(h), without)


@pytest.mark.parametrize("method", METHODS)
def test_float32_parameters_edit_a_bfloat16_stream(method: str) -> None:
    config, layer = make(method=method, dtype="float32", positions="f2+l3")
    h, full = hidden(dtype=torch.bfloat16), torch.ones(B, S, dtype=torch.bool)
    out = layer(h)
    assert out.dtype == torch.bfloat16
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    exact = naive(config, layer.phi("default"), h.float(), full, ALL_ROWS)
    expected = h + (exact - h.float()).bfloat16()
    # Rounding once: the edit to bfloat16. An edit computed in bfloat16 differs in most numbers.
    assert (out == expected).double().mean() > 0.99


@pytest.mark.parametrize("positions", ["f2+l3", "all"])
@pytest.mark.parametrize("method", METHODS)
def test_autocast_does_not_lower_the_precision(method: str, positions: str) -> None:
    _, layer = make(method=method, dtype="float32", positions=positions)
    h = hidden(dtype=torch.float32)
    expected = layer(h)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(h), expected)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_base_keeps_float32_parameters_and_gradients(method: str) -> None:
    model = get_peft_model(tiny_llama().bfloat16(), ReftConfig(method=method))
    parameters = [p for p in model.parameters() if p.requires_grad]
    ids, prompt = torch.arange(3, 15).view(1, -1), torch.arange(12).view(1, -1) < 8
    model(input_ids=ids, labels=ids.masked_fill(prompt, -100)).loss.backward()
    assert {p.dtype for p in parameters} == {torch.float32}
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in parameters)
    assert any(p.grad.any() for p in parameters)
