"""How do time and peak memory of a training step grow? One factor at a time around a default.

    python benchmarks/scaling.py [--rounds 3] [--factors layers rank ...] [--threads 2]

factors  layers     how many are edited, the last ones: below the first one nothing has a gradient
         rank       of the edit
         positions  which tokens of the prompt are edited
         length     tokens of an example; three quarters are its prompt
         batch      examples in a batch
         examples   in the data set, of which each run takes the same number of steps
         width      d, of the hidden states

Each point trains a random Llama by `reftune.train.fit` in a process of its own, and gives the
median of its steps after the first ones, the peak of memory over what the model takes, and the
seconds until the first step has ended. Every round is written as it is measured, and kept: a run
that was interrupted goes on. A PNG beside the JSON has a panel for each factor.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import multiprocessing
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import Record, Round, in_turn, median_of, table, versions
from training_peers.report import machine

HERE = Path(__file__).resolve().parent
LAYERS, VOCABULARY, HEADS = 6, 4096, 4
FIRST_STEPS, STEPS = 3, 8
NUMBERS = ("milliseconds", "mebibytes", "first_step_seconds")
PROPORTIONAL = ("layers", "length", "batch", "width")  # drawn so that linear growth is straight
TIME, MEMORY = "#1f6f8b", "#c98b2b"


@dataclass(frozen=True)
class Point:
    """One training run; the defaults are what every factor is varied around."""

    layers: int = LAYERS
    rank: int = 8
    positions: str = "f7+l7"
    length: int = 128
    batch: int = 8
    examples: int = 1000
    width: int = 256


DEFAULT = Point()
FACTORS: Mapping[str, Sequence[Any]] = {
    "layers": (1, 2, 4, LAYERS),
    "rank": (1, 2, 8, 32, 128),
    "positions": ("l1", "f3+l3", "f7+l7", "f20+l20", "all"),
    "length": (32, 64, 128, 256, 512),
    "batch": (1, 2, 4, 8, 16, 32),
    "examples": (100, 1000, 10_000, 100_000),
    "width": (64, 128, 256, 384, 512),
}


def points_of(factors: Sequence[str]) -> dict[str, Point]:
    """Return the points of some factors by name; the default is in all of them, once."""
    points = {}
    for factor in factors:
        for value in FACTORS[factor]:
            points[name_of(factor, value)] = dataclasses.replace(DEFAULT, **{factor: value})
    return points


def name_of(factor: str, value: Any) -> str:
    """Return the name of a point in the results: "rank=4", or "default"."""
    return "default" if value == getattr(DEFAULT, factor) else f"{factor}={value}"


def measure(point: Point, threads: int, device: str) -> Round:
    """Train in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["reftune.train"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_here, args=(point, threads, device, sender))
    process.start()
    sender.close()
    try:
        numbers: Round = receiver.recv()
    except EOFError:
        raise SystemExit(f"{point} ended without a result; see above") from None
    finally:
        process.join()
    return numbers


def _measure_here(point: Point, threads: int, device: str, sender: Any) -> None:
    import torch
    from transformers.utils import logging

    from reftune.train import TrainSettings, fit

    # PEFT 0.21 asks a model for a property that transformers 5 deprecates.
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
    logging.set_verbosity_error()
    torch.set_num_threads(threads)
    data, model = _data(point), _model(point, device)
    settings = TrainSettings(
        max_steps=FIRST_STEPS + STEPS,
        batch_size=point.batch,
        gradient_accumulation_steps=1,
        warmup_ratio=0.0,
        device="cpu" if device == "cpu" else "auto",
    )
    times: dict[int, float] = {}

    def note(progress: Any) -> None:
        if device != "cpu":
            torch.cuda.synchronize()
        times.setdefault(progress.step, time.perf_counter())

    memory = _Memory(device)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        from reftune.data import Collator

        fit(model, data, None, Collator(0), settings, Path(folder), seed=0, on_progress=note)
        peak = memory.peak()
    steps = [times[n + 1] - times[n] for n in range(FIRST_STEPS, FIRST_STEPS + STEPS)]
    numbers = (1e3 * statistics.median(steps), peak / 2**20, times[1] - begun)
    sender.send({name: round(n, 4) for name, n in zip(NUMBERS, numbers, strict=True)})


