"""What the experiments share beside their records: arguments, training step by step, pictures."""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import PreTrainedTokenizerBase, get_scheduler

from reftune import options
from reftune.data import Collator, TokenDataset
from reftune.errors import DataError, ReftConfigError, ReftuneError, RunError, RunInterrupted
from reftune.layers import find_layer_list
from reftune.models import load_model
from reftune.prompts import Encoded
from reftune.train import TrainSettings, shortcuts

from .records import DivergedError, without_fresh

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "claims"
COLOURS = ("#1f6f8b", "#c98b2b", "#7a9e3c", "#a63d57", "#5c4b8a", "#4d4d4d")


# --- the command line -----------------------------------------------------------------------------


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the arguments that every experiment has; `name` is its results'."""
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # `quick` and `command_line` look for options by their whole names
    )
    parser.set_defaults(name=name)
    parser.add_argument("--model", default="smollm2-135m", help="name, directory or Hub id")
    parser.add_argument("--data-dir", type=Path, help="folder of data that the docstring names")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON and PNG")
    parser.add_argument("--quick", action="store_true", help="smallest grid, to see that it works")
    parser.add_argument("--fresh", action="store_true", help="forget the results in --out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="base model's weights"
    )
    return parser


def command_line(main: Callable[[Sequence[str] | None], Any]) -> None:
    """Run an experiment from a shell: errors as a sentence, Ctrl-C as advice."""
    leave_out = without_fresh("--fresh" in sys.argv)
    try:
        main(None)
    except RunInterrupted as error:
        raise SystemExit(f"\n{error}{leave_out}") from None
    except ReftuneError as error:
        raise SystemExit(f"Error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(f"\nInterrupted; the same command goes on from here.{leave_out}") from None


def start(args: argparse.Namespace) -> None:
    """Set what all experiments set before they compute."""
    # PEFT 0.21 asks a model for a property that transformers 5 deprecates.
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
    torch.set_num_threads(args.threads)


def data_file(args: argparse.Namespace, *names: str) -> Path:
    """Return the first of these files that is below `--data-dir`. Raises DataError."""
    for name in names if args.data_dir else ():
        if (args.data_dir / name).is_file():
            return Path(args.data_dir / name)
    given = f"{args.data_dir} has none" if args.data_dir else "no --data-dir was given"
    raise DataError(f"This experiment reads {' or '.join(names)}, and {given}. Give the folder.")


def quick(args: argparse.Namespace, **smaller: Any) -> None:
    """Make values smaller under `--quick`, unless they were given on the command line."""
    given = {part.partition("=")[0] for part in args.argv if part.startswith("--")}
    for name, value in smaller.items():
        if args.quick and f"--{name.replace('_', '-')}" not in given:
            setattr(args, name, value)


def arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments, with the command line as it was in `argv`."""
    args = parser.parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    return args


# --- models and training --------------------------------------------------------------------------


def load(args: argparse.Namespace) -> tuple[Any, PreTrainedTokenizerBase]:
    """Return the model, on a GPU where there is one, and its tokenizer."""
    device = "cuda" if torch.cuda.is_available() else None
    model, tokenizer = load_model(args.model, args.dtype, device)
    model.eval()  # type: ignore[no-untyped-call] # transformers'
    return model, tokenizer


def depth(model: nn.Module) -> int:
    """Return how many layers a model has."""
    layers = model.get_submodule(find_layer_list(model))
    assert isinstance(layers, nn.ModuleList)
    return len(layers)


def spread(num_layers: int, step: int = 5) -> list[int]:
    """Return every `step`-th layer from 0, and the last."""
    return sorted({*range(0, num_layers, step), num_layers - 1})


def check_layers(layers: Sequence[int], num_layers: int) -> list[int]:
    """Return layers that exist. Raises ReftConfigError for others."""
    if wrong := [n for n in layers if not 0 <= n < num_layers]:
        raise ReftConfigError(f"--layers has {wrong}; the model has layers 0 to {num_layers - 1}.")
    return list(layers)


@contextmanager
def attached(model: Any, config: PeftConfig, seed: int) -> Iterator[Any]:
    """Attach a fresh adapter to a model in a block."""
    torch.manual_seed(seed)
    adapted = get_peft_model(model, config)
    try:
        yield adapted
    finally:
        adapted.unload()


@dataclass(frozen=True)
class Batch:
    """Examples of a batch by number, and the subspaces that are on for them (None: all rows)."""

    rows: Sequence[int]
    subspaces: Sequence[str] | None = None


def shuffled(count: int, size: int, epochs: int, generator: torch.Generator) -> list[list[int]]:
    """Return batches of `size` of the numbers below `count`, in a new order in each epoch."""
    batches = []
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator).tolist()
        batches += [order[at : at + size] for at in range(0, count, size)]
    return batches


def train(
    model: Any,
    data: TokenDataset,
    steps: Sequence[Sequence[Batch]],
    learning_rate: float,
    pad_token_id: int,
    *,
    stop: Callable[[int, float], bool] = lambda step, loss: False,
) -> list[float]:
    """Train an adapter with AdamW, linearly to a rate of 0; return the loss of each step made.

    A step is the mean of its batches' gradients. `stop(step, loss)` ends training early. The
    shortcuts are those of `reftune.train.fit`: what the adapter cannot change is computed once.
    Raises DivergedError for a loss that is not finite.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = get_scheduler("linear", optimizer, 0, len(steps))
    epochs = sum(len(batch.rows) for step in steps for batch in step) / len(data)
    settings = TrainSettings.model_validate(
        {"epochs": max(epochs, 1e-6), "batch_size": len(steps[0][0].rows)}
    )
    losses: list[float] = []
    model.train()
    with (
        tempfile.TemporaryDirectory() as folder,
        shortcuts(model, data, Collator(pad_token_id), settings, Path(folder)) as short,
    ):
        for number, batches in enumerate(steps, 1):
            total = 0.0
            for batch in batches:
                inputs = short.collate([data[i] for i in batch.rows])
                inputs = short.before(to_device(inputs, model.device))
                with options(subspaces=batch.subspaces) if batch.subspaces else nullcontext():
                    loss = model(**inputs).loss / len(batches)
                short.after()
                loss.backward()
                total += loss.item()
            if not math.isfinite(total):
                break
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(total)
            if stop(number, total):
                break
    model.eval()
    # Not before the shortcuts have ended: other cells are measured with this model.
    if not math.isfinite(total):
        raise DivergedError(f"the loss is {total} at step {number}")
    return losses


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a batch with its tensors on a device."""
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def encoded(prompt: Sequence[int], completion: Sequence[int]) -> Encoded:
    """Return an example of given tokens, without an end of sequence."""
    return Encoded([*prompt, *completion], len(prompt))


# --- pictures -------------------------------------------------------------------------------------


@contextmanager
def drawing(target: Path, columns: int = 1, width: float = 6.0) -> Iterator[list[Any]]:
    """Yield axes side by side, of one height; what a block draws is written to an image file."""
    try:
        import matplotlib
    except ImportError as error:
        raise RunError("Plots need matplotlib: pip install 'reftune[plots]'.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, columns, figsize=(width * columns, 4.2), layout="constrained", squeeze=False, sharey=True
    )
    try:
        yield list(axes[0])
        part = target.with_name(f".{target.stem}.part.png")
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(part, dpi=120)
        os.replace(part, target)
    finally:
        pyplot.close(figure)


def shades(count: int) -> list[Any]:
    """Return colours from light to dark, for lines that are in an order."""
    from matplotlib import colormaps

    return [colormaps["viridis_r"](0.1 + 0.85 * i / max(count - 1, 1)) for i in range(count)]
