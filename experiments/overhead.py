"""What an adapter costs when text is generated: by layers, rank, positions and prompt length.

    python -m experiments.overhead [--rounds 5] [--new-tokens 32] [--quick]

It reads no data. One setting is changed at a time from rank 8, four layers, f5+l5 and a prompt of
64 tokens. The bare model and the same model with a random LoReFT take turns; ratios of their times
are taken within rounds, and their medians reported: of the whole generation, and of the prompt and
first token alone, where all of an edit's work is. The seconds that one more generation spends in
the adapter's hooks tell what ratios cannot where the machine's noise is larger than that work.

The paper (Wu et al. 2024, appendix H; LLaMA-7B on a GPU, 256 new tokens, batch 1): of 7.4 s,
adapters cost 7 to 14 ms whatever the rank, 14 to 35 ms from 2 to 10 layers, and no more for more
positions or longer prompts: less than half a percent.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from reftune import ReftConfig
from reftune.errors import ReftConfigError

from .common import (
    arguments,
    attached,
    command_line,
    depth,
    drawing,
    load,
    parser,
    quick,
    start,
)
from .records import Numbers, Record

SWEEPS: Mapping[str, tuple[int, ...]] = {
    "layers": (2, 4, 6, 8, 10),
    "rank": (1, 4, 8, 16, 32),
    "positions": (2, 4, 6, 8, 10),
    "prompt": (16, 64, 256, 512),
}


@dataclass(frozen=True)
class Setting:
    """An adapter and a prompt: how many layers, which rank, how many tokens edited, of how many."""

    layers: int = 4
    rank: int = 8
    positions: int = 10
    prompt: int = 64

    def config(self, num_layers: int) -> ReftConfig:
        """Return the adapter: layers evenly spread, half of the positions at either end."""
        count = min(self.layers, num_layers)
        layers = sorted({(2 * i + 1) * num_layers // (2 * count) for i in range(count)})
        half = self.positions // 2
        return ReftConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            layers=layers,
            positions=f"f{half}+l{self.positions - half}",
        )


def generate(model: Any, ids: Tensor, new: int) -> float:
    """Return the seconds that a model takes for `new` tokens after a prompt, (1, T)."""
    wait(ids)
    began = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=new,
            max_new_tokens=new,
            pad_token_id=0,
        )
    wait(ids)
    return time.perf_counter() - began


def wait(ids: Tensor) -> None:
    """Wait for a GPU to be done."""
    if ids.is_cuda:
        torch.cuda.synchronize()


@contextmanager
def clocked(model: Any, ids: Tensor) -> Iterator[list[float]]:
    """Time in a block what an adapter hooked into a model: seconds by call, in order."""
    taken: list[float] = []

    def timed(hook: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        wait(ids)
        began = time.perf_counter()
        try:
            return hook(*args, **kwargs)
        finally:
            wait(ids)
            taken.append(time.perf_counter() - began)

    replaced: list[tuple[dict[int, Any], int, Any]] = []
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in hooks.items():
                if hook.__module__.startswith("reftune."):
                    replaced.append((hooks, key, hook))
                    hooks[key] = partial(timed, hook)
    try:
        yield taken
    finally:
        for hooks, key, hook in replaced:
            hooks[key] = hook


def measure(model: Any, setting: Setting, args: argparse.Namespace) -> Numbers:
    """Return medians over rounds of the two models' times, the hooks', and the ratios."""
    generator = torch.Generator().manual_seed(args.seed)
    size = int(model.get_input_embeddings().weight.shape[0])
    ids = torch.randint(size, (1, setting.prompt), generator=generator).to(model.device)
    rounds: list[dict[str, float]] = []
    for number in range(args.rounds):
        taken: dict[str, float] = {}
        for arm in ("bare", "adapted") if number % 2 == 0 else ("adapted", "bare"):
            taken |= times(model, setting, ids, arm, args)
        rounds.append(taken)

    def ratio(what: str) -> float:
        return statistics.median(r[f"adapted {what}"] / r[f"bare {what}"] for r in rounds)

    medians = {name: round(statistics.median(r[name] for r in rounds), 6) for name in rounds[0]}
    return {
        "whole": round(ratio("whole"), 4),
        "first": round(ratio("first"), 4),
        **medians,
        "rounds": [{name: round(value, 6) for name, value in r.items()} for r in rounds],
    }


def times(
    model: Any, setting: Setting, ids: Tensor, arm: str, args: argparse.Namespace
) -> dict[str, float]:
    """Return an arm's seconds: all new tokens, the first one alone, an adapter's hooks in all."""

    def both(which: Any) -> dict[str, float]:
        generate(which, ids, 1)  # what is only done once is not counted
        return {
            f"{arm} first": statistics.median(generate(which, ids, 1) for _ in range(3)),
            f"{arm} whole": generate(which, ids, args.new_tokens),
        }

    if arm == "bare":
        return both(model)
    with attached(model, setting.config(depth(model)), args.seed) as adapted:
        taken = both(adapted.eval())
        with clocked(adapted, ids) as hooks:
            generate(adapted, ids, args.new_tokens)
        return {**taken, "hooks": sum(hooks)}


def draw(record: Record, args: argparse.Namespace) -> None:
    """Draw the ratios, a panel for each sweep."""
    with drawing(record.picture, len(args.sweeps), width=3.6) as panels:
        for axes, sweep in zip(panels, args.sweeps, strict=True):
            values = args.values[sweep]
            cells = [record.cells[f"{sweep} {value}"] for value in values]
            whole = [(cell["whole"] - 1) * 100 for cell in cells]
            first = [(cell["first"] - 1) * 100 for cell in cells]
            hooks = [cell["hooks"] / cell["bare whole"] * 100 for cell in cells]
            axes.plot(values, first, "o-", color="#c98b2b", label="prompt and first token")
            axes.plot(values, whole, "o-", color="#1f6f8b", label=f"{args.new_tokens} tokens")
            axes.plot(values, hooks, "o-", color="#a63d57", label="the hooks themselves")
            axes.axhline(0, color="#999999", lw=0.8)
            axes.set(
                xlabel={"prompt": "prompt tokens", "positions": "edited tokens"}.get(sweep, sweep)
            )
            axes.set_xticks(values)
            axes.grid(alpha=0.3)
        panels[0].set_ylabel(f"time added, % ({args.model})")
        panels[0].legend(fontsize="small")


def main(argv: Sequence[str] | None = None) -> Any:
    """Measure every cell that is missing; write, draw and print the results."""
    options = parser("overhead", __doc__)
    options.add_argument("--sweeps", nargs="+", default=list(SWEEPS), choices=list(SWEEPS))
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--new-tokens", type=int, default=32)
    args = arguments(options, argv)
    start(args)
    quick(args, rounds=2, new_tokens=4)
    if args.new_tokens < 2 or args.rounds < 1:
        raise ReftConfigError("--new-tokens is 2 or more, and --rounds 1 or more.")
    model, _ = load(args)
    longest = model.config.get_text_config().max_position_embeddings - args.new_tokens
    args.values = {
        sweep: sorted({min(v, longest if sweep == "prompt" else v) for v in SWEEPS[sweep]})
        for sweep in args.sweeps
    }
    if args.quick:
        args.values = {sweep: [values[0], values[-1]] for sweep, values in args.values.items()}
    kept = ("model", "dtype", "seed", "threads", "rounds", "new_tokens")
    record = Record(args, {name: getattr(args, name) for name in kept}, times=True)
    record.measure(
        {
            f"{sweep} {value}": partial(measure, model, replace(Setting(), **{sweep: value}), args)
            for sweep, values in args.values.items()
            for value in values
        }
    )
    draw(record, args)
    names = ("whole", "first", "bare whole", "bare first", "hooks")
    rows = [
        [name, *(f"{cell[n]:.4f}" for n in names)]
        for name, cell in record.cells.items()
        if name.split()[0] in args.values
    ]
    head = ["one thing changed", "whole, ratio", "first token, ratio"]
    head += ["bare, s", "bare first, s", "hooks, s"]
    summary = {
        sweep: {str(v): record.cells[f"{sweep} {v}"]["whole"] for v in values}
        for sweep, values in args.values.items()
    }
    return record.finish(summary, [head, *rows])


if __name__ == "__main__":
    command_line(main)
