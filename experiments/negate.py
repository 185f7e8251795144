"""An adapter by halves, in excess and backwards: sentiment by the strength of the edit.

    python -m experiments.negate --data-dir DATA [--strengths -1 0 1] [--quick]

DATA holds glue/sst2/{train,dev}.jsonl. A LoReFT at one middle layer learns to continue the first
words of reviews as positive reviews go on. It then continues the first words of other reviews, of
both kinds, with its edit times c: h + c (Phi(h) - h). Sentiment is measured by a list of words,
those that are e^1.5 times as frequent in one kind of SST-2's training reviews as in the other:
(positive - negative) / (positive + negative) words. With it, how much the text repeats itself, as
too strong an edit breaks a model.

Not in the paper, but in its code (examples/neg_reft_all.ipynb; GPT-2-large, rank 8, layer 15, all
positions, 2,000 toxic examples): toxicity .06 at c = 0, .25 at c = 1, and below .06 at c = -1.
"""

from __future__ import annotations

import argparse
import math
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from reftune import ReftConfig, set_strength
from reftune.data import TokenDataset, load_rows
from reftune.errors import DataError
from reftune.generate import HFEngine, Sampling
from reftune.prompts import Example, encode_prompt

from .common import (
    COLOURS,
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
    shuffled,
    start,
    train,
)
from .records import Numbers, Record

BEGINNING = 3  # words of a review that are the prompt
LONG_ENOUGH = 10  # words of a review
FREQUENT = 20
LOG_ODDS = 1.5


def reviews(path: Path) -> list[tuple[str, int]]:
    """Return reviews with their labels, 1 for positive ones. Raises DataError."""
    found = []
    for row in load_rows(path):
        text, label = row.fields.get("sentence"), row.fields.get("label")
        if not isinstance(text, str) or label not in (0, 1):
            raise DataError(f"{row.where}: expected a sentence and a label 0 or 1.")
        found.append((text.strip(), int(label)))
    return found


def word_list(labelled: Sequence[tuple[str, int]], frequent: int = FREQUENT) -> dict[str, int]:
    """Return the words that speak for one kind of review: 1 for positive, -1 for negative."""
    counts = (Counter[str](), Counter[str]())
    for text, label in labelled:
        counts[label].update(set(words(text)))
    ratio = max(counts[1].total(), 1) / max(counts[0].total(), 1)
    found = {}
    for word in sorted(counts[0] | counts[1]):
        odds = math.log((counts[1][word] + 1) / (counts[0][word] + 1) / ratio)
        if counts[0][word] + counts[1][word] >= frequent and abs(odds) > LOG_ODDS:
            found[word] = 1 if odds > 0 else -1
    return found


def words(text: str) -> list[str]:
    """Return the words of a text, in small letters."""
    return re.findall(r"[a-z']+", text.lower())


def sentiment(texts: Sequence[str], listed: Mapping[str, int]) -> Numbers:
    """Return the balance of the listed words in texts, and how they are spread."""
    found = [[listed[w] for w in words(text) if w in listed] for text in texts]
    kinds = [sum(kind) for kind in found]
    every = [w for text in texts for w in words(text)]
    distinct = sum(len(set(words(text))) for text in texts)
    flat = [value for values in found for value in values]
    return {
        "sentiment": sum(flat) / max(len(flat), 1),
        "positive texts": sum(k > 0 for k in kinds) / len(kinds),
        "negative texts": sum(k < 0 for k in kinds) / len(kinds),
        "listed words": len(flat),
        "repeated": 1 - distinct / max(len(every), 1),
        "words": len(every) / len(texts),
    }


def continuation(text: str) -> Example:
    """Return a review as its first words, and the others."""
    first, rest = text.split()[:BEGINNING], text.split()[BEGINNING:]
    return Example("Review: " + " ".join(first), " " + " ".join(rest))


