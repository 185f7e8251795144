"""A run, from its config to its directory: train, evaluate, keep everything.

runs/NAME/
  config.yaml     as resolved: every key
  log.jsonl       what was logged at each step
  checkpoints/    to resume from
  adapter/        a PEFT adapter directory with its model card (or weights: see `methods`)
  samples/        every generation of the evaluation
  results.json    all numbers
  loss.png        where matplotlib is installed
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from reftune import alpaca_eval, classify, evaluate
from reftune.callbacks import CHECKPOINTS, Progress
from reftune.callbacks import Reporter as Reporter
from reftune.card import model_card
from reftune.distributed import Processes, connect, processes, wait_for_all
from reftune.errors import ReftConfigError, ReftuneError, RunError, RunInterrupted
from reftune.generate import HFEngine
from reftune.heldout import heldout_cross_entropy
from reftune.hub import commit_of, split_revision
from reftune.loading import Loaded as Loaded
from reftune.loading import load_adapter as load_adapter
from reftune.methods import (
    as_base,
    count_parameters,
    train_weights,
)
from reftune.models import EMBEDDED, load_model, resolve
from reftune.plots import plot_loss
from reftune.provenance import system
from reftune.provenance import versions as versions
from reftune.saving import discard_directory, save_adapter
from reftune.saving import write_text as write_text
from reftune.settings import RunConfig, load_config
from reftune.sources import choosing_data, read_examples, tasks_of, tokenise, without_leaks
from reftune.stored import ADAPTER as ADAPTER
from reftune.stored import CONFIG as CONFIG
from reftune.stored import adapter_directory as adapter_directory
from reftune.stored import find_adapter as find_adapter
from reftune.stored import template_of as template_of
from reftune.tokens import Collator, TokenDataset
from reftune.train import LOG, Trained, fit

RESULTS = "results.json"
ERROR = "error.txt"  # of an experiment's cell that failed: the traceback
# Sections that are the same when a run is resumed.
WHAT_IS_TRAINED = (
    *("model", "task_type", "dtype", "quantization", "seed", "adapter", "data", "train"),
    "classify",
)
# Keys that may differ: the tokens, and what is learned from them, are the same.
MAY_DIFFER = {"data": ("cache_dir", "num_proc", "streaming"), "train": ("fsdp",)}


class Silent:
    """A reporter that tells nobody."""

    def say(self, text: str) -> None:
        """Say nothing."""

    def training(self, progress: Progress) -> None:
        """Show nothing."""

    def evaluating(self, what: str, done: int, total: int) -> None:
        """Show nothing."""


def execute(
    config: RunConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    base_scores: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Train, save and evaluate a run; return what `results.json` holds.

    With `base_scores`, {task: result}, the base model is not evaluated again.

    Raises RunError where its directory holds another run or nothing can be resumed, RunInterrupted
    where Ctrl-C ended training; ReftConfigError and DataError for what the config names.

    Of several processes (torchrun, `reftune train --nproc`) each calls this; the first one writes,
    evaluates, and has all of the results. Where the base is spread over them, all evaluate.
    """
    world = _begin(config, resume, overwrite)
    reporter = (reporter if world.is_main else None) or Silent()
    if config.task_type == "seq_cls":
        return _classify(config, resume, reporter)
    examples, heldout_examples = read_examples(config)
    examples, notes = without_leaks(config, examples)
    for note in notes:
        reporter.say(note)
    reporter.say(f"Loading {config.model}")
    loaded = _attach(config)
    train, heldout = tokenise(config, (examples, heldout_examples), loaded.tokenizer)
    trainable, of_base = count_parameters(loaded.model)
    results: dict[str, Any] = {
        "name": config.name,
        "method": config.method,
        "seed": config.seed,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),  # what "auto" came to
        "parameters": trainable,
        "percent": 100 * trainable / of_base,
        "examples": len(train),
    }
    reporter.say(
        f"Training {trainable:,} parameters ({results['percent']:.3f}% of the base) on "
        f"{len(train)} examples, {sum(train.lengths):,} tokens"
    )
    _train(config, loaded, train, heldout, results, resume, reporter)
    if not (world.is_main or config.train.is_sharded(world)):
        return results
    results["tasks"] = _evaluate(config, loaded, base_scores, reporter)
    results |= {"versions": versions(), "system": system()}
    _finish(config, loaded, results, reporter)
    return results


