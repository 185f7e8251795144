"""How much comes from choosing layers, and how much from choosing positions?

    python -m experiments.ablate --data-dir DATA [--epochs 3] [--quick]
    reftune report runs/ablate

PEFT's maintainer asked the authors for this (huggingface/peft, issue 1654); the paper (Wu et al.
2024) tunes both (appendix D), and says that several positions beat one and that tying them can
help, without a table. LoReFT on {one middle layer, four, all} times {l1, f1+l1, f7+l7, all prompt
tokens}: at the same rank, and at the same number of parameters (fewer layers with a higher rank;
positions share their parameters, so that they cost none). Beside it LoRA with as many parameters,
and the base model. The task is one that a small model learns: the type of a question, TREC, written
as a word. DATA holds classification/TREC.{train,test}.all.jsonl.

The cells are an experiment of reftune's (`reftune experiment`), which this file writes, runs and
draws; a finished cell is not run again (--fresh forgets them all). --learning-rate is that of all
cells with as many parameters as --rank on all layers, --few-learning-rate that of those with fewer:
on TREC's held-out rows the former learn well at 1e-3 whichever layers have them, the latter at 1e-2
(benchmarks/results). Tune learning rates with --split validation, never on the test set. Results
are means over --seeds: give all of them at once, or more of them later.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig

from reftune.cells import CELLS, run_cells
from reftune.errors import DataError, RunError
from reftune.experiment import Experiment, load_experiment
from reftune.models import resolve
from reftune.run import RESULTS, Silent

from .common import COLOURS, arguments, command_line, drawing, parser, quick, start
from .records import Numbers, Record, machine, without_fresh

TASK = "words/trec"
POSITIONS = ("l1", "f1+l1", "f7+l7", "all")
LORA_TARGETS = ("q_proj", "o_proj")


def layer_choices(num_layers: int) -> dict[str, list[int] | str]:
    """Return which layers are edited, by the name of the choice."""
    four = min(4, num_layers)
    return {
        "one": [num_layers // 2],
        "four": sorted({(2 * i + 1) * num_layers // (2 * four) for i in range(four)}),
        "all": "all",
    }


def variants(
    model: str, rank: int, rate: float, few_rate: float, lora_rate: float
) -> dict[str, dict[str, Any]]:
    """Return the experiment's variants: LoReFT's at both kinds of rank, and LoRA.

    `rank` is that of all layers; the parameters are then `num_layers * rank` times those of one.
    `few_rate` is that of `rank` on some of the layers, `rate` that of all other LoReFTs.
    """
    config = AutoConfig.from_pretrained(resolve(model)).get_text_config()
    num_layers = config.num_hidden_layers
    found: dict[str, dict[str, Any]] = {}
    for name, layers in layer_choices(num_layers).items():
        count = num_layers if layers == "all" else len(layers)
        for r in sorted({rank, min(num_layers * rank // count, config.hidden_size)}):
            for positions in POSITIONS:
                found[variant(name, positions, r)] = {
                    "adapter": {"layers": layers, "positions": positions, "r": r},
                    "train": {
                        "learning_rate": few_rate if r == rank and count < num_layers else rate
                    },
                }
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    per_rank = len(LORA_TARGETS) * (config.hidden_size + width)
    budget = rank * (2 * config.hidden_size + 1)
    r = max(1, round(budget / per_rank))
    found["lora"] = {
        "adapter": {
            "method": "lora",
            "r": r,
            "lora_alpha": 2 * r,
            "lora_dropout": 0.0,
            "target_modules": list(LORA_TARGETS),
        },
        "train": {"learning_rate": lora_rate},
    }
    return found


def variant(layers: str, positions: str, rank: int) -> str:
    """Return the name of a variant: letters, digits and _ only."""
    return f"{layers}_{positions.replace('+', '_')}_r{rank}"


def written(args: argparse.Namespace, path: Path) -> dict[str, dict[str, Any]]:
    """Write the experiment's YAML, and return its variants."""
    rates = (args.learning_rate, args.few_learning_rate, args.lora_learning_rate)
    found = variants(args.model, args.rank, *rates)
    if args.quick:
        kept = ("one_l1", "one_all", "all_l1", "all_all", "lora")
        found = {name: v for name, v in found.items() if name.startswith(kept)}
    values = {
        "name": path.stem,
        "model": args.model,
        "dtype": args.dtype,
        "output_dir": str(args.runs),
        "adapter": {"method": "loreft"},
        "data": {
            "train": TASK,
            "data_dir": str(args.data_dir),
            "template": "none",
            "max_length": 256,
            "limit": args.examples,
            "leaks": "drop",
        },
        "train": {
            "epochs": args.epochs,
            "batch_size": 16,
            "gradient_accumulation_steps": 1,
            "save_steps": 1_000_000,
        },
        "evaluate": {
            "tasks": [TASK],
            "split": args.split,
            "limit": args.tests,
            "batch_size": 32,
            "show": 0,
        },
        "methods": found,
        "seeds": args.seeds,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return found


class Saying(Silent):
    """A reporter that prints which cell is run."""

    def say(self, text: str) -> None:
        """Print one fact."""
        print(text, flush=True)


def collect(experiment: Experiment, fresh: bool) -> tuple[dict[str, Numbers], float]:
    """Return the numbers of each variant over its seeds, and the base model's accuracy.

    Raises RunError where a cell failed.
    """
    lines = (experiment.directory / CELLS).read_text(encoding="utf-8").splitlines()
    asked = {cell.name for cell in experiment.cells}  # the file has other seeds', too
    rows = [row for line in lines if (row := json.loads(line))["cell"] in asked]
    if failed := [f"{row['cell']}: {row['error']}" for row in rows if row["status"] != "done"]:
        raise RunError(
            f"{len(failed)} cells are not finished: {'; '.join(failed[:3])}. The same command "
            f"tries them again.{without_fresh(fresh)}"
        )
    found: dict[str, Numbers] = {}
    for name in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == name]
        scores = {str(row["seed"]): row["scores"][TASK] for row in mine}
        found[name] = {
            "accuracy": statistics.mean(scores.values()),
            "of seeds": scores,
            "parameters": mine[0]["parameters"],
            "train_seconds": statistics.mean(row["train_seconds"] for row in mine),
        }
    some = experiment.directory / rows[0]["cell"] / RESULTS
    base = json.loads(some.read_text(encoding="utf-8"))["tasks"][TASK]["base"]["value"]
    return found, base


