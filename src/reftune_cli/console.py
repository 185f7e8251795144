"""What the verbs print: progress bars, tables, replies side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from reftune import evaluate
from reftune.callbacks import Progress as Training
from reftune.card import format_score
from reftune.checkpoint import WEIGHTS, read_shapes
from reftune.config import ReftConfig
from reftune.errors import RunError
from reftune.generate import HFEngine, Sampling
from reftune.methods import (
    WEIGHT_METHODS,
    WEIGHTS_CONFIG,
    WEIGHTS_FILE,
    as_base,
    read_weights_config,
)
from reftune.prompts import encode_prompt
from reftune.run import (
    Loaded,
    find_adapter,
    load_adapter,
    template_of,
)
from reftune.settings import RunConfig, describe
from reftune.tasks import get_task

# What is piped into a file or another program is not broken at 80 columns.
out = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 160)


class ConsoleReporter:
    """Show a run's progress as bars; a context, so that the bars end cleanly."""

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(compact=True),
            console=out,
        )
        self._tasks: dict[str, TaskID] = {}
        self._tenths: dict[str, int] = {}

    def __enter__(self) -> ConsoleReporter:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        out.print(escape(text))

    def training(self, progress: Training) -> None:
        """Move the training bar: loss, learning rate, tokens per second, time left."""
        if not (progress.logged or out.is_terminal):
            return  # the log of this step comes next
        parts = []
        if progress.loss is not None:
            parts.append(f"loss {progress.loss:.4f}")
        if progress.learning_rate is not None:
            parts.append(f"lr {progress.learning_rate:.2e}")
        parts.append(f"{progress.tokens_per_second:,.0f} tokens/s")
        self._move("training", progress.step, progress.total_steps, "  ".join(parts))

    def evaluating(self, what: str, done: int, total: int) -> None:
        """Move an evaluation's bar."""
        self._move(what, done, total, "examples")

    def _move(self, what: str, done: int, total: int, note: str) -> None:
        if not out.is_terminal:  # a log file gets a line for each tenth
            tenth = 10 * done // max(total, 1)
            if self._tenths.get(what, 0) != tenth:
                self._tenths[what] = tenth
                out.print(f"{escape(what)}: {done}/{total}  {note}")
            return
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(escape(what), total=total, note=note)
        self._bars.update(self._tasks[what], completed=done, total=total, note=note)


def show_results(config: RunConfig, results: Mapping[str, Any]) -> None:
    """Print what a run came to, with replies of base and adapter side by side."""
    trained = results["train"]
    out.print(
        f"\nTrained {results['parameters']:,} parameters in {trained['steps']} steps, "
        f"{trained['seconds']:.0f} s ({trained['tokens_per_second']:,.0f} tokens/s), "
        f"mean loss {trained['loss']:.4f}"
    )
    out.print(
        f"Shortcuts that were exact and worth it: {', '.join(trained['shortcuts']) or 'none'}"
    )
    if "heldout" in results:
        held = results["heldout"]
        out.print(
            f"Held-out loss on {held['n']} examples: base {held['base']:.4f}, "
            f"adapter {held['adapter']:.4f}"
        )
    show_scores(results["tasks"])
    for task in results["tasks"]:
        show_samples(config, task)
    out.print(f"\nEverything is in {config.directory}")


def show_scores(tasks: Mapping[str, Any], notes: Sequence[str] = ()) -> None:
    """Print scores in per cent, with their standard errors, and below them notes, each a line."""
    if not tasks:
        return
    metrics = {score["metric"] for scores in tasks.values() for score in scores.values()}
    title = f"{', '.join(sorted(metrics))}, % (± standard error)"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    whos = list(dict.fromkeys(who for scores in tasks.values() for who in scores))
    table.add_column("task")
    for name in ("examples", *whos):
        table.add_column(escape(name), justify="right")
    for name, scores in tasks.items():
        n = max(score["n"] for score in scores.values())
        table.add_row(name, str(n), *(format_score(scores.get(who)) for who in whos))
    out.print(table)
    for note in notes:
        out.print(escape(note), soft_wrap=True)


