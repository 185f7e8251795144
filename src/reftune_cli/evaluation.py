"""The verb `evaluate`: our tasks with transformers or vLLM, and lm-eval's tasks."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import peft
from rich import box
from rich.markup import escape
from rich.table import Table

from reftune import alpaca_eval, evaluate
from reftune.errors import DataError, ReftConfigError
from reftune.generate import HFEngine
from reftune.records import is_finished
from reftune.run import RESULTS, Reporter, find_adapter, load_adapter, write_text
from reftune.samples import model_of
from reftune.seen import find_seen
from reftune.stored import run_config
from reftune.tasks import Task, get_task
from reftune_cli.chat import load_chat, named_adapter
from reftune_cli.console import out

LM_EVAL_RESULTS = "lm-eval.json"
# What lm-eval says of how it evaluated. `config` is the adapter's, which comes last: only its
# strength and its cache file are not the base's, too.
HOW = ("config", "configs", "n-shot", "n-samples", "versions", "max_length", "lm_eval_version")
LARGEST_CONFIGS = 1_000_000  # characters; a task of few YAMLs has some thousands


def task_names(
    tasks: str | None,
    lm_eval: str | None,
    engine: str,
    how: Mapping[str, Any],
    harness: Sequence[Any] = (),
) -> list[str]:
    """Return the names of the tasks. Raises ReftConfigError for options that do not go together."""
    if (tasks is None) == (lm_eval is None):
        raise ReftConfigError("Give either --tasks or --lm-eval: names with commas between.")
    if engine not in ("hf", "vllm") or (engine == "vllm" and lm_eval is not None):
        raise ReftConfigError(f"--engine is {engine!r}; accepted are hf and, for --tasks, vllm.")
    if lm_eval is not None and list(how.values()) != ["test", "published", None]:
        raise ReftConfigError(
            "--split, --decoding and --max-new-tokens are for --tasks; lm-eval's tasks say "
            "theirs in their YAML (--include-path)."
        )
    if tasks is not None and any(value not in (None, False) for value in harness):
        raise ReftConfigError(
            "--num-fewshot, --chat-template and --include-path are for --lm-eval; the tasks of "
            "--tasks have the prompts of their papers."
        )
    return [name.strip() for name in (tasks or lm_eval or "").split(",")]


@dataclass(frozen=True)
class Request:
    """What the verb `evaluate` was asked for.

    `tasks` are ours or lm-eval's; `folder` is where samples and results are kept, None for nowhere.
    """

    adapters: Sequence[str]
    tasks: Sequence[str]
    data_dir: str | None  # None: that of the first adapter's run, or the current folder
    limit: int | None
    batch_size: int
    base: bool
    folder: Path | None
    model: str | None
    dtype: str
    how: Mapping[str, Any]  # split, decoding and max_new_tokens of `get_task`

    def open_tasks(self) -> list[Task]:
        """Return our tasks with their data: before a model is loaded, since names may be wrong.

        Raises ReftConfigError for a folder with a training run's results, which would be lost.
        """
        if self.folder and is_finished(self.folder):
            raise ReftConfigError(
                f"--out is {self.folder}, whose {RESULTS} is what a training run left there. "
                f"Give another folder, for instance {self.folder}/evaluated."
            )
        return [get_task(n, self.folder_of_data, limit=self.limit, **self.how) for n in self.tasks]

    @cached_property
    def named(self) -> dict[str, str]:
        """Return the adapters by name; a single one is "adapter", unless it was given a name."""
        pairs = list(map(named_adapter, self.adapters))
        if len(pairs) == 1:
            [(name, path)] = pairs
            return {name if path != self.adapters[0] else "adapter": path}
        return dict(pairs)

    @cached_property
    def folder_of_data(self) -> str:
        """Return where the tasks' data is: as the run says that the first adapter is of."""
        if self.data_dir is not None:
            return self.data_dir
        path = Path(next(iter(self.named.values())))
        values = run_config(path) if path.is_dir() else {}
        return str(values.get("data", {}).get("data_dir") or ".")

    def run(
        self, tasks: Sequence[Task], engine: Any, reporter: Reporter, names: Sequence[str]
    ) -> tuple[dict[str, Any], list[str]]:
        """Evaluate the adapters that an engine has under names, or its active one, and keep that.

        Return the results, and notes on questions that adapters were trained on.
        """
        seen, notes = self.look_for_seen(tasks)
        results = evaluate.run_all(
            tasks,
            engine,
            base=self.base,
            samples=self.folder / "samples" if self.folder else None,
            progress=reporter.evaluating,
            adapters=names,
            active=next(iter(self.named)),
        )
        if self.folder:
            alpaca_eval.write_outputs(tasks, results, self.folder / "samples")
            kept, shared = _with_earlier(self.folder, results, seen)
            self.keep(RESULTS, kept, how={"shared_with_training": shared} if shared else None)
        return results, notes

    def look_for_seen(self, tasks: Sequence[Task]) -> tuple[dict[str, dict[str, int]], list[str]]:
        """Return how many questions adapters were trained on, {task: {who: count}}, and notes."""
        whole = tasks
        if self.limit is not None:
            with suppress(DataError):  # of a row that is not evaluated
                split = self.how["split"]
                whole = [get_task(task.name, self.folder_of_data, split) for task in tasks]
        tests = {task.name: [task.example(i) for i in range(task.num_examples)] for task in whole}
        counts = {task.name: task.num_examples for task in tasks}
        return find_seen(self.named, tests, counts)

    def keep(
        self,
        name: str,
        results: Mapping[str, Any],
        default: Callable[[Any], str] | None = None,
        how: Mapping[str, Any] | None = None,
    ) -> None:
        """Write results into the folder, if there is one, and `how` they were got beside them.

        `default` is `json.dumps`'s.
        """
        if self.folder is not None:
            text = json.dumps({"tasks": results, **(how or {})}, indent=2, default=default)
            write_text(self.folder / name, text + "\n")


