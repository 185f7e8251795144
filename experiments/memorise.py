"""How much text can a rank-1 edit of one token hold? *Alice* memorised, by layer and length.

    python -m experiments.memorise --data-dir DATA [--layers 0 5 10 --lengths 16 64] [--quick]

DATA holds alice_in_wonderland.txt. One ConsReFT (d + 1 numbers) at the last token of the prompt
"ALIC#ID1->", at one layer, is trained to have the model write the first L tokens of the text. What
is measured is the share of the text's characters up to the first wrong one, decoded greedily. Kinds
of text: alice; its words scrambled; random tokens. Each (kind, length, layer) is one adapter.

The paper (Wu et al. 2024, appendix F.1; 1000 epochs, lr 4e-3, LLaMA): 7B recovers all of up to
2,048 tokens at layers 0 to 25 and almost nothing at the last layer, 31, where an edit of the last
prompt token reaches only the first token written; 2,560 and more collapse. Of scrambled words 256
are held at layers 15 and 20 only, of random tokens 128. Here training ends as soon as every token
is right (which greedy decoding then writes), and has fewer epochs.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import reftune
from reftune import ReftConfig
from reftune.data import TokenDataset
from reftune.errors import DataError
from reftune.generate import HFEngine, Sampling

from .common import (
    Batch,
    arguments,
    attached,
    check_layers,
    command_line,
    data_file,
    depth,
    drawing,
    encoded,
    load,
    parser,
    quick,
    shades,
    spread,
    start,
    train,
)
from .records import Numbers, Record

PROMPT = "ALIC#ID1->"
KINDS = ("alice", "scrambled", "random")
LOOK_EVERY = 10  # epochs between two looks whether all is recovered
LEARNING_RATE = 2e-2  # five times the paper's, in a seventh of its epochs
LOW = 0.5  # nats per token: with more, there is no need to look


def text_ids(
    kind: str, text: str, tokenizer: PreTrainedTokenizerBase, length: int, seed: int
) -> list[int]:
    """Return the `length` tokens to memorise. Raises DataError where the text is too short."""
    chooser = random.Random(seed)
    if kind == "random":
        return chooser.choices(plain_tokens(tokenizer), k=length)
    if kind == "scrambled":
        words = re.findall(r"\S+", text)[: max(length, 1)]  # a word has a token at least
        chooser.shuffle(words)
        text = " ".join(words)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:length]
    if len(ids) < length:
        raise DataError(f"The text has {len(ids)} tokens, fewer than --lengths {length}.")
    return ids


def plain_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that are text by themselves, and not special."""
    special = set(tokenizer.all_special_ids)
    ids = [i for i in range(len(tokenizer)) if i not in special]
    return [i for i in ids if (t := str(tokenizer.decode([i]))) and t.isascii() and t.isprintable()]


@torch.no_grad()
def right_tokens(model: Any, ids: Tensor, prompt_length: int) -> int:
    """Return how many tokens of a completion come right before the first wrong one.

    Greedy decoding writes these, and then that wrong one: up to it, it sees the same tokens.
    """
    was_training = model.training
    model.eval()
    with reftune.options(prompt_lengths=torch.tensor([prompt_length], device=ids.device)):
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
    model.train(was_training)
    right = logits[prompt_length - 1 : -1].argmax(-1) == ids[prompt_length:]
    return int(right.long().cumprod(0).sum())


def recovered(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: list[int], text: str) -> int:
    """Return how many characters of a text greedy decoding writes before it goes wrong."""
    new = len(tokenizer(text, add_special_tokens=False).input_ids) + 8
    engine = HFEngine(model, tokenizer, batch_size=1)
    (written,) = engine.generate(
        [prompt],
        Sampling(max_new_tokens=new),
        is_decided=lambda _, so_far: not text.startswith(so_far) or len(so_far) >= len(text),
    )
    return common_prefix(written.text, text)


def common_prefix(a: str, b: str) -> int:
    """Return how many characters two texts begin with alike."""
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
    return sum(1 for _ in alike)