def show_samples(config: RunConfig, task: str) -> None:
    """Print the first replies of base and adapter to the same prompts."""
    folder = config.directory / "samples"
    if not config.evaluate.show or not (folder / "base" / f"{task}.jsonl").is_file():
        return
    base, ours = (
        evaluate.read_samples(folder / who / f"{task}.jsonl") for who in ("base", "adapter")
    )
    table = Table(box=box.ROUNDED, show_lines=True, title=f"{task}: held-out prompts")
    for name in ("prompt", "base", "adapter"):
        table.add_column(name, ratio=1)
    wanted = config.evaluate
    example = get_task(task, config.data.data_dir, wanted.split, wanted.limit).example
    replies = {sample.index: sample for sample in ours}
    both = [(one, replies[one.index]) for one in base if one.index in replies]
    for one, other in both[: config.evaluate.show]:
        prompt = example(one.index).prompt
        text = prompt if isinstance(prompt, str) else one.prompt
        table.add_row(*(escape(_shorten(t)) for t in (text, one.completion, other.completion)))
    out.print(table)


def _shorten(text: str, length: int = 240) -> str:
    text = text.strip()
    return text if len(text) <= length else f"{text[:length]}…"


def generate_replies(
    adapter: str,
    prompts: Sequence[str],
    sampling: Sampling,
    template: str | None,
    compare: bool,
    model: str | None,
    dtype: str,
) -> None:
    """Print a reply to each prompt; see the verb `generate`."""
    loaded = load_adapter(adapter, base=model, dtype=dtype)
    name = template or template_of(find_adapter(adapter))
    ids = [encode_prompt(prompt, loaded.tokenizer, name) for prompt in prompts]  # type: ignore[arg-type]
    engine = HFEngine(loaded.model, loaded.tokenizer)
    replies = [c.text.strip() for c in engine.generate(ids, sampling)]
    if not compare:
        for reply in replies:
            out.print(escape(reply), soft_wrap=True)
        return
    with as_base(loaded.model):
        plain = [c.text.strip() for c in engine.generate(ids, sampling)]
    table = Table(box=box.ROUNDED, show_lines=True)
    for column in ("prompt", "base", "adapter"):
        table.add_column(column, ratio=1)
    for row in zip(prompts, plain, replies, strict=True):
        table.add_row(*(escape(cell) for cell in row))
    out.print(table)


def show_info(adapter: str) -> None:
    """Print what an adapter is, from its config and the header of its weights alone."""
    import peft

    where = find_adapter(adapter)
    weights = where / WEIGHTS
    if (where / WEIGHTS_CONFIG).is_file():
        weights = where / WEIGHTS_FILE
        rows: dict[str, Any] = dict(read_weights_config(where))
        rows["what is trained"] = WEIGHT_METHODS[rows["method"]]
    else:
        try:
            config = peft.PeftConfig.from_pretrained(str(where))
        except ValueError as error:
            raise RunError(f"{adapter!r} is no adapter: {error}") from error
        rows = _reft_rows(config) if isinstance(config, ReftConfig) else _peft_rows(config)
    if weights.is_file():
        shapes = read_shapes(weights)
        count = sum(_product(shape) for shape in shapes.values())
        edited = {key.partition(".reft.")[0] for key in shapes if ".reft." in key}
        rows["edited layers"] = len(edited) or None
        rows["parameters"] = f"{count:,} in {weights.stat().st_size:,} bytes"
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, escape(str(value)))
    out.print(table)


def _peft_rows(config: Any) -> dict[str, Any]:
    """Return what PEFT's config of an adapter that is no ReFT says."""
    method = str(config.peft_type.value).lower()
    left_out = ("peft_type", "base_model_name_or_path", "inference_mode", "peft_version")
    own = {k: v for k, v in config.to_dict().items() if k not in left_out and v not in (None, {})}
    return {"base model": config.base_model_name_or_path, "method": f"{method} (PEFT's)"} | own


def _reft_rows(config: ReftConfig) -> dict[str, Any]:
    """Return what an adapter's config says, by what it is called in the paper."""
    return {
        "base model": config.base_model_name_or_path,
        "base model's revision": config.revision,
        "method": f"{config.method}: {(config.intervention.__doc__ or '').splitlines()[0]}",
        "rank": config.r,
        "layers": config.layers,
        "positions": f"{config.positions} of the prompt, tied: {config.tied}",
        "subspaces": config.subspaces,
        "dropout": config.dropout or None,
        "activation": config.act_fn,
        "also trained": config.modules_to_save,
    }


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def show_config_keys() -> None:
    """Print every key of a run's YAML."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("key", "type", "default", "meaning"):
        table.add_column(name, overflow="fold")
    for row in describe():
        table.add_row(*(escape(cell) for cell in row))
    out.print(table)


def show_schema() -> None:
    """Print the JSON schema of a run's YAML."""
    print(json.dumps(RunConfig.model_json_schema(), indent=2))


__all__ = ["ConsoleReporter", "Loaded"]
