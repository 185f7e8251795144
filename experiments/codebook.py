"""How many pairs can a rank-1 edit of one token hold? A codebook, by size and layer.

    python -m experiments.codebook --data-dir DATA [--sizes 16 64 --layers 0 10 20] [--quick]

DATA holds alice_in_wonderland.txt, for its words. One ConsReFT (d + 1 numbers) at the last token of
each prompt, at one layer, is trained on n pairs: "RAND#ID7->" and one random word, all words
different. What is measured is the share of prompts after which greedy decoding writes the word, and
then the end (`accuracy`), and how many first tokens are right. Each (n, layer) is one adapter.

The paper (Wu et al. 2024, appendix F.2; LLaMA-13B, lr 2e-3, 200 epochs in the published notebook):
128 pairs are held at every layer; of 256 pairs .77 at layer 0, .98 at layer 20 and .52 at layer 31,
the highest; of 512 at most .44, of 1,024 at most .15. A model's last layer can tell the first token
and no more, not even the end after a word of one token: there only first tokens say something.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from reftune import ReftConfig
from reftune.data import TokenDataset
from reftune.errors import DataError
from reftune.generate import HFEngine, Sampling
from reftune.prompts import Example, encode_prompt

from .common import (
    Batch,
    arguments,
    attached,
    check_layers,
    command_line,
    data_file,
    depth,
    drawing,
    load,
    parser,
    quick,
    shades,
    shuffled,
    spread,
    start,
    train,
)
from .records import Numbers, Record

LONGEST = 8  # tokens of a word


def codebook(text: str, count: int, seed: int) -> list[Example]:
    """Return pairs of a prompt and a word of the text, all different. Raises DataError."""
    words = sorted(set(re.findall(r"\b[a-z]{3,10}\b", text)))
    if count > len(words):
        raise DataError(f"The text has {len(words)} different words, fewer than --sizes {count}.")
    chosen = random.Random(seed).sample(words, count)
    return [Example(f"RAND#ID{i}->", word) for i, word in enumerate(chosen)]


def learn(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[Example],
    layer: int,
    args: argparse.Namespace,
) -> Numbers:
    """Train one adapter on the pairs, and return the share that it has learned."""
    data = TokenDataset.from_examples(pairs, tokenizer, "none", 64, cache_dir=None)
    config = ReftConfig(
        task_type="CAUSAL_LM", method=args.method, r=args.rank, layers=[layer], positions="l1"
    )
    generator = torch.Generator().manual_seed(args.seed)
    size = min(args.batch_size, len(pairs))
    steps = [[Batch(rows)] for rows in shuffled(len(pairs), size, args.epochs, generator)]
    with attached(model, config, args.seed) as adapted:
        last = Last(len(steps) // args.epochs, args.enough)
        losses = train(
            adapted, data, steps, args.learning_rate, int(tokenizer.pad_token_id), stop=last
        )
        engine = HFEngine(adapted, tokenizer, batch_size=64)
        prompts = [encode_prompt(pair.prompt, tokenizer, "none") for pair in pairs]
        written = engine.generate(prompts, Sampling(max_new_tokens=LONGEST))
    right = [w.text == pair.completion for w, pair in zip(written, pairs, strict=True)]
    first = [
        w.token_ids[:1] == (int(data[i]["input_ids"][data.prompt_lengths[i]]),)
        for i, w in enumerate(written)
    ]
    return {
        "accuracy": sum(right) / len(right),
        "first_token": sum(first) / len(first),
        "loss": last.mean,
        "epochs": len(losses) / last.size,
    }


class Last:
    """Ends training once the mean loss of an epoch, of `size` steps, is below `enough`."""

    def __init__(self, size: int, enough: float) -> None:
        self.size, self.enough, self.mean, self._losses = size, enough, float("inf"), [0.0]

    def __call__(self, step: int, loss: float) -> bool:
        self._losses.append(loss)
        if step % self.size == 0:
            self.mean = sum(self._losses[-self.size :]) / self.size
        return self.mean < self.enough


def draw(record: Record, args: argparse.Namespace) -> None:
    """Draw accuracy by layer, a line for each number of pairs."""
    with drawing(record.picture) as (axes,):
        for colour, size in zip(shades(len(args.sizes)), args.sizes, strict=True):
            shares = [record.cells[cell_name(size, layer)]["accuracy"] for layer in args.layers]
            axes.plot(args.layers, shares, "o-", color=colour, label=f"{size} pairs")
        axes.set(
            title=f"codebook, {args.model}, {args.method} rank {args.rank}",
            xlabel="edited layer",
            ylabel="share of pairs learned",
            ylim=(-0.03, 1.05),
        )
        axes.set_xticks(args.layers)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")


def cell_name(size: int, layer: int) -> str:
    """Return the name of a cell in the results."""
    return f"{size} pairs, layer {layer}"


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    options = parser("codebook", __doc__)
    options.add_argument("--layers", type=int, nargs="+", help="default: 0, 10, 20, ..., the last")
    options.add_argument("--sizes", type=int, nargs="+", default=[16, 32, 64, 128, 256, 512])
    options.add_argument("--epochs", type=int, default=60, help="at most")
    options.add_argument("--enough", type=float, default=0.02, help="mean loss that ends training")
    options.add_argument("--batch-size", type=int, default=16)
    options.add_argument("--learning-rate", type=float, default=2e-2)
    options.add_argument("--method", default="consreft")
    options.add_argument("--rank", type=int, default=1)
    return arguments(options, argv)


def main(argv: Sequence[str] | None = None) -> Any:
    """Measure every cell that is missing; write, draw and print the results."""
    args = arguments_of(argv)
    start(args)
    model, tokenizer = load(args)
    quick(args, layers=[depth(model) // 2], sizes=[8, 16], epochs=30)
    args.layers = check_layers(args.layers or spread(depth(model), 10), depth(model))
    text = data_file(args, "alice_in_wonderland.txt").read_text(encoding="utf-8")
    kept = (
        *("model", "dtype", "seed", "epochs", "enough", "batch_size", "learning_rate", "method"),
        "rank",
    )
    record = Record(args, {name: getattr(args, name) for name in kept})
    books = {size: codebook(text, size, args.seed) for size in args.sizes}
    record.measure(
        {
            cell_name(size, layer): partial(learn, model, tokenizer, pairs, layer, args)
            for size, pairs in books.items()
            for layer in args.layers
        }
    )
    accuracy = {
        str(size): [
            round(record.cells[cell_name(size, layer)]["accuracy"], 3) for layer in args.layers
        ]
        for size in args.sizes
    }
    draw(record, args)
    head = ["learned at layer", *map(str, args.layers)]
    rows = [[f"{size} pairs", *(f"{a:.2f}" for a in found)] for size, found in accuracy.items()]
    return record.finish({"layers": args.layers, "accuracy": accuracy}, [head, *rows])


if __name__ == "__main__":
    command_line(main)