def _with_earlier(
    folder: Path, results: Mapping[str, Mapping[str, Any]], seen: Mapping[str, Mapping[str, int]]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, int]]]:
    """Return results and what was seen in training, with those of the folder's other evaluations.

    Of other tasks and names, that is; not of a name that is another adapter's now, as samples say.
    """
    path = folder / RESULTS
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def model(who: str, task: str) -> str | None:
        return model_of(folder / "samples" / who / f"{task}.jsonl")

    now = {who: model(who, task) for task, found in results.items() for who in found}
    both = []
    for key, new in (("tasks", results), ("shared_with_training", seen)):
        rows: dict[str, dict[str, Any]] = {}
        for task, found in before.get(key, {}).items():
            stays = {w: v for w, v in found.items() if w not in now or model(w, task) == now[w]}
            rows |= {task: stays} if stays else {}
        for task, found in new.items():
            rows[task] = {**rows.get(task, {}), **found}
        both.append(rows)
    return both[0], both[1]


def evaluate_with_hf(request: Request, reporter: Reporter) -> tuple[dict[str, Any], list[str]]:
    """Evaluate an adapter with transformers; or several of one base model, in one pass."""
    adapters, tasks = request.adapters, request.open_tasks()
    if len(adapters) == 1:
        [path] = request.named.values()
        reporter.say(f"Loading {path}")
        loaded = load_adapter(path, base=request.model, dtype=request.dtype)
        names: Sequence[str] = []
    else:
        _check_one_pass(adapters, request.model)
        reporter.say(f"Loading {', '.join(adapters)}")
        loaded, names, _ = load_chat(adapters, request.model, request.dtype)
    engine = HFEngine(loaded.model, loaded.tokenizer, request.batch_size)
    return request.run(tasks, engine, reporter, names)


def evaluate_with_vllm(request: Request, reporter: Reporter) -> tuple[dict[str, Any], list[str]]:
    """Evaluate adapters and their base with vLLM, all in one stream of batches."""
    from reftune.serve.engine import VLLMEngine
    from reftune.serve.launch import base_of

    adapters, model, tasks = request.adapters, request.model, request.open_tasks()
    named = request.named
    if len(named) != len(adapters):
        raise ReftConfigError(f"Two adapters have the same name: {list(named)}. Use NAME=ADAPTER.")
    where = {name: find_adapter(path) for name, path in named.items()}
    bases = {model} if model else {base_of(path) for path in where.values()}
    trained_on = bases.pop()
    if bases or trained_on is None:
        raise ReftConfigError(
            f"one pass has adapters of one base model, and {', '.join(adapters)} name "
            f"{sorted(map(str, {trained_on, *bases}))}. Evaluate them one after another, or name "
            "the model with --model."
        )
    reporter.say(f"Starting vLLM with {trained_on}")
    options = {"dtype": request.dtype, "max_num_seqs": request.batch_size}
    engine = VLLMEngine(trained_on, where, options=options)
    return request.run(tasks, engine, reporter, list(where))