def learn(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    training: Sequence[Example],
    tests: Sequence[Example],
    listed: Mapping[str, int],
    args: argparse.Namespace,
) -> dict[str, Numbers]:
    """Train one adapter, and return the sentiment of what it writes at each strength."""
    data = TokenDataset.from_examples(training, tokenizer, "none", 128, cache_dir=None)
    config = ReftConfig(
        task_type="CAUSAL_LM",
        method=args.method,
        r=args.rank,
        layers=args.layers,
        positions=args.positions,
        edit_generated=args.edit_generated,
    )
    generator = torch.Generator().manual_seed(args.seed)
    steps = [[Batch(rows)] for rows in shuffled(len(data), args.batch_size, args.epochs, generator)]
    with attached(model, config, args.seed) as adapted:
        losses = train(adapted, data, steps, args.learning_rate, int(tokenizer.pad_token_id))
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps", flush=True)
        engine = HFEngine(adapted, tokenizer, batch_size=32)
        prompts = [encode_prompt(example.prompt, tokenizer, "none") for example in tests]
        sampling = Sampling(args.new_tokens, temperature=0.7, stop=("\n",), seed=args.seed)
        found = {}
        for strength in args.strengths:
            set_strength(adapted, strength)
            texts = [w.text for w in engine.generate(prompts, sampling)]
            shown = [e.prompt + t for e, t in zip(tests, texts, strict=True)][:4]  # type: ignore[operator]
            found[f"{strength:g}"] = sentiment(texts, listed) | {"texts": shown}
    return found


def draw(record: Record, found: Mapping[str, Numbers], args: argparse.Namespace) -> None:
    """Draw sentiment and repetition by strength."""
    at = [float(strength) for strength in found]
    with drawing(record.picture) as (axes,):
        for name, colour in zip(("sentiment", "repeated"), COLOURS, strict=False):
            values = [numbers[name] for numbers in found.values()]
            label = {"sentiment": "sentiment of words", "repeated": "share of words repeated"}[name]
            axes.plot(at, values, "o-", color=colour, label=label)
        axes.axvline(0, color="#999999", lw=0.8)
        axes.axhline(0, color="#999999", lw=0.8)
        layers = ", ".join(map(str, args.layers))
        axes.set(
            title=f"{args.method} for positive reviews, {args.model}, layers {layers}",
            xlabel="strength c: -1 negated, 0 the base model, 1 as trained",
            ylabel="sentiment (-1 to 1), share repeated",
            ylim=(-1.05, 1.05),
        )
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")


def main(argv: Sequence[str] | None = None) -> Any:
    """Train and measure what is missing; write, draw and print the results."""
    options = parser("negate", __doc__)
    options.add_argument("--layers", type=int, nargs="+", help="default: the middle one")
    options.add_argument("--positions", default="all")
    options.add_argument("--edit-generated", action=argparse.BooleanOptionalAction, default=True)
    options.add_argument("--method", default="loreft")
    options.add_argument("--rank", type=int, default=8)
    options.add_argument("--strengths", type=float, nargs="+", default=[-1, -0.5, 0, 0.5, 1, 1.5])
    options.add_argument("--examples", type=int, default=1000)
    options.add_argument("--tests", type=int, default=200)
    options.add_argument("--new-tokens", type=int, default=24)
    options.add_argument("--epochs", type=int, default=2)
    options.add_argument("--batch-size", type=int, default=16)
    options.add_argument("--learning-rate", type=float, default=2e-3)
    args = arguments(options, argv)
    start(args)
    quick(args, examples=32, tests=8, epochs=1)
    labelled = reviews(data_file(args, "glue/sst2/train.jsonl", "sst2/train.jsonl"))
    other = reviews(data_file(args, "glue/sst2/dev.jsonl", "sst2/dev.jsonl"))
    random.Random(args.seed).shuffle(other)
    positive = [text for text, kind in labelled if kind and len(text.split()) >= LONG_ENOUGH]
    training = [continuation(text) for text in positive[: args.examples]]
    tests = [continuation(text) for text, _ in other if len(text.split()) >= LONG_ENOUGH]
    model, tokenizer = load(args)
    args.layers = check_layers(args.layers or [depth(model) // 2], depth(model))
    listed = word_list(labelled)
    kept = (
        *("model", "dtype", "seed", "layers", "positions", "edit_generated", "method", "rank"),
        *("strengths", "examples", "tests", "new_tokens", "epochs", "batch_size", "learning_rate"),
    )
    record = Record(args, {name: getattr(args, name) for name in kept})
    tests = tests[: args.tests]
    record.measure(
        {"strengths": lambda: dict(learn(model, tokenizer, training, tests, listed, args))}
    )
    cell = record.cells["strengths"]
    found = {f"{c:g}": cell[f"{c:g}"] for c in sorted(args.strengths)}
    draw(record, found, args)
    names = [name for name in next(iter(found.values())) if name != "texts"]
    rows = [[c, *(f"{numbers[n]:.2f}" for n in names)] for c, numbers in found.items()]
    summary = {c: {n: round(numbers[n], 3) for n in names} for c, numbers in found.items()}
    return record.finish(summary, [["strength", *names], *rows])


if __name__ == "__main__":
    command_line(main)
