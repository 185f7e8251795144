"""A batch in which each example has an adapter of its own equals each example alone."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from reftune import (
    METHODS,
    PositionError,
    ReftConfig,
    ReftConfigError,
    options,
    set_strength,
    set_subspaces,
)
from tiny import tiny_llama

# PEFT 0.21 asks a model for a property that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

BASE = "__base__"
RANKED = [name for name, cls in METHODS.items() if cls.has_rank and cls.fixed_rank is None]
LENGTHS = [9, 5, 7, 2, 8, 1, 6, 9, 4, 3]


def adapted(configs: dict[str, dict[str, Any]]) -> PeftModel:
    """Return a model with these adapters, all of them far from the identity."""
    torch.manual_seed(0)
    built = {name: ReftConfig(task_type="CAUSAL_LM", **c) for name, c in configs.items()}
    names = list(built)
    model = get_peft_model(tiny_llama(), built[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, built[name])
    for key, p in model.named_parameters():
        if ".reft_phi." in key and key.endswith((".scale", ".bias")):
            nn.init.normal_(p)
    return model.eval()


def varied(method: str) -> dict[str, dict[str, Any]]:
    """Return adapters of a method that differ in all that may differ."""
    cls = METHODS[method]
    adapters: dict[str, dict[str, Any]] = {
        "plain": {"positions": "f2+l3"},
        "wide": {"positions": "f5+l4"},
        "sides": {"positions": "f3+l1", "tied": "sides"},
        "suffix": {"positions": "l4"},
        "prefix": {"positions": "f1"},
        "pyreft": {"positions": "f2+l2", "short_prompts": "pyreft", "tied": "sides"},
        "everything": {"positions": "all"},
        "steering": {"positions": "f1+l2", "edit_generated": True, "tied": "sides"},
        "steered": {"positions": "all", "edit_generated": True},
        "upper": {"positions": "f2+l3", "layers": [1]},
        "bf16": {"positions": "l2", "dtype": "bfloat16"},
    }
    if cls.pools_tokens:
        adapters["few"] = {"positions": "f2+l3", "topk": 2}
    else:
        adapters["each"] = {"positions": "f2+l3", "tied": "none"}
        adapters["each suffix"] = {"positions": "l2", "tied": "none"}
    if cls.has_activation:
        adapters["active"] = {"positions": "f2+l3", "act_fn": "gelu"}
    for number, (name, settings) in enumerate(adapters.items()):
        settings["method"] = method
        if method in RANKED:
            settings["r"] = 2 + number % 4
            settings["subspaces"] = {"x": [0], "y": [1]} if name != "plain" else {"x": [1]}
    return adapters


def batch(names: Sequence[str], side: str) -> tuple[Tensor, Tensor]:
    """Return padded prompts, one for each name, and their attention mask."""
    lengths = torch.tensor([LENGTHS[i % len(LENGTHS)] for i in range(len(names))])[:, None]
    column, width = torch.arange(max(LENGTHS)), max(LENGTHS)
    mask = column >= width - lengths if side == "left" else column < lengths
    ids = torch.randint(3, 259, mask.shape, generator=torch.Generator().manual_seed(1))
    return torch.where(mask, ids, 0), mask.long()


@torch.no_grad()
def alone(model: PeftModel, name: str, ids: Tensor, **inputs: Any) -> Tensor:
    """Return the logits with one adapter, which is active as usual."""
    if name == BASE:
        with model.disable_adapter():
            return model(input_ids=ids, **inputs).logits
    model.set_adapter(name)
    return model(input_ids=ids, **inputs).logits


def check(model: PeftModel, names: list[str], side: str = "left") -> None:
    ids, mask = batch(names, side)
    with torch.no_grad():
        mixed = model(input_ids=ids, attention_mask=mask, adapter_names=names).logits
    for i, name in enumerate(names):
        on = mask[i].bool()
        expected = alone(model, name, ids[i : i + 1, on])[0]
        loose = {"atol": 0.1, "rtol": 0.1} if name.endswith("bf16") else {"atol": 1e-3, "rtol": 0}
        torch.testing.assert_close(
            mixed[i, on], expected, msg=lambda m, n=name: f"{n}: {m}", **loose
        )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", METHODS)
def test_one_method(method: str, side: str) -> None:
    adapters = varied(method)
    names = [*adapters, BASE, *list(adapters)[:3], BASE]
    check(adapted(adapters), names, side)
    check(adapted(adapters), names[::-1], side)


def test_all_methods_in_one_batch() -> None:
    adapters = {
        f"{method} {name}": settings
        for method in METHODS
        for name, settings in varied(method).items()
        if name in ("plain", "sides", "everything", "each", "active", "bf16")
    }
    check(adapted(adapters), [*adapters, BASE])


@pytest.mark.parametrize("method", METHODS)
def test_generation(method: str) -> None:
    adapters = {k: v for k, v in varied(method).items() if k != "bf16"}
    model = adapted(adapters)
    names = [BASE, *adapters]
    ids, mask = batch(names, "left")
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    mixed = model.generate(input_ids=ids, attention_mask=mask, adapter_names=names, **settings)
    for i, name in enumerate(names):
        row, on = ids[i : i + 1, mask[i].bool()], slice(ids.shape[1], None)
        if name == BASE:
            with model.disable_adapter():
                expected = model.generate(input_ids=row, **settings)
        else:
            model.set_adapter(name)
            expected = model.generate(input_ids=row, **settings)
        assert mixed[i, on].tolist() == expected[0, row.shape[1] :].tolist(), name


@pytest.mark.parametrize("method", ["loreft", "lobireft", "red", "reft_r1"])
def test_strengths(method: str) -> None:
    adapters = varied(method)
    model = adapted(adapters)
    for number, name in enumerate(adapters):
        set_strength(model, [0.0, 0.5, 1.0, -1.0][number % 4], name)
    names = [*adapters, BASE]
    check(model, names)
    with options(strength=0.25):
        check(model, names)


@pytest.mark.parametrize("method", RANKED)
def test_subspaces(method: str) -> None:
    adapters = varied(method)
    model = adapted(adapters)
    names = [*adapters, BASE]
    for name, chosen in zip(adapters, (["x"], ["y"], None, ["x", "y"], []), strict=False):
        set_subspaces(model, chosen if name != "plain" else ["x"], name)
    check(model, names)
    with options(subspaces=["x"]):
        check(model, names)

    ids, mask = batch(names, "left")
    each = [["x"] if i % 2 else [] for i in range(len(names))]
    with options(subspaces=each), torch.no_grad():
        mixed = model(input_ids=ids, attention_mask=mask, adapter_names=names).logits
    for i, name in enumerate(names):
        if name == "bf16":
            continue
        with options(subspaces=each[i : i + 1]):
            expected = alone(model, name, ids[i : i + 1, mask[i].bool()])[0]
        torch.testing.assert_close(mixed[i, mask[i].bool()], expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_the_base_are_its_own_bit_for_bit(method: str) -> None:
    adapters = varied(method)
    model = adapted(adapters)
    names = [BASE, *adapters, BASE]
    ids, mask = batch(names, "left")
    with torch.no_grad():
        mixed = model(input_ids=ids, attention_mask=mask, adapter_names=names).logits
    base = alone(model, BASE, ids, attention_mask=mask)
    assert torch.equal(mixed[[0, -1]], base[[0, -1]])
    assert not torch.equal(mixed[1], base[1])


@pytest.mark.parametrize("positions", ["f2+l1", "all"])
@pytest.mark.parametrize("tied", ["all", "sides"])
def test_packed_rows(tied: str, positions: str) -> None:
    """Two sequences packed into each row, an adapter for each row."""
    model = adapted(
        {n: {"positions": positions, "tied": tied, "r": r} for n, r in (("a", 2), ("b", 3))}
    )
    names, ids = ["a", BASE, "b"], torch.arange(3, 30).view(3, 9)
    position_ids = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3]).expand(3, 9)
    with torch.no_grad():
        mixed = model(
            input_ids=ids, position_ids=position_ids, use_cache=False, adapter_names=names
        ).logits
    for i, name in enumerate(names):
        parts = [alone(model, name, ids[i : i + 1, a:b])[0] for a, b in ((0, 5), (5, 9))]
        torch.testing.assert_close(mixed[i], torch.cat(parts), atol=1e-3, rtol=0)


def test_packed_rows_have_no_examples_to_pool_over() -> None:
    model = adapted({"a": {"method": "reft_r1"}})
    ids = torch.arange(3, 12).view(1, 9)
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    with pytest.raises(PositionError, match="packed"):
        model(input_ids=ids, position_ids=position_ids, adapter_names=["a"])


class Products(TorchDispatchMode):
    """Count matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "baddbmm", "matmul", "linear", "einsum"):
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tied", ["all", "sides", "none"])
@pytest.mark.parametrize("method", METHODS)
def test_products_do_not_grow_with_adapters(method: str, tied: str) -> None:
    if METHODS[method].pools_tokens and tied == "none":
        tied = "all"
    adapters = {f"a{i}": {"method": method, "tied": tied, "positions": "f2+l3"} for i in range(8)}
    model = adapted(adapters)
    ids, mask = batch(list(adapters), "left")
    counts = []
    for n in (1, 2, 8):
        names = [f"a{i % n}" for i in range(8)]
        with Products() as products, torch.no_grad():
            model(input_ids=ids, attention_mask=mask, adapter_names=names)
        counts.append(products.count)
    assert counts[0] == counts[1] == counts[2]


def test_what_does_not_fit_is_an_error() -> None:
    model = adapted({"german": {}})
    ids, mask = batch(["a"] * 4, "left")
    with pytest.raises(ReftConfigError, match="Did you mean 'german'"):
        model(input_ids=ids, attention_mask=mask, adapter_names=["germn"] * 4)
    with pytest.raises(ReftConfigError, match=r"3 .*4"):
        model(input_ids=ids, attention_mask=mask, adapter_names=["german"] * 3)
    model.train()
    with pytest.raises(ReftConfigError, match=r"model.eval\(\)"):
        model(input_ids=ids, attention_mask=mask, adapter_names=["german"] * 4)