def evaluate_lm_eval(
    request: Request,
    reporter: Reporter,
    num_fewshot: int | None,
    chat_template: bool,
    include_path: str | None,
) -> dict[str, Any]:
    """Evaluate an adapter on lm-eval's tasks."""
    if len(request.adapters) > 1:
        raise ReftConfigError("--lm-eval takes one adapter at a time.")
    if importlib.util.find_spec("lm_eval") is None:
        raise ReftConfigError("lm-eval is not installed: pip install 'reftune[lm-eval]'.")
    from lm_eval.tasks import TaskManager

    from reftune.harness import ReftuneLM, run_tasks

    _, path = named_adapter(request.adapters[0])
    reporter.say(f"Loading {path}")
    loaded = load_adapter(path, base=request.model, dtype=request.dtype)
    lm = ReftuneLM(loaded, batch_size=request.batch_size)
    # lm-eval names the template only in the file that its own command line writes.
    how: dict[str, Any] = {
        "chat_template": lm.chat_template(True) if chat_template else None,
        "fewshot_as_multiturn": chat_template,
    }

    def keep(who: str, found: Mapping[str, Any]) -> None:
        how.update({key: found[key] for key in HOW})

    try:
        results = run_tasks(
            lm,
            request.tasks,
            base=request.base,
            num_fewshot=num_fewshot,
            limit=request.limit,
            chat_template=chat_template,
            manager=TaskManager(include_path=include_path),
            cache=request.folder / "lm-eval-cache" if request.folder else None,
            on_found=keep,
        )
    except ConnectionError as error:  # of datasets, which says which
        raise DataError(
            f"lm-eval could not get the data of {', '.join(request.tasks)}: {error}. Its tasks "
            "read the Hub, or what is in its cache."
        ) from error
    if not _is_small_json(how["configs"]):
        del how["configs"]
    request.keep(LM_EVAL_RESULTS, results, default=str, how=how)
    return results


def _is_small_json(value: Any) -> bool:
    try:
        return len(json.dumps(value, default=str)) <= LARGEST_CONFIGS
    except (TypeError, ValueError):  # keys that are no strings, or a circle
        return False


def show_lm_eval(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Print lm-eval's metrics, with their standard errors."""
    table = Table(box=box.SIMPLE_HEAD, title="lm-eval (± standard error)", title_justify="left")
    whos = list(dict.fromkeys(who for scores in results.values() for who in scores))
    for name in ("task", "metric"):
        table.add_column(name)
    for who in whos:
        table.add_column(who, justify="right")
    for task, scores in results.items():
        for key in scores[whos[-1]]:
            metric, _, rule = key.partition(",")
            if not rule or metric.endswith("_stderr"):
                continue
            error = f"{metric}_stderr,{rule}"
            cells = [_format(scores[who].get(key), scores[who].get(error)) for who in whos]
            table.add_row(escape(task), metric if rule == "none" else key, *cells)
    out.print(table)


def _format(value: Any, error: Any) -> str:
    if not isinstance(value, float | int):
        return str(value)
    return f"{value:.4f}" + (f" ± {error:.4f}" if isinstance(error, float | int) else "")


def _check_one_pass(adapters: Sequence[str], model: str | None) -> None:
    """Raise ReftConfigError for adapters that no batch can mix."""
    kinds: dict[str, str] = {}
    for text in adapters:
        where = find_adapter(named_adapter(text)[1])
        try:
            config = peft.PeftConfig.from_pretrained(str(where))
        except ValueError as error:
            raise ReftConfigError(
                f"{text!r} is no adapter of PEFT's format, so it cannot be evaluated in one pass "
                f"with others: {error}. Evaluate it alone."
            ) from error
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        kinds[text] = f"{kind} on {model or config.base_model_name_or_path}"
    if len(set(kinds.values())) > 1:
        raise ReftConfigError(
            "one pass has adapters of one kind on one base model, but "
            f"{'; '.join(f'{text} is {kind}' for text, kind in kinds.items())}. Evaluate them one "
            "after another."
        )
