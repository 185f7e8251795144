"""Score an experiment's commonsense runs, and their base, by likelihood, not by what they write.

    python benchmarks/commonsense_likelihood.py runs/commonsense-table-smollm2 --data-dir DATA

A base model that never writes "the correct answer is ..." has no points in the table, whatever it
knows. Here each option that the prompt names ("Answer format: answer1/answer2") is put behind that
sentence, and the most probable one is the answer. Sets, rows and dtype are those of the runs; what
is scored already is kept. The results go to benchmarks/results/NAME-likelihood.json.
"""

from __future__ import annotations

import argparse
import fnmatch
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


def score(model: Any, tokenizer: Any, config: RunConfig, data_dir: str) -> dict[str, list[int]]:
    """Return for each set which examples are answered right, 1 or 0."""
    right = {}
    for name in config.evaluate.tasks:
        task = get_task(name, data_dir, "test", config.evaluate.limit)
        examples = [task.example(i) for i in range(task.num_examples)]
        pairs = [pairs_of(example, tokenizer, config) for example in examples]
        flat = Scorer(model, config.evaluate.batch_size, dtype=torch.float32).score(
            [pair for several in pairs for pair in several]
        )
        found = iter(flat)
        right[name] = [
            int(best_of(options_of(e), [next(found).logprob for _ in p]) == task.gold(e))
            for e, p in zip(examples, pairs, strict=True)
        ]
    return right


def best_of(options: Sequence[str], logprobs: Sequence[float]) -> str:
    """Return the most probable option."""
    return max(zip(logprobs, options, strict=True))[1]


def load(run: Path, config: RunConfig, *, base: bool) -> tuple[Any, Any]:
    """Return the model of a run, or its base, and the tokenizer."""
    device = "cuda" if torch.cuda.is_available() else None
    if base:
        return load_model(config.model, config.dtype, device)
    loaded = load_adapter(run, base=config.model, dtype=config.dtype, device=device)
    return loaded.model, loaded.tokenizer


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
    path = args.out / f"{args.experiment.name}-likelihood.json"
    kept = json.loads(path.read_text()) if path.is_file() else {"cells": {}}
    for run, base in [(runs[0], True), *((run, False) for run in runs)]:
        name = "base" if base else run.name
        if name in kept["cells"]:
            continue
        config = load_config(run / "config.yaml")
        began = time.perf_counter()
        right = score(*load(run, config, base=base), config, args.data_dir)
        cell = {"right": right, "seconds": round(time.perf_counter() - began, 1)}
        kept["cells"][name] = cell
        kept |= {
            "versions": versions("torch", "transformers", "peft"),
            "machine": machine(),
            "dtype": config.dtype,
        }
        part = path.with_suffix(".part")
        part.write_text(json.dumps(kept) + "\n")
        part.rename(path)
        print(*table({name: cell}), flush=True)
    print(*table(kept["cells"]), sep="\n")


if __name__ == "__main__":
    main()
