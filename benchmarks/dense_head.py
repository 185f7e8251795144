"""How long does a batch's first token take with dense states for the head, and with a slice?

transformers computes logits of the last position alone: its head is given a slice of the states.
torch multiplies that by a frozen weight row by row, as a batched product, for which oneDNN has no
fast kernel in bfloat16. `HFEngine` copies the slice first. The arms are `HFEngine.generate` as it
is, and without that copy; the model is frozen, as an adapter's base is.

    python benchmarks/dense_head.py [--rows 1 16] [--rounds 3] [--out FILE]
"""

from __future__ import annotations

import argparse
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import PreTrainedTokenizerBase

from measure import Record, measure_in_turns, median_of, median_ratio, table, versions
from reftune import decoding
from reftune.generate import HFEngine, Sampling
from reftune.models import load_model
from training_peers.report import machine

OUT = Path(__file__).parent / "results" / "dense-head-cpu.json"
ARMS = ("dense", "slice")


def seconds(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: int, arm: str, tokens: int
) -> float:
    """Return the seconds that the first token of `rows` prompts takes."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(model.config.vocab_size, (rows, tokens), generator=generator).tolist()
    engine = HFEngine(model, tokenizer, batch_size=rows)
    without = mock.patch.object(decoding, "_half_head_on_cpu", return_value=None)
    with without if arm == "slice" else nullcontext():
        start = time.perf_counter()
        engine.generate(prompts, Sampling(max_new_tokens=1))
        return time.perf_counter() - start


def main() -> None:
    """Measure what is missing, write it and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--fresh", action="store_true", help="forget the results in --out")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
    torch.set_num_threads(args.threads)
    head = {
        "model": args.model,
        "prompt": args.prompt,
        "threads": args.threads,
        "versions": versions("torch", "transformers", "reftune"),
        "machine": machine() | {"instructions": torch.backends.cpu.get_cpu_capability()},
    }
    record = Record(args.out, head, fresh=args.fresh)
    cells = {f"{dtype}, {rows} rows": ARMS for dtype in args.dtypes for rows in args.rows}
    loaded = {dtype: load_model(args.model, dtype) for dtype in args.dtypes}
    for model, tokenizer in loaded.values():
        model.requires_grad_(False)
        seconds(model, tokenizer, 1, "dense", args.prompt)  # what is done once is not counted

    def measure(cell: str, arm: str) -> float:
        dtype, rows = cell.removesuffix(" rows").split(", ")
        return seconds(*loaded[dtype], int(rows), arm, args.prompt)

    def summary() -> dict[str, float]:
        ratios = {cell: median_ratio(r, "slice", "dense") for cell, r in record.cells.items()}
        return {cell: round(ratio, 2) for cell, ratio in ratios.items()}

    measure_in_turns(record, cells, args.rounds, measure, summary)
    ratios = summary()
    rows = [
        [cell, *(f"{median_of(record.cells[cell], arm):.3f}" for arm in ARMS), f"{ratios[cell]}"]
        for cell in cells
    ]
    print(table(["first token, s", *ARMS, "slice / dense"], rows))


if __name__ == "__main__":
    main()
