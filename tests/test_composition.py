"""Several ReFTs on one model: in order, as a sum, and as one adapter of their weighted sum."""

from itertools import combinations_with_replacement
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from adapted_tiny import batch, config, logits, phis, strong
from reftune import METHODS, ReftConfig, options, reft_layers, set_composition, set_strength
from reftune.errors import ReftConfigError
from tiny import tiny_llama

AFFINE = ("loreft", "noreft", "direft", "direft_orthonormal", "consreft", "lobireft")
IN_ONE_R = {"loreft", "noreft", "direft", "direft_orthonormal", "lobireft"}

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def adapted(*configs: ReftConfig) -> PeftModel:
    """Return a tiny model with adapters a, b, c, ..., with large edits, all active in order."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), configs[0], "a")
    for name, other in zip("bcdef", configs[1:], strict=False):
        model.add_adapter(name, other)
    strong(model).eval()
    with torch.no_grad():
        for phi in phis(model):
            for name, parameter in phi.named_parameters():
                if name != "R" or not phi.orthonormal:
                    parameter.mul_(0.3)
    model.base_model.set_adapter(list("abcdef")[: len(configs)])
    return model


def apart(model: PeftModel, layer: int, h: Tensor, *names: str) -> Tensor:
    """Return the edit of the hidden states (N, d) by adapters' formulas, each for group 0."""
    phis = [reft_layers(model)[f"base_model.model.model.layers.{layer}.reft"].phi(n) for n in names]
    tensors = [{k: t[0] for k, t in phi.tensors().items()} for phi in phis]
    everything = torch.ones(len(h), dtype=torch.bool)
    return torch.stack([p(h, t, everything) for p, t in zip(phis, tensors, strict=True)]).sum(0)


@torch.no_grad()
def first_states(model: PeftModel) -> tuple[Tensor, Tensor]:
    """Return the output of the first layer (S, d) of one example: edited, and as it was."""
    ids = torch.tensor([[1, 10, 11, 12, 13]])
    edited = model(ids, output_hidden_states=True).hidden_states[1]
    with model.disable_adapter():
        return edited[0], model(ids, output_hidden_states=True).hidden_states[1][0]


# --- together -----------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["all", "f1+l2"])
def test_in_order_each_sees_the_edits_of_those_before(positions: str) -> None:
    model = adapted(config(positions=positions), config("direft", positions=positions))
    orders = {}
    for names in ("ab", "ba"):
        model.base_model.set_adapter(list(names))
        got, h = first_states(model)
        expected = h.clone()
        rows = slice(None) if positions == "all" else [0, 3, 4]
        for name in names:
            expected[rows] = expected[rows] + apart(model, 0, expected[rows], name)
        torch.testing.assert_close(got, expected)
        orders[names] = got
    assert not torch.allclose(orders["ab"], orders["ba"], atol=1e-3)


@pytest.mark.parametrize("positions", ["all", "f1+l2"])
def test_a_sum_sees_the_unedited_states_and_has_no_order(positions: str) -> None:
    model = adapted(config(positions=positions), config("direft", positions=positions))
    in_order, h = first_states(model)
    set_composition(model, "sum")
    rows = slice(None) if positions == "all" else [0, 3, 4]
    expected = h.clone()
    expected[rows] = h[rows] + apart(model, 0, h[rows], "a", "b")
    got, _ = first_states(model)
    torch.testing.assert_close(got, expected)
    assert not torch.allclose(got, in_order, atol=1e-3)
    model.base_model.set_adapter(["b", "a"])
    torch.testing.assert_close(first_states(model)[0], got)
    set_composition(model, "in_order")
    model.base_model.set_adapter(["a", "b"])
    assert torch.equal(first_states(model)[0], in_order)


def test_where_tokens_do_not_overlap_order_does_not_matter_at_a_layer() -> None:
    model = adapted(config(positions="f1", layers=[0]), config("direft", positions="l1"))
    one, _ = first_states(model)
    model.base_model.set_adapter(["b", "a"])
    assert torch.equal(first_states(model)[0], one)