def _begin(config: RunConfig, resume: bool, overwrite: bool) -> Processes:
    """Connect the processes, and let the first one make the run's directory. Raises RunError."""
    world = connect(cpu=config.train.device == "cpu")
    if world.count > 1 and config.task_type == "seq_cls":
        raise RunError("Classifiers (task_type: seq_cls) train in one process: without --nproc.")
    if world.is_main:
        _prepare(config, resume, overwrite)
    wait_for_all()
    return world


def _evaluate(
    config: RunConfig,
    loaded: Loaded,
    base_scores: Mapping[str, Mapping[str, Any]] | None,
    reporter: Reporter,
) -> dict[str, Any]:
    """Return the scores of the tasks, {task: {who: score}}."""
    wanted, samples = config.evaluate, config.directory / "samples"
    if config.train.is_sharded(processes()):
        # All take part in each forward. What one of them alone has already is not left out by all.
        if processes().is_main:
            shutil.rmtree(samples, ignore_errors=True)
        wait_for_all()
    tasks = tasks_of(config)
    scores = evaluate.run_all(
        tasks,
        HFEngine(loaded.model, loaded.tokenizer, wanted.batch_size),
        base=wanted.base and base_scores is None,
        samples=samples if processes().is_main else None,
        progress=reporter.evaluating,
    )
    if processes().is_main:
        generators = {"adapter": config.name, "base": config.model}
        alpaca_eval.write_outputs(tasks, scores, samples, generators)
    known = base_scores or {}
    return {
        task: ({"base": dict(known[task])} if task in known else {}) | found
        for task, found in scores.items()
    }


def _classify(config: RunConfig, resume: bool, reporter: Reporter) -> dict[str, Any]:
    """Do for a classifier what `execute` does."""
    trained, results = classify.run(config, resume, reporter, _train_results)
    loaded = Loaded(trained.model, trained.tokenizer, *_base_name(config))
    save_adapter(loaded.model, config.directory / ADAPTER, loaded.base, loaded.revision)
    results |= {"versions": versions(), "system": system()}
    _finish(config, loaded, results, reporter)
    return results


