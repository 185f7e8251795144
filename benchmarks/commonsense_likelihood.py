"""Score an experiment's commonsense runs, and their base, by likelihood, not by what they write.

    python benchmarks/commonsense_likelihood.py runs/commonsense-table-smollm2 --data-dir DATA

A base model that never writes "the correct answer is ..." has no points in the table, whatever it
knows. Here each option that the prompt names ("Answer format: answer1/answer2") is put behind that
sentence, and the most probable one is the answer. Sets, rows and dtype are those of the runs, but
the head computes in float32: logits of 16 bits leave a third of the options level. Of options that
still are, each has its share of the point. What was scored already, of the same weights and rows,
is kept. The results go to benchmarks/results/NAME-likelihood.json.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import hashlib
import json
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from measure import versions
from reftune.decoding import fingerprint
from reftune.likelihood import Pair, Scorer
from reftune.loading import load_adapter
from reftune.models import load_model
from reftune.prompts import Example, encode
from reftune.settings import RunConfig, load_config
from reftune.tasks import get_task
from reftune.tasks.commonsense import TRIGGER
from training_peers.report import machine

RESULTS = Path(__file__).resolve().parent / "results"
LONGEST = 2**20  # tokens: nothing is cut
_OPTIONS = re.compile(r"Answer format: (\S+)")


def options_of(example: Example) -> list[str]:
    """Return the answers that a prompt names: ["true", "false"]."""
    found = _OPTIONS.search(str(example.prompt))
    if found is None:
        raise SystemExit(f"{example.where} does not name its options ('Answer format: a/b').")
    return found[1].split("/")


def pairs_of(example: Example, tokenizer: Any, config: RunConfig) -> list[Pair]:
    """Return a prompt before each of its options, as tokens."""
    pairs = []
    for option in options_of(example):
        row = Example(example.prompt, TRIGGER + option, example.fields, example.where)
        ids = encode(row, tokenizer, config.data.template, LONGEST)
        end = len(ids.input_ids) - (ids.input_ids[-1] == tokenizer.eos_token_id)
        n = ids.prompt_length
        pairs.append(Pair(tuple(ids.input_ids[:n]), tuple(ids.input_ids[n:end])))
    return pairs


def examples_of(config: RunConfig, data_dir: str) -> dict[str, list[tuple[Example, str]]]:
    """Return the examples of each set, with their answers."""
    found = {}
    for name in config.evaluate.tasks:
        task = get_task(name, data_dir, "test", config.evaluate.limit)
        examples = [task.example(i) for i in range(task.num_examples)]
        found[name] = [(example, task.gold(example)) for example in examples]
    return found


def score(
    model: Any, tokenizer: Any, config: RunConfig, examples: dict[str, list[tuple[Example, str]]]
) -> tuple[dict[str, list[float]], int]:
    """Return the points of each set's examples, and of how many several options are level."""
    right, ties = {}, 0
    for name, rows in examples.items():
        pairs = [pairs_of(example, tokenizer, config) for example, _ in rows]
        flat = Scorer(model, config.evaluate.batch_size).score(
            [pair for several in pairs for pair in several]
        )
        logprobs = iter(likelihood.logprob for likelihood in flat)
        best = [best_of(options_of(e), [next(logprobs) for _ in options_of(e)]) for e, _ in rows]
        right[name] = [point(b, gold) for b, (_, gold) in zip(best, rows, strict=True)]
        ties += sum(len(several) > 1 for several in best)
    return right, ties


def best_of(options: Sequence[str], logprobs: Sequence[float]) -> list[str]:
    """Return the most probable option, or all that are equally so."""
    return [o for o, logprob in zip(options, logprobs, strict=True) if logprob == max(logprobs)]


def point(best: Sequence[str], gold: str) -> float:
    """Return 1 where the answer is the most probable option, a share where it is one of several."""
    return round(1 / len(best), 4) if gold in best else 0