def _data(point: Point) -> Any:
    import torch

    from reftune.data import TokenDataset
    from reftune.prompts import Encoded

    generator = torch.Generator().manual_seed(0)
    shape = (point.examples, point.length)
    ids = torch.randint(1, VOCABULARY, shape, generator=generator).tolist()
    return TokenDataset([Encoded(row, point.length * 3 // 4) for row in ids])


def _model(point: Point, device: str) -> Any:
    import torch
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from reftune import ReftConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=point.width,
        intermediate_size=4 * point.width,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
    )
    reft = ReftConfig(
        r=min(point.rank, point.width),
        positions=point.positions,
        layers=list(range(LAYERS - point.layers, LAYERS)),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(LlamaForCausalLM(config).to(device), reft)


class _Memory:
    """Peak memory from now on over what is held now, in bytes: of the GPU, or of the process."""

    def __init__(self, device: str) -> None:
        import torch

        self._cuda = torch.cuda if device != "cpu" else None
        if self._cuda is not None:
            self._cuda.reset_peak_memory_stats()
            self._before = self._cuda.memory_allocated()
        else:
            # What was freed before is given back first: reused, it would not count. Then the peak
            # is set to what is held now. Both of Linux alone.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _status("VmRSS")

    def peak(self) -> int:
        now = _status("VmHWM") if self._cuda is None else int(self._cuda.max_memory_allocated())
        return now - self._before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def summarise(cells: Mapping[str, Sequence[Round]]) -> dict[str, dict[str, float]]:
    """Return the medians over the rounds of each point."""
    return {
        point: {name: median_of(rounds, name) for name in NUMBERS}
        for point, rounds in cells.items()
    }


def curves(
    summary: Mapping[str, Mapping[str, float]], factors: Sequence[str]
) -> dict[str, list[tuple[Any, Mapping[str, float]]]]:
    """Return, per factor, its values that were measured and their numbers."""
    found = {}
    for factor in factors:
        named = [(value, name_of(factor, value)) for value in FACTORS[factor]]
        found[factor] = [(value, summary[name]) for value, name in named if name in summary]
    return found


def plot(summary: Mapping[str, Mapping[str, float]], factors: Sequence[str], path: Path) -> None:
    """Draw a panel for each factor, and one that says what the default is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(4, len(factors) + 1)
    rows = -(-(len(factors) + 1) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(3.4 * columns, 2.8 * rows), layout="constrained", squeeze=False
    )
    panels = axes.flatten().tolist()
    for factor, axis in zip(factors, panels, strict=False):
        _panel(axis, factor, curves(summary, [factor])[factor])
    for axis in panels[len(factors) :]:
        axis.axis("off")
    lines = [f"{f.name} {f.default}" for f in dataclasses.fields(Point)]
    about = panels[len(factors)]
    about.text(0, 0.95, "default (dotted)", va="top", weight="bold")
    about.text(0, 0.83, "\n".join(lines), va="top")
    about.text(0, 0.17, "milliseconds per step", color=TIME, va="top")
    about.text(0, 0.06, "peak MiB over the model", color=MEMORY, va="top")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _panel(axis: Any, factor: str, curve: Sequence[tuple[Any, Mapping[str, float]]]) -> None:
    values = [value for value, _ in curve]
    at = values if factor in PROPORTIONAL else list(range(len(values)))
    second = axis.twinx()
    for one, name, colour, marker in (
        (axis, "milliseconds", TIME, "o"),
        (second, "mebibytes", MEMORY, "s"),
    ):
        heights = [numbers[name] for _, numbers in curve]
        one.plot(at, heights, color=colour, marker=marker, ms=4)
        one.set_ylim(0, 1.15 * max(heights, default=1))
        one.tick_params(axis="y", colors=colour)
    if getattr(DEFAULT, factor) in values:
        axis.axvline(at[values.index(getattr(DEFAULT, factor))], color="0.6", ls=":", lw=1)
    if factor not in PROPORTIONAL:
        labels = [f"{value:,}" if type(value) is int else value for value in values]
        axis.set_xticks(at, labels)
    axis.set_title(factor)
    axis.grid(alpha=0.25)


def report(summary: Mapping[str, Mapping[str, float]], factors: Sequence[str]) -> str:
    """Return the numbers of each factor for reading."""
    parts = []
    for factor, curve in curves(summary, factors).items():
        rows = [
            (str(value), *(f"{numbers[name]:.1f}" for name in NUMBERS)) for value, numbers in curve
        ]
        parts.append(table((factor, "ms/step", "peak MiB", "first step s"), rows))
    return "\n\n".join(parts)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--factors", nargs="+", default=list(FACTORS), choices=list(FACTORS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "scaling-cpu.json")
    parser.add_argument("--fresh", action="store_true", help="forget the results in --out")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    head = {
        "settings": {
            "default": dataclasses.asdict(DEFAULT),
            "model": {"layers": LAYERS, "vocabulary": VOCABULARY, "heads": HEADS},
            "threads": args.threads,
            "device": args.device,
        },
        "versions": {"python": platform.python_version()}
        | versions("torch", "transformers", "peft"),
        "machine": machine(),
    }
    record = Record(args.out, head, fresh=args.fresh)
    points = points_of(args.factors)
    for n in range(args.rounds):
        for name in in_turn(list(points), n):
            if record.missing(name, NUMBERS, n + 1):
                numbers = measure(points[name], args.threads, args.device)
                record.add(name, numbers, lambda: summarise(record.cells))
                print(f"round {n + 1}, {name}: {numbers['milliseconds']:.1f} ms", flush=True)
    summary = summarise(record.cells)
    plot(summary, args.factors, args.out.with_suffix(".png"))
    print(report(summary, args.factors))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