def test_orthogonal_subspaces_do_not_make_order_irrelevant() -> None:
    """W reads all of h, so what one writes the other reads."""
    model = adapted(config(positions="all"), config(positions="all"))
    with torch.no_grad():
        for layer in reft_layers(model).values():
            rows = torch.linalg.qr(torch.randn(32, 8))[0].T
            for name, part in zip("ab", rows.split(4), strict=True):
                layer.phi(name).get_parameter("R").copy_(part[None])
    one, _ = first_states(model)
    model.base_model.set_adapter(["b", "a"])
    assert not torch.allclose(first_states(model)[0], one, atol=1e-3)


def test_an_adapter_added_later_is_composed_as_the_others_are() -> None:
    model = adapted(config(layers=[0]), config("direft", layers=[0]))
    set_composition(model, "sum")
    model.add_adapter("c", config(layers=[1]))
    assert {layer.composition for layer in reft_layers(model).values()} == {"sum"}


def test_an_unknown_composition_is_refused() -> None:
    with pytest.raises(ReftConfigError, match="accepted are in_order, sum. Did you mean 'sum'"):
        set_composition(adapted(config()), "summ")  # type: ignore[arg-type]


def test_two_active_adapters_are_trained_together() -> None:
    model = adapted(config(), config("direft", positions="l1"))
    set_composition(model, "sum")
    model.train()
    model(**batch()).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".reft_phi.")[1].split(".")[0] for n in grads} == {"a", "b"}
    assert all(g is not None and g.abs().max() > 0 for g in grads.values())


# --- as one -------------------------------------------------------------------------------------


def assert_is_the_weighted_sum(
    model: PeftModel, names: list[str], weights: list[float], combined: str
) -> None:
    """The combined adapter alone computes what the others do together, with their weights."""
    model.base_model.set_adapter(names)
    set_composition(model, "sum")
    for name, weight in zip(names, weights, strict=True):
        set_strength(model, weight, name)
    expected = logits(model)
    model.set_adapter(combined)
    got = logits(model)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-4)
    with model.disable_adapter():
        assert not torch.allclose(got, logits(model), atol=1e-2)


@pytest.mark.parametrize(("one", "other"), list(combinations_with_replacement(AFFINE, 2)))
def test_cat_is_exact(one: str, other: str) -> None:
    model = adapted(config(one), config(other, r=3))
    model.add_weighted_adapter(["a", "b"], [0.7, -1.5], "both")
    assert model.peft_config["both"].method == "loreft"
    assert model.peft_config["both"].r == 7
    assert_is_the_weighted_sum(model, ["a", "b"], [0.7, -1.5], "both")


@pytest.mark.parametrize("tied", ["all", "sides", "none"])
def test_cat_of_three_that_edit_different_layers(tied: str) -> None:
    model = adapted(
        config(tied=tied, layers=[0]), config("noreft", tied=tied), config(tied=tied, layers=[1])
    )
    model.add_weighted_adapter(["a", "b", "c"], [1.0, 0.5, 2.0], "sum", combination_type="cat")
    assert model.peft_config["sum"].layers == "all"
    assert_is_the_weighted_sum(model, ["a", "b", "c"], [1.0, 0.5, 2.0], "sum")


@pytest.mark.parametrize("methods", [("direft", "direft"), ("direft", "direft_orthonormal")])
def test_cat_of_direfts_with_an_activation(methods: tuple[str, str]) -> None:
    model = adapted(
        config(methods[0], act_fn="relu", layers=[0]), config(methods[1], act_fn="relu")
    )
    model.add_weighted_adapter(["a", "b"], [0.7, -1.5], "both")
    assert (model.peft_config["both"].method, model.peft_config["both"].act_fn) == (
        "direft",
        "relu",
    )
    assert_is_the_weighted_sum(model, ["a", "b"], [0.7, -1.5], "both")


def test_adapters_with_the_same_subspace_are_one_of_half_the_rank() -> None:
    """svd finds that the sum has rank 4, though the ranks add up to 8."""
    model = adapted(config(), config())
    share_R(model)
    model.add_weighted_adapter(["a", "b"], [0.4, 0.6], "both", "svd", svd_rank=4)
    assert model.peft_config["both"].r == 4
    assert_is_the_weighted_sum(model, ["a", "b"], [0.4, 0.6], "both")


