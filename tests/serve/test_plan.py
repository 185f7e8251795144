"""The batched product of a step against the tuner's layer, one request at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from serving_tiny import save_adapter, with_adapters
from torch import Tensor

import reftune
from reftune.layer import ReftLayer
from reftune.serve.adapter import ModelShape
from reftune.serve.attach import State
from reftune.serve.bank import Bank
from reftune.serve.edits import Edits
from reftune.serve.plan import Chunk, Plan
from reftune.serve.store import Store

# PEFT asks transformers for what it renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

SHAPE = ModelShape(64, 3)
WIDTH = 64


class Served:
    """Adapters in a store, and the tuner with the same ones."""

    def __init__(self, folder: Path, configs: dict[str, dict[str, Any]]) -> None:
        paths = {
            name: save_adapter(folder / name, seed, **config)
            for seed, (name, config) in enumerate(configs.items())
        }
        self.store = Store(SHAPE)
        self.bank = Bank(WIDTH, torch.device("cpu"), limit=1e9, host_limit=0)
        self.adapters = {name: self.store.get(path) for name, path in paths.items()}
        model: Any = with_adapters(paths).model
        self.layers = {
            int(name.split(".")[-2]): layer for name, layer in reftune.reft_layers(model).items()
        }
        assert all(isinstance(layer, ReftLayer) for layer in self.layers.values())

    def edits(self, name: str, **options: Any) -> Edits:
        return Edits.of(self.adapters[name], options)

    def oracle(self, name: str, layer: int, prompt: Tensor, **options: Any) -> Tensor:
        """Return a whole prompt's states (n, d) as the tuner edits them."""
        if name not in self.layers[layer].configs:
            return prompt
        with reftune.options(adapter_names=(name,), **options), torch.no_grad():
            edited: Tensor = self.layers[layer](prompt[None])[0]
        return edited

    def check(self, requests: list[tuple[str, int, int, int, dict[str, Any]]]) -> Plan:
        """Compare a step of chunks (name, prompt length, computed, length, options)."""
        generator = torch.Generator().manual_seed(0)
        prompts = [torch.randn(n, WIDTH, generator=generator) for _, n, *_ in requests]
        chunks, row = [], 3  # rows of others come before and after
        for name, n, computed, length, options in requests:
            if name:
                chunks.append(Chunk(self.edits(name, **options), n, computed, row, length))
            row += length
        plan = Plan(chunks, self.bank)
        for layer in range(SHAPE.num_layers):
            hidden = torch.randn(row + 2, WIDTH, generator=generator)
            residual = torch.randn(row + 2, WIDTH, generator=generator)
            wanted, at = hidden.clone(), 3
            for (name, _, computed, length, options), prompt in zip(requests, prompts, strict=True):
                part = slice(computed, computed + length)
                hidden[at : at + length] = prompt[part] - residual[at : at + length]
                edited = self.oracle(name, layer, prompt, **options) if name else prompt
                wanted[at : at + length] = (
                    edited[part] - residual[at : at + length] if name else hidden[at : at + length]
                )
                at += length
            before = hidden.clone()
            plan.apply(layer, hidden, residual)
            torch.testing.assert_close(hidden, wanted, atol=1e-4, rtol=1e-4)
            kept = [i for i in range(row + 2) if i not in _edited(plan)]
            assert torch.equal(hidden[kept], before[kept])
        return plan


def _edited(plan: Plan) -> set[int]:
    return {int(i) for entry in plan.entries for i in entry.rows}


@pytest.mark.parametrize("method", sorted(reftune.METHODS))
def test_every_method_is_the_tuners(method: str, tmp_path: Path) -> None:
    """Ranks that differ, two sets of layers, prompts long and short, base requests between."""
    ranks = {"red": (None, None), "reft_r1": (None, None)}.get(method, (3, 4))
    served = Served(
        tmp_path,
        {
            "one": {"method": method, "r": ranks[0], "positions": "f3+l2"},
            "two": {"method": method, "r": ranks[1], "positions": "l1", "layers": [1]},
            "three": {"method": method, "r": ranks[1], "positions": "all", "layers": [0, 2]},
        },
    )
    whole = [("one", 9), ("", 4), ("two", 5), ("one", 3), ("three", 11), ("two", 1), ("one", 40)]
    served.check([(name, n, 0, n, {}) for name, n in whole])


@pytest.mark.parametrize("tied", ["all", "sides", "none"])
@pytest.mark.parametrize("length", [1, 3, 8])
def test_chunks_make_the_whole(tied: str, length: int, tmp_path: Path) -> None:
    served = Served(tmp_path, {"one": {"positions": "f3+l4", "tied": tied}})
    for computed in range(0, 16, length):
        part = min(length, 16 - computed)
        served.check([("one", 16, computed, part, {}), ("", 5, 0, 5, {})])