def memorise(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    target: list[int],
    layer: int,
    args: argparse.Namespace,
) -> Numbers:
    """Train one adapter on one text, and return what it recovers."""
    prompt: list[int] = tokenizer(PROMPT, add_special_tokens=True).input_ids
    data = TokenDataset([encoded(prompt, target)])
    ids = torch.tensor([*prompt, *target], device=model.device)
    config = ReftConfig(
        task_type="CAUSAL_LM", method=args.method, r=args.rank, layers=[layer], positions="l1"
    )
    with attached(model, config, args.seed) as adapted:

        def all_right(step: int, loss: float) -> bool:
            looks = step % LOOK_EVERY == 0 and loss < LOW
            return looks and right_tokens(adapted, ids, len(prompt)) == len(target)

        steps = [[Batch([0])]] * args.epochs
        pad = tokenizer.pad_token_id
        losses = train(adapted, data, steps, args.learning_rate, int(pad), stop=all_right)
        text = str(tokenizer.decode(target))
        characters = recovered(adapted, tokenizer, prompt, text)
        right = right_tokens(adapted, ids, len(prompt))
    return {
        "recovered": characters / len(text),
        "right_tokens": right,
        "loss": losses[-1],
        "epochs": len(losses),
    }


Shares = dict[str, dict[str, list[float]]]
"""What was recovered, by kind of text and length, of each layer."""


def draw(target: Path, found: Shares, args: argparse.Namespace) -> None:
    """Draw recovery by layer, a line for each length, a panel for each kind of text."""
    lengths = sorted({int(length) for by_length in found.values() for length in by_length})
    colours = dict(zip(map(str, lengths), shades(len(lengths)), strict=True))
    with drawing(target, len(found), width=5.0) as panels:
        for axes, (kind, by_length) in zip(panels, found.items(), strict=True):
            for length, shares in by_length.items():
                axes.plot(
                    args.layers, shares, "o-", color=colours[length], label=f"{length} tokens"
                )
            axes.set(
                title=f"{kind}, {args.model}, {args.method} rank {args.rank}",
                xlabel="edited layer",
                ylim=(-0.03, 1.05),
            )
            axes.set_xticks(args.layers)
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
        panels[0].set_ylabel("share of characters recovered")


def cell_name(kind: str, length: int, layer: int) -> str:
    """Return the name of a cell in the results."""
    return f"{kind} {length} tokens, layer {layer}"


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    options = parser("memorise", __doc__)
    options.add_argument("--layers", type=int, nargs="+", help="default: 0, 5, 10, ..., the last")
    options.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 256])
    options.add_argument(
        "--control-lengths",
        type=int,
        nargs="+",
        default=[16],
        help="of scrambled words and random tokens",
    )
    options.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    options.add_argument("--epochs", type=int, default=150, help="at most")
    options.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    options.add_argument("--method", default="consreft")
    options.add_argument("--rank", type=int, default=1)
    return arguments(options, argv)


def main(argv: Sequence[str] | None = None) -> Any:
    """Measure every cell that is missing; write, draw and print the results."""
    args = arguments_of(argv)
    start(args)
    model, tokenizer = load(args)
    quick(args, layers=[0, depth(model) - 1], lengths=[8, 16], control_lengths=[8], epochs=60)
    args.layers = check_layers(args.layers or spread(depth(model)), depth(model))
    text = alice(data_file(args, "alice_in_wonderland.txt").read_text(encoding="utf-8"))
    kept = ("model", "dtype", "seed", "epochs", "learning_rate", "method", "rank")
    record = Record(args, {name: getattr(args, name) for name in kept})
    targets = {
        (kind, length): text_ids(kind, text, tokenizer, length, args.seed)
        for kind in args.kinds
        for length in (args.lengths if kind == "alice" else args.control_lengths)
    }
    record.measure(
        {
            cell_name(*of, layer): partial(memorise, model, tokenizer, target, layer, args)
            for of, target in targets.items()
            for layer in args.layers
        }
    )
    found: Shares = {kind: {} for kind in args.kinds}
    rows = [["recovered at layer", *map(str, args.layers)]]
    for kind, length in targets:
        cells = [record.cells[cell_name(kind, length, layer)] for layer in args.layers]
        shares = [cell["recovered"] for cell in cells]
        found[kind][str(length)] = [round(share, 3) for share in shares]
        rows.append([f"{kind}, {length} tokens", *(f"{share:.2f}" for share in shares)])
    draw(record.picture, found, args)
    return record.finish({"layers": args.layers, "recovered": found}, rows)


def alice(text: str) -> str:
    """Return the story without its title page."""
    begin = text.find("Alice was beginning")
    return text[max(begin, 0) :].strip()


if __name__ == "__main__":
    command_line(main)