def test_svd_is_the_nearest_of_its_rank() -> None:
    """By the singular values of the map (h, 1) -> edit."""
    model = adapted(config(positions="all"), config("direft", positions="all"))
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "best", "svd", svd_rank=3)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "exact", "cat")
    points = torch.cat([torch.zeros(1, 32), torch.eye(32)])

    def affine(name: str) -> Tensor:
        with torch.no_grad():
            values = apart(model, 0, points, name)
        return torch.cat([values[1:] - values[:1], values[:1]])  # (d + 1, d)

    exact, best = affine("exact"), affine("best")
    s = torch.linalg.svdvals(exact)
    assert torch.linalg.matrix_rank(best) == 3
    torch.testing.assert_close((exact - best).square().sum(), s[3:].square().sum())
    torch.testing.assert_close(exact, affine("a") + affine("b"), rtol=1e-4, atol=1e-4)


def share_R(model: PeftModel) -> None:
    with torch.no_grad():
        for layer in reft_layers(model).values():
            for name in list(layer.configs)[1:]:
                layer.phi(name).get_parameter("R").copy_(layer.phi("a").get_parameter("R"))
    logits(model)


@pytest.mark.parametrize("method", sorted(IN_ONE_R))
def test_linear_in_one_R_keeps_method_and_rank(method: str) -> None:
    model = adapted(config(method), config(method))
    share_R(model)
    model.add_weighted_adapter(["a", "b"], [0.7, -1.5], "both", combination_type="linear")
    assert (model.peft_config["both"].method, model.peft_config["both"].r) == (method, 4)
    assert_is_the_weighted_sum(model, ["a", "b"], [0.7, -1.5], "both")


def test_linear_of_consreft_needs_weights_that_add_up_to_one() -> None:
    model = adapted(config("consreft"), config("consreft"))
    share_R(model)
    with pytest.raises(ReftConfigError, match="must add up to 1.*They add up to .1.5."):
        model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "both", combination_type="linear")
    model.add_weighted_adapter(["a", "b"], [0.3, 0.7], "both", combination_type="linear")
    assert_is_the_weighted_sum(model, ["a", "b"], [0.3, 0.7], "both")


def test_linear_of_red_always_holds() -> None:
    model = adapted(config("red", layers=[0]), config("red"))
    model.add_weighted_adapter(["a", "b"], [0.7, -1.5], "both", combination_type="linear")
    assert_is_the_weighted_sum(model, ["a", "b"], [0.7, -1.5], "both")


def test_one_adapter_with_a_weight_is_it_at_that_strength() -> None:
    model = adapted(config())
    model.add_weighted_adapter(["a"], [0.5], "scaled", combination_type="linear")
    assert_is_the_weighted_sum(model, ["a"], [0.5], "scaled")


def test_a_combined_adapter_is_frozen_saved_and_loaded(tmp_path: Any) -> None:
    model = adapted(config(), config("direft"))
    before = logits(model)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "both")
    assert torch.equal(logits(model), before)  # it is not active
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".both." in n)
    model.set_adapter("both")
    expected = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "both")
    assert torch.equal(logits(loaded), expected)
    R = next(iter(reft_layers(loaded).values())).phi("default").get_parameter("R")
    torch.testing.assert_close(R @ R.mT, torch.eye(8)[None], rtol=0.0, atol=1e-5)