def test_strength_and_subspaces_are_each_requests_own(tmp_path: Path) -> None:
    subspaces = {"a": [0, 1], "b": [3]}
    served = Served(tmp_path, {"one": {"positions": "f2+l2", "subspaces": subspaces}})
    options: list[dict[str, Any]] = [
        {},
        {"strength": 0.5},
        {"strength": -1.0},
        {"subspaces": ["a"]},
        {"subspaces": ["b"], "strength": 2.0},
        {"strength": 0.0},
    ]
    served.check([("one", 9, 0, 9, given) for given in options])


def test_many_adapters_are_one_product_in_each_layer(tmp_path: Path) -> None:
    """Whatever their number, and however long some prompts are."""
    served = Served(tmp_path, {str(i): {"positions": "f7+l7"} for i in range(6)})
    served.adapters["long"] = served.adapters["0"]
    requests = [(str(i), 20 + i, 0, 20 + i, {}) for i in range(6)]
    plan = served.check([*requests, ("0", 200, 0, 200, {}), ("5", 300, 7, 250, {})])
    hidden = torch.zeros(1000, WIDTH)
    assert [plan.apply(layer, hidden, None) for layer in range(3)] == [1, 1, 1]


def test_without_prompt_tokens_nothing_is_done(tmp_path: Path) -> None:
    served = Served(tmp_path, {"one": {"positions": "f7+l7"}})
    state = State(served.bank)
    e = served.edits("one")
    assert not state.begin([])
    assert not state.begin([Chunk(e, 20, 20, 0, 1)])  # decoding
    assert not state.begin([Chunk(e, 20, 7, 0, 6)])  # a chunk between prefix and suffix
    assert state.counts.busy_steps == state.counts.rows == len(served.bank) == 0
    assert state.begin([Chunk(e, 20, 7, 0, 7)])
    assert (state.counts.steps, state.counts.rows) == (4, 1)


def test_generated_tokens_of_a_recomputation_are_not_prompt(tmp_path: Path) -> None:
    """After a preemption the chunk goes past the prompt; those tokens are edited if asked for."""
    served = Served(
        tmp_path,
        {
            "not": {"positions": "l2"},
            "too": {"positions": "l2", "edit_generated": True, "tied": "none"},
        },
    )
    plan = Plan([Chunk(served.edits("not"), 5, 0, 0, 9)], served.bank)
    assert _edited(plan) == {3, 4}
    plan = Plan([Chunk(served.edits("too"), 5, 0, 0, 9)], served.bank)
    assert _edited(plan) == set(range(3, 9))
    assert {e.group: e.rows.tolist() for e in plan.entries} == {0: [3], 1: [4, 5, 6, 7, 8]}


def test_the_bank_keeps_to_its_limit(tmp_path: Path) -> None:
    """The least recently used go; pinned ones and those of the running step stay."""
    served = Served(tmp_path, {str(i): {} for i in range(4)})
    each = served.bank.get(served.edits("0")).nbytes
    bank = Bank(WIDTH, torch.device("cpu"), limit=2.5 * each, host_limit=0)

    def step(*names: str, pinned: bool = False) -> None:
        for name in names:
            e = served.edits(name)
            bank.get(Edits(**{**e.write(), "pinned": pinned}))
        bank.trim()

    step("0", pinned=True)
    step("1")
    step("2")
    assert (len(bank), bank.loads, bank.evictions) == (2, 3, 1)
    step("0", pinned=True)
    step("2")
    assert bank.loads == 3  # both were here
    step("1", "2", "3")  # more than the limit, for this step
    assert bank.loads == 5
    assert bank.nbytes <= 2.5 * each
    step("0", pinned=True)
    assert bank.loads == 5


def test_a_pinned_adapter_that_is_replaced_leaves_no_trace(tmp_path: Path) -> None:
    served = Served(tmp_path, {str(i): {} for i in range(6)})
    each = served.bank.get(served.edits("0")).nbytes
    bank = Bank(WIDTH, torch.device("cpu"), limit=1.5 * each, host_limit=0)
    for version in "012345":
        bank.get(Edits(**{**served.edits(version).write(), "pinned": True, "name": "one"}))
        bank.trim()
        assert len(bank) == 1


def test_host_memory_is_asked_before_the_disk(tmp_path: Path) -> None:
    """Beside an accelerator (here one that computes nothing) what is evicted stays there."""
    served = Served(tmp_path, {str(i): {} for i in range(4)})
    each = served.bank.get(served.edits("0")).nbytes
    bank = Bank(WIDTH, torch.device("meta"), limit=1.5 * each, host_limit=2.5 * each)

    def step(name: str) -> int:
        bank.get(served.edits(name))
        bank.trim()
        assert bank.nbytes <= 1.5 * each
        return bank.loads

    assert [step(name) for name in "0101"] == [1, 2, 2, 2]
    assert bank.evictions == 3
    assert [step(name) for name in "231"] == [3, 4, 5]  # 1 was the least recently used of three
