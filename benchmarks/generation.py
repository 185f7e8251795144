"""How fast is `generate` with an adapter? reftune, pyreft and PEFT LoRA against the bare model.

    python benchmarks/generation.py [--cells 'b1-*' mixed-n16 startup] [--rounds 5] [--threads 2]
        [--pyreft-python PY --pyreft-checkout DIR --pyvene-checkout DIR] [--device cuda]

cells  bB-nN     batches of B prompts of about 60 tokens, N new tokens each: LoReFT as in the paper
                 (r 8, f7+l7, all layers), pyreft's with the same numbers, LoRA (r 32 on q, k, v, up
                 and down), unmerged and merged
       mixed-nN  32 prompts, K different adapters (`adapter_names`): reftune and LoRA, K = 1, 8, 32
       startup   fresh processes: `import reftune` against `import peft`, and `reftune --help`

Greedy, with as many new tokens as asked for (no end of sequence). Arms take turns within a round,
forward and backward; ratios are taken within rounds, and their medians reported. pyreft runs in a
process of its own, in its environment, and times itself; it is left out where none is given. Before
anything is timed each arm is checked to generate the right thing.

Every round is written as it is measured, and kept: a run that was interrupted goes on. The last
line of the output is the summary as JSON.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import platform
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from generation_arms import MIXED, STARTUP, Arms, Cell, check
from measure import (
    Record,
    Round,
    measure_in_turns,
    median_of,
    median_ratio,
    table,
    versions,
)
from training_peers.report import commit_of, machine

HERE = Path(__file__).resolve().parent


def cells_of(
    batches: Sequence[int],
    new_tokens: Sequence[int],
    adapters: Sequence[int],
    wanted: Sequence[str],
    pyreft: bool,
) -> dict[str, Cell]:
    """Return the cells whose names match one of `wanted`, the quick ones first."""
    single = ("bare", "reftune", *(["pyreft"] if pyreft else []), "lora", "lora merged")
    mixed = tuple(f"{kind} x{k}" for kind in ("reftune", "lora") for k in adapters)
    cells = {"startup": Cell(tuple(STARTUP))}
    for n in sorted(new_tokens):
        cells |= {f"b{B}-n{n}": Cell(single, B, n) for B in sorted(batches)}
        cells[f"mixed-n{n}"] = Cell(("bare", *mixed), MIXED, n)
    found = {
        name: cell
        for name, cell in cells.items()
        if any(fnmatch.fnmatch(name, pattern) for pattern in wanted)
    }
    if not found:
        raise SystemExit(f"--cells {' '.join(wanted)}: there are {', '.join(cells)}")
    return found


def summarise(cells: Mapping[str, Sequence[Round]]) -> dict[str, dict[str, Any]]:
    """Return, per cell and arm, medians over the rounds and of the ratios within rounds."""
    return {
        name: {arm: row_of(rounds, arm, name) for arm in rounds[0]}
        for name, rounds in cells.items()
    }


def row_of(rounds: Sequence[Round], arm: str, name: str) -> dict[str, float]:
    """Return an arm's medians; `of_first` is its speed (startup: its time) over the first's."""
    first = next(iter(rounds[0]))
    seconds = median_of(rounds, arm)
    row: dict[str, float] = {"seconds": seconds, "rounds": len(rounds)}
    if name == "startup":
        return row | {"of_first": median_ratio(rounds, arm, first)}
    size, new = name.split("-n")
    batch = MIXED if size == "mixed" else int(size.removeprefix("b"))
    row["tokens_per_second"] = batch * int(new) / seconds
    return row | {"of_first": median_ratio(rounds, first, arm)}


def report(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the summary for reading."""
    parts = []
    for name, arms in summary.items():
        rate = name != "startup"
        head = (name, "seconds", "tokens/s" if rate else "", f"of {next(iter(arms))}")
        rows = [
            (
                arm,
                f"{row['seconds']:.3f}",
                f"{row['tokens_per_second']:.1f}" if rate else "",
                f"{row['of_first']:.3f}",
            )
            for arm, row in arms.items()
        ]
        parts.append(table(head, rows))
    return "\n\n".join(parts)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="name or directory")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cells", nargs="+", default=["*"], help="names, * is anything")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[16, 256])
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8, 32], help="K of mixed")
    parser.add_argument("--pyreft-python")
    parser.add_argument("--pyreft-checkout", type=Path)
    parser.add_argument("--pyvene-checkout", type=Path)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "generation-cpu.json")
    parser.add_argument("--fresh", action="store_true", help="forget the results in --out")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    # PEFT 0.21 asks a model for a property that transformers 5 deprecates.
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
    torch.set_num_threads(args.threads)
    pyreft = bool(args.pyreft_python and args.pyreft_checkout and args.pyvene_checkout)
    cells = cells_of(args.batches, args.new_tokens, args.adapters, args.cells, pyreft)
    head = {
        "settings": {name: getattr(args, name) for name in ("model", "dtype", "device", "threads")},
        "versions": {"python": platform.python_version()}
        | versions("torch", "transformers", "peft"),
        "machine": machine(),
    }
    if args.device != "cpu":
        head["machine"]["gpu"] = torch.cuda.get_device_name()
    record = Record(args.out, head, fresh=args.fresh)
    with tempfile.TemporaryDirectory() as folder:
        arms = Arms(args, cells, Path(folder))
        names = {arm for cell in cells.values() if cell.batch for arm in cell.arms}
        checks = check(arms, sorted(names), args.dtype) if names else {}
        record.head["checks"] = checks
        record.head["pyreft"] = {
            n: commit_of(getattr(args, f"{n}_checkout")) for n in ("pyreft", "pyvene")
        }
        for name, passed in checks.items():
            print(f"{'ok    ' if passed else 'FAILED'} {name}", flush=True)
        if not all(checks.values()):
            raise SystemExit("an arm does not generate what it should: nothing is timed")
        turns = {name: cell.arms for name, cell in cells.items()}
        measure_in_turns(record, turns, args.rounds, arms.measure, lambda: summarise(record.cells))
        if arms.pyreft is not None:
            arms.pyreft.close()
    summary = summarise(record.cells)
    print(report(summary))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