def _prepare(config: RunConfig, resume: bool, overwrite: bool) -> None:
    directory = config.directory
    earlier = directory / CONFIG
    if resume and overwrite:
        raise RunError("--resume and --overwrite exclude each other.")
    if resume and earlier.is_file():
        _check_same(config, earlier)
        if (directory / RESULTS).is_file():
            raise RunError(f"The run in {directory} is finished: there is nothing to resume.")
    elif not resume and _has_begun(directory):
        if not overwrite:
            raise RunError(
                f"{directory} holds a run already. Go on with it (--resume), replace it "
                "(--overwrite), or give this one another name (name=...)."
            )
        if not _is_run(directory):
            raise RunError(f"{directory} is no run of reftune; it will not be replaced.")
        discard_directory(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_text(earlier, config.to_yaml())
    except OSError as error:
        raise RunError(
            f"{directory} cannot be written: {error}. Give another output_dir."
        ) from error


def _has_begun(directory: Path) -> bool:
    """Return whether there is more in a directory than a run that never began leaves there."""
    return directory.is_dir() and any(
        path.name not in (CONFIG, ERROR) and not path.name.endswith(".part")
        for path in directory.iterdir()
    )


def _is_run(directory: Path) -> bool:
    try:
        load_config(directory / CONFIG)
    except ReftConfigError:
        return False
    return True


def _check_same(config: RunConfig, earlier: Path) -> None:
    before, changed = settings_of(earlier), []
    for section, key, value in _decisive(config):
        there = (before.get(section) or {}) if section else before
        name = f"{section}.{key}" if section else key
        if not same_training(name, there.get(key, value), value):
            changed.append(name)
    if changed:
        raise RunError(
            f"{earlier.parent} was started with other settings ({', '.join(changed)}), so it "
            "cannot be resumed with these. Use its own config.yaml, or another name."
        )


def same_training(key: str, before: Any, now: Any) -> bool:
    """Return whether a key's new value changes no number of a run that had another.

    What "refuse" let through is what "allow" trains on.
    """
    return before == now or (key, before, now) == ("data.leaks", "refuse", "allow")


def settings_of(earlier: Path) -> dict[str, Any]:
    """Return what a run's config.yaml says; what an earlier version did not have is the default.

    Of a file with settings that there are no more, what stands there. Raises RunError for others.
    """
    try:
        return load_config(earlier).model_dump(mode="json")
    except ReftConfigError as error:
        with suppress(yaml.YAMLError):
            values = yaml.safe_load(earlier.read_text(encoding="utf-8"))
            if isinstance(values, dict):
                return values
        raise RunError(
            f"{earlier} does not say what the run there was made with: {error} Remove that "
            "directory, or give this run another name (name=...)."
        ) from None


def _decisive(config: RunConfig) -> Iterator[tuple[str, str, Any]]:
    """Yield (section, key, value) of what decides the training; the section may be ""."""
    values = config.model_dump(mode="json")
    for name in (name for name in values if name in WHAT_IS_TRAINED):
        inner = values[name]
        if isinstance(inner, dict):
            may_differ = MAY_DIFFER.get(name, ())
            yield from ((name, key, v) for key, v in inner.items() if key not in may_differ)
        else:
            yield "", name, inner
    yield from (("evaluate", key, values["evaluate"][key]) for key in choosing_data(config))


def _base_name(config: RunConfig) -> tuple[str, str | None]:
    """Return the base model's name for others, and its commit, where it is the Hub's."""
    commit = commit_of(resolve(config.model))
    if config.model in EMBEDDED:
        return EMBEDDED[config.model][1], commit
    return split_revision(config.model)[0], commit


def _attach(config: RunConfig) -> Loaded:
    import peft
    from transformers import set_seed

    model, tokenizer = load_model(
        config.model,
        config.dtype,
        "cpu" if config.quantization and config.train.device == "cpu" else None,
        config.attn_implementation,
        config.quantization,
    )
    base, commit = _base_name(config)
    set_seed(config.seed)
    adapter = config.peft_config()
    if adapter is None:
        return Loaded(train_weights(model, config.method), tokenizer, base, commit)
    try:
        return Loaded(peft.get_peft_model(model, adapter), tokenizer, base, commit)
    except ReftuneError:
        raise
    except ValueError as error:
        raise ReftConfigError(f"{config.method} does not fit {config.model}: {error}") from error


def _train(
    config: RunConfig,
    loaded: Loaded,
    train: TokenDataset,
    heldout: TokenDataset | None,
    results: dict[str, Any],
    resume: bool,
    reporter: Reporter,
) -> None:
    """Train, save, and put losses into the results. Raises RunError where Ctrl-C ended it."""
    directory = config.directory
    collator = Collator(loaded.tokenizer.pad_token_id)

    def save() -> None:  # before anything else can fail
        save_adapter(loaded.model, directory / ADAPTER, loaded.base, loaded.revision)
        reporter.say(f"Saved the adapter to {directory / ADAPTER}")

    trained = fit(
        loaded.model,
        train,
        heldout,
        collator,
        config.train,
        directory,
        seed=config.seed,
        resume=resume,
        on_progress=reporter.training,
        on_trained=save,
    )
    results["train"] = _train_results(trained, directory)
    if heldout is not None and trained.heldout_loss is not None:
        with as_base(loaded.model):
            base = heldout_cross_entropy(loaded.model, heldout, collator, config.train.batch_size)
        results["heldout"] = {"n": len(heldout), "base": base, "adapter": trained.heldout_loss}


def _train_results(trained: Trained, directory: Path) -> dict[str, Any]:
    if trained.interrupted:
        raise RunInterrupted(
            f"Training was interrupted at step {trained.steps}; a checkpoint is in "
            f"{directory / CHECKPOINTS}. Go on with: reftune train --resume {directory / CONFIG}"
        )
    return {
        "loss": trained.loss,
        "steps": trained.steps,
        "shortcuts": list(trained.shortcuts),
        "seconds": round(trained.seconds, 1),
        **({} if trained.cpu_seconds is None else {"cpu_seconds": round(trained.cpu_seconds, 1)}),
        "tokens_per_second": round(trained.tokens / max(trained.seconds, 1e-9), 1),
        **({} if trained.memory is None else {"accelerator_memory": trained.memory}),
    }


def _finish(config: RunConfig, loaded: Loaded, results: dict[str, Any], reporter: Reporter) -> None:
    if not processes().is_main:
        return
    directory = config.directory
    card = model_card(config, loaded.base, results, revision=loaded.revision)
    write_text(directory / ADAPTER / "README.md", card)
    write_text(directory / RESULTS, json.dumps(results, indent=2) + "\n")
    if importlib.util.find_spec("matplotlib") is None:
        reporter.say("No loss.png: matplotlib is not installed (pip install 'reftune[plots]')")
    else:
        plot_loss(directory / LOG, directory / "loss.png", config.name)