def load(run: Path, config: RunConfig, *, base: bool) -> tuple[Any, Any]:
    """Return the model of a run, or its base, with a head in float32, and the tokenizer."""
    device = "cuda" if torch.cuda.is_available() else None
    if base:
        model, tokenizer = load_model(config.model, config.dtype, device)
        with_float32_head(model)
        return model, tokenizer
    loaded = load_adapter(run, base=config.model, dtype=config.dtype, device=device)
    with_float32_head(loaded.model.get_base_model())
    return loaded.model, loaded.tokenizer


def with_float32_head(model: Any) -> None:
    """Let a model's logits be computed in float32, from states of its own dtype."""
    head = copy.deepcopy(model.get_output_embeddings()).float()
    head.register_forward_pre_hook(lambda _, states: (states[0].float(),))
    # Not by set_output_embeddings: it would tie the input's embeddings to this copy.
    [name] = [n for n, m in model.named_modules() if m is model.get_output_embeddings()]
    model.set_submodule(name, head)


def digest(examples: dict[str, list[tuple[Example, str]]]) -> str:
    """Return what tells one set of questions and answers from another."""
    rows = [(name, str(e.prompt), gold) for name, some in examples.items() for e, gold in some]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def table(cells: dict[str, Any]) -> list[str]:
    """Return a line for each method: the mean and deviation over its seeds, of sets and in all."""
    methods: dict[str, list[dict[str, float]]] = defaultdict(list)
    for name, cell in cells.items():
        sets = {key: 100 * statistics.mean(right) for key, right in cell["right"].items()}
        methods[name.rpartition("-s")[0] or name].append(
            sets | {"average": statistics.mean(sets.values())}
        )
    lines = []
    for method, seeds in methods.items():
        told = []
        for key in seeds[0]:
            values = [seed[key] for seed in seeds]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            told.append(f"{key} {statistics.mean(values):.1f}{spread}")
        lines.append(f"{method} ({len(seeds)}): " + ", ".join(told))
    return lines


def cells_of(path: Path) -> dict[str, Any]:
    """Return what a results file holds: none where there is none."""
    return dict(json.loads(path.read_text())["cells"]) if path.is_file() else {}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", type=Path, help="folder of finished runs")
    parser.add_argument("--data-dir", default="hub")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cells", nargs="+", default=["*"], help="names or patterns of runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    runs = sorted(path.parent for path in args.experiment.glob("*/results.json"))
    runs = [run for run in runs if (run / "config.yaml").is_file()]
    runs = [run for run in runs if any(fnmatch.fnmatch(run.name, cell) for cell in args.cells)]
    if not runs:
        raise SystemExit(f"{args.experiment} has no finished runs named {', '.join(args.cells)}.")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.experiment.name}-likelihood.json"
    for run, base in [(runs[0], True), *((run, False) for run in runs)]:
        config = load_config(run / "config.yaml")
        model, tokenizer = load(run, config, base=base)
        examples = examples_of(config, args.data_dir)
        of = {"template": config.data.template, "rows": digest(examples)}
        of |= {"dtype": config.dtype, "model": fingerprint(model)}
        name = "base" if base else run.name
        if cells_of(path).get(name, {}).get("of") == of:
            continue
        began = time.perf_counter()
        right, ties = score(model, tokenizer, config, examples)
        seconds = round(time.perf_counter() - began, 1)
        cell = {"of": of, "right": right, "ties": ties, "seconds": seconds}
        kept = {
            "cells": cells_of(path) | {name: cell},  # read again: others may have written
            "versions": versions("torch", "transformers", "peft"),
            "machine": machine(),
        }
        part = path.with_suffix(".part")
        part.write_text(json.dumps(kept) + "\n")
        part.rename(path)
        print(*table({name: cell}), flush=True)
    cells = cells_of(path)
    rows = cells["base"]["of"]["rows"]
    print(*table({n: c for n, c in cells.items() if c["of"]["rows"] == rows}), sep="\n")


if __name__ == "__main__":
    main()
