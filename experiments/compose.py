"""Two skills in two subspaces of one edit, used together though never trained together.

    python -m experiments.compose --data-dir DATA [--layers 15] [--epochs 5] [--quick]

DATA holds alpaca_en_demo.json (as it is, or in instruct/). One LoReFT of rank 8: its rows 0 to 3
learn to answer in CAPITALS, its rows 4 to 7 to answer as JSON, {"answer": "..."}; each example
edits only its own rows. Both sets of examples are made by rule from first sentences of answers, of
different instructions. At inference the rows are on apart and together; whether an answer has the
properties is measured by rule, on instructions that neither set has.

The paper (Wu et al. 2024, appendix G.1; LLaMA, rank 8, layer 15, last prompt token, lr 5e-3, batch
8, 3 epochs): German continuations in rows 0 to 3, English instruction following in rows 4 to 7;
with all 8 rows the model follows instructions in German. Two examples are shown; nothing is
counted. Here everything is.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from reftune import ReftConfig, set_strength, set_subspaces
from reftune.data import TokenDataset, iter_examples, load_rows
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

SKILLS = ("capitals", "json")
ARMS: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "capitals": ("capitals",),
    "json": ("json",),
    "both": SKILLS,
}
LONGEST = 120  # characters of an answer


def first_sentence(text: str) -> str:
    """Return what comes before the first line break, or up to the first full stop."""
    line = text.strip().partition("\n")[0]
    return re.split(r"(?<=[.!?])\s", line, maxsplit=1)[0].strip()


def short_answers(path: Any, count: int) -> list[Example]:
    """Return examples whose answer is one short sentence. Raises DataError for too few."""
    found = []
    for example in iter_examples(load_rows(path)):
        answer = first_sentence(example.completion)
        asked = str(example.fields["instruction"]) + str(example.fields.get("input") or "")
        if 3 <= len(answer) <= LONGEST and len(asked) <= 300 and re.search("[a-zA-Z]{2}", answer):
            found.append(Example(example.prompt, answer, where=example.where))
    if len(found) < count:
        raise DataError(f"{path} has {len(found)} short answers, {count} are asked for.")
    return found[:count]


def taught(example: Example, skill: str) -> Example:
    """Return an example whose answer shows a skill."""
    text = example.completion
    shown = (
        text.upper() if skill == "capitals" else json.dumps({"answer": text}, ensure_ascii=False)
    )
    return Example(example.prompt, shown, where=example.where)


def is_json(text: str) -> bool:
    """Return whether a text is {"answer": "..."} as a whole; the key may be in capitals."""
    try:
        found = json.loads(text.strip())
    except ValueError:
        return False
    keys = list(found) if isinstance(found, dict) else []
    return len(keys) == 1 and keys[0].lower() == "answer" and isinstance(found[keys[0]], str)


def opens_json(text: str) -> bool:
    """Return whether a text begins as such JSON."""
    return re.match(r'\s*\{\s*"answer"\s*:', text, re.IGNORECASE) is not None


def is_capitals(text: str) -> bool:
    """Return whether nine letters in ten are capitals, the key of JSON left out."""
    answer = re.sub(r'^\s*\{\s*"answer"\s*:', "", text, flags=re.IGNORECASE)
    letters = [c for c in answer if c.isalpha()]
    return len(letters) >= 2 and sum(c.isupper() for c in letters) >= 0.9 * len(letters)


def shares(answers: Sequence[str]) -> Numbers:
    """Return which shares of the answers have the properties."""
    found = [(is_capitals(a), is_json(a), opens_json(a)) for a in answers]
    n = len(found)
    return {
        "capitals": sum(c for c, _, _ in found) / n,
        "json": sum(j for _, j, _ in found) / n,
        "both": sum(c and j for c, j, _ in found) / n,
        "opens json": sum(o for _, _, o in found) / n,
        "capitals, opens json": sum(c and o for c, _, o in found) / n,
        "answers": list(answers)[:8],
    }


def learn(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    args: argparse.Namespace,
) -> dict[str, Numbers]:
    """Train both skills, each in its subspace; return the shares of every arm."""
    per_skill = args.examples
    training = [
        taught(example, skill)
        for k, skill in enumerate(SKILLS)
        for example in examples[k * per_skill : (k + 1) * per_skill]
    ]
    data = TokenDataset.from_examples(training, tokenizer, "auto", 256, cache_dir=None)
    half = args.rank // 2
    config = ReftConfig(
        task_type="CAUSAL_LM",
        r=args.rank,
        layers=args.layers,
        positions=args.positions,
        subspaces={"capitals": list(range(half)), "json": list(range(half, args.rank))},
    )
    with attached(model, config, args.seed) as adapted:
        generator = torch.Generator().manual_seed(args.seed)
        orders = [shuffled(per_skill, args.batch_size, args.epochs, generator) for _ in SKILLS]
        steps = [
            [
                Batch([row + k * per_skill for row in rows], [SKILLS[k]])
                for k, rows in enumerate(pair)
            ]
            for pair in zip(*orders, strict=True)
        ]
        pad = int(tokenizer.pad_token_id)
        losses = train(adapted, data, steps, args.learning_rate, pad)
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps", flush=True)
        prompts = [
            encode_prompt(example.prompt, tokenizer, "auto")
            for example in examples[len(SKILLS) * per_skill :]
        ]
        sampling = Sampling(max_new_tokens=args.new_tokens)
        return {arm: answer(adapted, tokenizer, prompts, on, sampling) for arm, on in ARMS.items()}


def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    on: Sequence[str],
    sampling: Sampling,
) -> Numbers:
    """Return the shares of a model's answers with some subspaces on; none of them is the base."""
    set_strength(model, 1.0 if on else 0.0)
    set_subspaces(model, on or None)
    engine = HFEngine(model, tokenizer, batch_size=32)
    written = engine.generate(prompts, sampling)
    return shares([w.text for w in written])