@pytest.mark.parametrize(
    ("configs", "arguments", "message"),
    [
        (("red", "red"), {}, "edit is not R.T .A h . c.*REDs combine by .*linear"),
        (("loreft", "reft_r1"), {}, "'b' is a reft_r1.*set_composition"),
        (("reft_r1", "reft_r1"), {"combination_type": "linear"}, "not linear.*set_composition"),
        (("loreft", "loreft"), {"combination_type": "linear"}, "same R.*'cat' is exact"),
        (("loreft", "noreft"), {"combination_type": "linear"}, "of one method.*'cat' combines"),
        (("loreft", "loreft"), {"combination_type": "ties"}, "accepted are cat, svd, linear"),
        (("loreft", "loreft"), {"svd_rank": 4}, "svd_rank is for combination_type='svd'"),
        (("loreft", "loreft"), {"combination_type": "svd", "svd_rank": 9}, "accepted is 1 to .* 8"),
        (("loreft", "loreft"), {"weights": [1.0]}, "a weight for each"),
        (("loreft", "loreft"), {"adapters": ["a", "aa"]}, "no ReFT adapter 'aa'.*Did you mean 'a'"),
        (("loreft", "loreft"), {"adapter_name": "b"}, "adapter 'b' already"),
    ],
)
def test_what_cannot_be_one_is_said(
    configs: tuple[str, str], arguments: dict[str, Any], message: str
) -> None:
    model = adapted(*map(config, configs))
    before, keys = logits(model), set(model.state_dict())
    given = {"adapters": ["a", "b"], "weights": [1.0, 1.0], "adapter_name": "c"} | arguments
    with pytest.raises(ReftConfigError, match=message):
        model.add_weighted_adapter(**given)
    assert sorted(model.peft_config) == ["a", "b"]
    assert set(model.state_dict()) == keys
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"positions": "l1"}, "differ in positions .'f1.l2' and 'l1'.*set_composition"),
        ({"tied": "sides"}, "differ in tied"),
        ({"act_fn": "relu"}, "With an activation"),
        ({"r": 30}, "rank of 34 is more than the width .* 32.*svd_rank"),
    ],
)
def test_adapters_that_differ_too_much_are_not_one(settings: dict[str, Any], message: str) -> None:
    model = adapted(config(), config(**settings))
    with pytest.raises(ReftConfigError, match=message):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "both")


def test_every_method_is_decided() -> None:
    """A new method must say how it combines: `cat` either is exact or refuses it."""
    for method in METHODS:
        model = adapted(config(method), config(method))
        if method in AFFINE:
            model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "both")
        else:
            with pytest.raises(ReftConfigError, match="set_composition"):
                model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "both")


# --- subspaces shared by tasks ------------------------------------------------------------------

SHARED = {"subspaces": {"one": [0, 1], "two": [2, 3]}}


def test_two_tasks_in_one_R_train_only_their_rows_and_add_up() -> None:
    """Each example's gradient of W and b is in its own rows; both on is the sum of the two."""
    model = adapted(config(**SHARED, positions="all", layers=[0]))
    model.train()
    with options(subspaces=["one"]):
        model(**batch()).loss.backward()
    (phi,) = phis(model)
    for name in ("W", "bias"):
        grad = phi.get_parameter(name).grad
        assert grad is not None
        assert grad[:, :2].abs().min() > 0
        assert grad[:, 2:].abs().max() == 0
    model.eval()
    _, h = first_states(model)
    edits = {}
    for chosen in (["one"], ["two"], ["one", "two"]):
        with options(subspaces=chosen):
            edits["+".join(chosen)] = first_states(model)[0] - h
    torch.testing.assert_close(edits["one+two"], edits["one"] + edits["two"])
    R = phi.get_parameter("R")[0]
    # what a task writes lies in its rows, and nothing of it in the other's
    torch.testing.assert_close(edits["one"] @ R[:2].T @ R[:2], edits["one"], atol=1e-4, rtol=1e-4)
    assert (edits["one"] @ R[2:].T).abs().max() < 1e-4


def test_a_combination_in_one_R_keeps_the_named_subspaces() -> None:
    model = adapted(config(**SHARED), config(**SHARED))
    share_R(model)
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "both", combination_type="linear")
    assert model.peft_config["both"].subspaces == SHARED["subspaces"]
    model.set_adapter("both")
    with options(subspaces=["one"]):
        got = logits(model)
    model.base_model.set_adapter(["a", "b"])
    set_composition(model, "sum")
    set_strength(model, 0.5, "a")
    set_strength(model, 0.5, "b")
    with options(subspaces=["one"]):
        torch.testing.assert_close(got, logits(model), rtol=1e-4, atol=2e-4)
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "cat")
    assert model.peft_config["cat"].subspaces is None  # its rows are others
