"""The prefix cache: shared where it may be, and no stale block to be had."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving_tiny import expected, prompts, save_adapter
from test_engine_exact import requests, run, tokens_of

Start = Callable[..., Any]
BLOCK = 32


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    configs: dict[str, dict[str, Any]] = {
        "last": {"positions": "l3"},
        "other": {"positions": "l3"},
        "first": {"positions": "f3"},
        "both": {"positions": "f3+l3", "tied": "sides"},
        "all": {"positions": "all"},
    }
    return {
        name: save_adapter(folder / name, i, scale=6.0, **config)
        for i, (name, config) in enumerate(configs.items())
    }


class Client:
    """Asks for one completion at a time, and knows what is right."""

    def __init__(self, llm: Any, adapters: dict[str, Path]) -> None:
        self.llm, self.adapters = llm, adapters

    def ask(self, prompt: list[int], name: str | None) -> int:
        """Return how many tokens came from the cache."""
        (output,) = run(self.llm, [prompt], requests(self.adapters, [name]))
        assert tokens_of([output]) == expected(self.adapters, [prompt], [name]), name
        return int(output.num_cached_tokens)


@pytest.fixture
def client(start: Start, adapters: dict[str, Path]) -> Client:
    return Client(start(), adapters)


def test_blocks_before_the_first_edit_are_shared_with_all(client: Client) -> None:
    (prompt,) = prompts(200)
    assert client.ask(prompt, None) == 0
    assert client.ask(prompt, None) == 192
    for name in ("last", "other"):
        assert client.ask(prompt, name) == 192  # of 200 tokens the last 3 are edited
        assert client.ask(prompt, name) == 192
    assert client.ask(prompt, "first") == 0
    assert client.ask(prompt, "first") == 192
    assert client.ask(prompt, "both") == 0
    assert client.ask(prompt, None) == 192


def test_an_extended_prompt_gets_no_block_that_was_edited_at_its_end(client: Client) -> None:
    """What every turn of a chat does: a cached prompt, then its answer, then more."""
    (long,) = prompts(240, seed=1)
    for name in ("last", "both", "all", None):
        for n in (BLOCK * 3, BLOCK * 3 + 1, BLOCK * 4 + 2, BLOCK * 5, 240):
            cached = client.ask(long[:n], name)
            assert cached <= n
    assert client.ask(long, "last") == 224
    assert client.ask(long[: BLOCK * 5], "last") == BLOCK * 4  # one token has to be computed


def test_a_turn_with_what_was_generated(client: Client) -> None:
    """Generated tokens were not edited, and as a part of the next prompt they are (`all`)."""
    (prompt,) = prompts(40, seed=2)
    for name in ("all", "last", "both"):
        (output,) = run(
            client.llm, [prompt], requests(client.adapters, [name]), ignore_eos=True, tokens=60
        )
        (more,) = prompts(20, seed=3)
        client.ask([*prompt, *output.outputs[0].token_ids, *more], name)


def test_short_prompts_whose_positions_shrink(client: Client) -> None:
    (prompt,) = prompts(20, seed=4)
    for name in ("both", "first"):
        for n in (20, 5, 4, 3, 2, 1, 20):
            client.ask(prompt[:n], name)


def test_a_replaced_adapter_of_the_same_name_and_path(client: Client, tmp_path: Path) -> None:
    path = save_adapter(tmp_path / "one", 7, positions="f3", scale=6.0)
    client.adapters = {"one": path}
    (prompt,) = prompts(140, seed=5)
    client.ask(prompt, "one")
    assert client.ask(prompt, "one") == 128
    (before,) = expected(client.adapters, [prompt], ["one"])
    save_adapter(path, 8, positions="f3", scale=6.0)
    assert client.ask(prompt, "one") == 0
    (after,) = expected(client.adapters, [prompt], ["one"])
    assert before != after


def test_one_content_under_two_names_shares(client: Client, tmp_path: Path) -> None:
    a, b = (save_adapter(tmp_path / name, 9, positions="f3") for name in "ab")
    client.adapters = {"a": a, "b": b}
    (prompt,) = prompts(140, seed=6)
    assert client.ask(prompt, "a") == 0
    assert client.ask(prompt, "b") == 128


def test_all_at_once(client: Client) -> None:
    """Prompts that share beginnings, in one batch, twice."""
    (long,) = prompts(180, seed=7)
    inputs = [long[:n] for n in (180, 128, 129, 96, 180, 180, 128, 66)]
    names = ["last", "last", "both", "all", None, "first", None, "other"]
    wanted = expected(client.adapters, inputs, names)
    for _ in range(2):
        lora = requests(client.adapters, names)
        assert tokens_of(run(client.llm, inputs, lora)) == wanted
