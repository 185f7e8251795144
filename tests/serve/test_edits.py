"""What a request edits, against the positions of the tuner; and when two blocks may be one."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from reftune import ReftConfig
from reftune.errors import ReftConfigError
from reftune.positions import Positions, assign_slots
from reftune.serve.adapter import Adapter
from reftune.serve.edits import Edits

POSITIONS = ("f3", "l1", "l4", "f3+l2", "f7+l7", "all")


def edits(options: dict[str, Any] | None = None, digest: str = "x", **config: Any) -> Edits:
    return Edits.of(Adapter(digest, Path("/"), ReftConfig(**config), (0,)), options)


def slots(e: Edits, n: int, start: int, end: int) -> dict[int, int]:
    return {
        token: run.slot + (token - run.start) * run.step
        for run in e.runs(n, start, end)
        for token in range(run.start, run.end)
    }


@pytest.mark.parametrize("rule", ["paper", "pyreft"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_runs_are_the_tuners_slots(positions: str, rule: str) -> None:
    """Of prompts of every length, whole and in every chunk, tokens have the tuner's slots."""
    parsed = Positions.parse(positions)
    e = edits(positions=positions, short_prompts=rule)
    for n in range(1, 20):
        prompt = torch.ones(1, n, dtype=torch.bool)
        if parsed.everything:
            oracle = dict.fromkeys(range(n), 0)
        else:
            found = assign_slots(
                prompt,
                parsed.prefix,
                parsed.suffix,
                suffix_start=parsed.prefix,
                empty=-1,
                rule=rule,
            )[0].tolist()
            oracle = {i: slot for i, slot in enumerate(found) if slot >= 0}
        assert slots(e, n, 0, n + 9) == oracle
        for start, end in itertools.combinations(range(n + 3), 2):
            inside = {i: slot for i, slot in oracle.items() if start <= i < end}
            assert slots(e, n, start, end) == inside


def test_generated_tokens_have_the_last_slot_where_they_are_edited() -> None:
    e = edits(positions="f2+l2", tied="none", edit_generated=True)
    assert slots(e, 6, 0, 9) == {0: 0, 1: 1, 4: 2, 5: 3, 6: 3, 7: 3, 8: 3}
    assert slots(edits(positions="f2+l2"), 6, 6, 9) == {}


def keys(e: Edits, n: int, total: int, block: int = 4) -> list[object]:
    return [e.block_key(n, i, i + block) for i in range(0, total - block + 1, block)]


def test_blocks_before_the_first_edit_are_the_bases() -> None:
    assert keys(edits(positions="l2"), n=13, total=16)[:2] == [None, None]
    assert None not in keys(edits(positions="f1"), n=13, total=16)[:1]
    assert keys(edits({"strength": 0}, positions="all"), n=13, total=16) == [None] * 4


@pytest.mark.parametrize(
    ("positions", "tied"),
    [("all", "all"), *itertools.product(POSITIONS[:-1], ("all", "sides", "none"))],
)
def test_two_blocks_have_one_key_only_if_they_are_edited_alike(positions: str, tied: str) -> None:
    """Chained up to any block: equal keys mean equal edits, token by token and Phi by Phi."""
    one = edits(positions=positions, tied=tied)
    for n, m in itertools.combinations(range(1, 18), 2):
        for end in range(4, 20, 4):
            alike = {t: one.group(s) for t, s in slots(one, n, 0, end).items()} == {
                t: one.group(s) for t, s in slots(one, m, 0, end).items()
            }
            chains = keys(one, n, end), keys(one, m, end)
            assert (chains[0] == chains[1]) == alike, (n, m, end)


def test_a_key_follows_content_strength_and_subspaces() -> None:
    subspaces = {"a": [0], "b": [1]}
    config: dict[str, Any] = {"positions": "all", "r": 2, "subspaces": subspaces}
    several = [
        edits(**config),
        edits(**config, digest="y"),
        edits({"strength": 0.5}, **config),
        edits({"subspaces": ["a"]}, **config),
        edits({"subspaces": ["b"]}, **config),
        edits({"subspaces": []}, **config),
    ]
    found = {e.block_key(8, 0, 4) for e in several}
    assert len(found) == len(several)


def test_a_record_survives_the_way_to_other_processes() -> None:
    e = edits({"strength": -0.5, "subspaces": ["a"]}, r=2, subspaces={"a": [1]})
    as_sent = {**e.write(), "rows": list(e.write()["rows"])}  # msgpack makes lists of tuples
    assert Edits.read({"reftune": as_sent, "other": 1}) == e
    assert Edits.read({"other": 1}) is None
    assert Edits.read(None) is None


@pytest.mark.parametrize("given", ["x", 1, ["rows"], {"rows": None}, {}, None])
def test_what_a_client_sends_to_an_engine_without_reftune_is_no_record(given: object) -> None:
    assert Edits.read({"reftune": given}) is None


@pytest.mark.parametrize(
    "options",
    [
        {"strength": "much"},
        {"strength": float("nan")},
        {"strength": True},
        {"subspaces": "a"},
        {"subspaces": ["unknown"]},
        {"subspaces": [1]},
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ReftConfigError):
        edits(options, r=2, subspaces={"a": [1]})