def machines(experiment: Experiment) -> list[dict[str, Any]]:
    """Return what the cells were run on; this machine too, where some are to be run yet.

    It is kept beside the cells: they may be finished, and given other results files, elsewhere.
    """
    path = experiment.directory / "machines.json"
    found: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
    missing = any(not (cell.config.directory / RESULTS).is_file() for cell in experiment.cells)
    if missing and machine() not in found:
        found.append(machine())
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
    return found


def grids(found: Mapping[str, Numbers], rank: int) -> dict[str, dict[str, dict[str, float]]]:
    """Return accuracy by layers and positions, at equal rank and at equal parameters."""
    cells: dict[str, dict[str, dict[str, float]]] = {"rank": {}, "parameters": {}}
    for layers in ("one", "four", "all"):
        for positions in POSITIONS:
            stem = variant(layers, positions, 0).removesuffix("0")
            ranks = sorted(int(n.removeprefix(stem)) for n in found if n.startswith(stem))
            if ranks:
                assert ranks[0] == rank
                for kind, r in zip(cells, (ranks[0], ranks[-1]), strict=True):
                    accuracy = found[variant(layers, positions, r)]["accuracy"]
                    cells[kind].setdefault(layers, {})[positions] = accuracy
    return cells


def effects(grid: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return the mean accuracy of each choice of layers, and of each of positions."""
    positions = dict.fromkeys(p for row in grid.values() for p in row)
    return {
        "layers": {name: statistics.mean(row.values()) for name, row in grid.items()},
        "positions": {p: statistics.mean(row[p] for row in grid.values()) for p in positions},
    }


def draw(
    target: Path, cells: Mapping[str, Any], lora: float, base: float, args: argparse.Namespace
) -> None:
    """Draw accuracy by positions, a line for each choice of layers, a panel for each kind."""
    titles = {"rank": f"rank {args.rank} everywhere", "parameters": "as many parameters everywhere"}
    with drawing(target, 2, width=5.2) as panels:
        for axes, (kind, grid) in zip(panels, cells.items(), strict=True):
            for colour, (layers, row) in zip(COLOURS, grid.items(), strict=False):
                label = {"one": "one middle layer", "four": "four layers"}.get(layers, "all layers")
                axes.plot(list(row), list(row.values()), "o-", color=colour, label=label)
            axes.axhline(lora, color=COLOURS[3], ls="--", lw=1.2, label="LoRA, as many parameters")
            axes.axhline(base, color="#999999", ls=":", lw=1.2, label="base model")
            axes.set(title=titles[kind], xlabel="edited prompt tokens", ylim=(-0.02, 1.02))
            axes.grid(alpha=0.3)
        panels[0].set_ylabel(f"accuracy, TREC as words, {args.model}")
        panels[0].legend(fontsize="small")


def main(argv: Sequence[str] | None = None) -> Any:
    """Run the cells that are missing; write, draw and print the results."""
    options = parser("ablate", __doc__)
    options.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the cells")
    options.add_argument("--rank", type=int, default=4, help="of LoReFT on all layers")
    options.add_argument("--examples", type=int, default=600)
    options.add_argument("--tests", type=int, default=200)
    options.add_argument("--epochs", type=float, default=3)
    options.add_argument("--learning-rate", type=float, default=1e-3)
    options.add_argument("--few-learning-rate", type=float, default=1e-2)
    options.add_argument("--lora-learning-rate", type=float, default=1e-2)
    options.add_argument("--split", default="test", choices=("test", "validation"))
    options.add_argument("--seeds", type=int, nargs="+", default=[42])
    args = arguments(options, argv)
    start(args)
    quick(args, examples=32, tests=8, epochs=1)
    if args.data_dir is None:
        raise DataError("This experiment reads TREC, and no --data-dir was given. Give the folder.")
    name = "ablate" + ("" if args.split == "test" else "-validation")
    args.name, folder = name, name + ("-quick" if args.quick else "")
    kept = (
        *("model", "dtype", "rank", "examples", "tests", "epochs", "learning_rate"),
        *(
            "few_learning_rate",
            "lora_learning_rate",
            "split",
        ),  # the seeds are the cells': more of them are no others
    )
    record = Record(args, {name: getattr(args, name) for name in kept})
    path = args.runs / f"{folder}.yaml"
    written(args, path)
    experiment = load_experiment(path)
    if args.fresh and (experiment.directory / CELLS).is_file():
        shutil.rmtree(experiment.directory)
    record.machines = machines(experiment)
    run_cells(experiment, reporter=Saying())
    found, base = collect(experiment, args.fresh)
    cells = grids(found, args.rank)
    record.cells = {
        n: numbers | {"seconds": numbers["train_seconds"]} for n, numbers in found.items()
    }
    draw(record.picture, cells, found["lora"]["accuracy"], base, args)
    head = ["", *(p for p in POSITIONS if p in cells["rank"]["all"])]
    rows = [
        [f"{layers}, same {kind}", *(f"{accuracy:.3f}" for accuracy in row.values())]
        for kind, grid in cells.items()
        for layers, row in grid.items()
    ]
    rows += [
        ["LoRA", *[f"{found['lora']['accuracy']:.3f}"] * (len(head) - 1)],
        ["base", *[f"{base:.3f}"] * (len(head) - 1)],
    ]
    means = {kind: effects(grid) for kind, grid in cells.items()}
    return record.finish(
        {"accuracy": cells, "means": means, "lora": found["lora"]["accuracy"], "base": base},
        [head, *rows],
    )


if __name__ == "__main__":
    command_line(main)