def draw(record: Record, cells: Mapping[str, Numbers], args: argparse.Namespace) -> None:
    """Draw, for each arm, the shares of answers with the properties."""
    names = ("capitals", "opens json", "capitals, opens json", "both")
    labels = ("capitals", "begins as JSON", "both of these", "capitals, and valid JSON")
    with drawing(record.picture, width=7.0) as (axes,):
        for k, (name, label, colour) in enumerate(zip(names, labels, COLOURS, strict=False)):
            at = [i + (k - 1.5) * 0.2 for i in range(len(ARMS))]
            axes.bar(at, [cells[arm][name] for arm in ARMS], 0.19, color=colour, label=label)
        axes.set_xticks(range(len(ARMS)), [f"{arm} on" for arm in ARMS])
        layers = ", ".join(map(str, args.layers))
        axes.set(
            title=f"composition of subspaces, {args.model}, layers {layers}, {args.positions}",
            ylabel="share of answers",
            ylim=(0, 1.05),
        )
        axes.grid(alpha=0.3, axis="y")
        axes.legend(fontsize="small", loc="upper left")


def main(argv: Sequence[str] | None = None) -> Any:
    """Train and measure what is missing; write, draw and print the results."""
    options = parser("compose", __doc__)
    options.add_argument("--layers", type=int, nargs="+", help="default: the middle one")
    options.add_argument("--positions", default="l1")
    options.add_argument("--rank", type=int, default=8, help="half of it for each skill")
    options.add_argument("--examples", type=int, default=280, help="for each skill")
    options.add_argument("--tests", type=int, default=60)
    options.add_argument("--new-tokens", type=int, default=96, help="at most, of an answer")
    options.add_argument("--epochs", type=int, default=5)
    options.add_argument("--batch-size", type=int, default=8, help="of each skill")
    options.add_argument("--learning-rate", type=float, default=5e-3)
    args = arguments(options, argv)
    start(args)
    quick(args, examples=16, tests=4, epochs=1, new_tokens=16)
    path = data_file(args, "alpaca_en_demo.json", "instruct/alpaca_en_demo.json")
    examples = short_answers(path, len(SKILLS) * args.examples + args.tests)
    model, tokenizer = load(args)
    layers = args.layers or [depth(model) // 2]
    args.layers = check_layers(layers, depth(model))
    kept = (
        *("model", "dtype", "seed", "layers", "positions", "rank", "examples", "tests", "epochs"),
        *("batch_size", "learning_rate", "new_tokens"),
    )
    record = Record(args, {name: getattr(args, name) for name in kept})
    record.measure({"arms": lambda: dict(learn(model, tokenizer, examples, args))})
    cells = {arm: record.cells["arms"][arm] for arm in ARMS}
    draw(record, cells, args)
    names = [name for name in cells["none"] if name != "answers"]
    rows = [[arm, *(f"{numbers[n]:.2f}" for n in names)] for arm, numbers in cells.items()]
    summary = {arm: {n: round(numbers[n], 3) for n in names} for arm, numbers in cells.items()}
    return record.finish(summary, [["share of answers", *names], *rows])


if __name__ == "__main__":
    command_line(main)
