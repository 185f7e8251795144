"""A run, from its config to its directory: train, evaluate, keep everything.

runs/NAME/
  config.yaml     as resolved: every key
  log.jsonl       what was logged at each step
  checkpoints/    to resume from
  adapter/        a PEFT adapter directory with its model card
  samples/        every generation of the evaluation
  results.json    all numbers
  loss.png        where matplotlib is installed
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from reftune import evaluate
from reftune.callbacks import CHECKPOINTS, Progress
from reftune.card import model_card
from reftune.config import ReftConfig
from reftune.errors import ReftConfigError, RunError
from reftune.generate import HFEngine
from reftune.models import EMBEDDED, load_model
from reftune.plots import plot_loss
from reftune.settings import RunConfig, load_config
from reftune.sources import read_examples, tokenise
from reftune.tasks import get_task
from reftune.tokens import Collator, TokenDataset
from reftune.train import LOG, Trained, fit, heldout_cross_entropy

ADAPTER = "adapter"
RESULTS = "results.json"
CONFIG = "config.yaml"
# Keys of data that may differ when a run is resumed: the tokens are the same.
HOW_DATA_IS_READ = ("cache_dir", "num_proc", "streaming")


class Reporter(Protocol):
    """Who is told what a run does; the command line prints it."""

    def say(self, text: str) -> None:
        """Tell one fact."""

    def training(self, progress: Progress) -> None:
        """Tell how far training is."""

    def evaluating(self, what: str, done: int, total: int) -> None:
        """Tell how far an evaluation is."""


class Silent:
    """A reporter that tells nobody."""

    def say(self, text: str) -> None:
        """Say nothing."""

    def training(self, progress: Progress) -> None:
        """Show nothing."""

    def evaluating(self, what: str, done: int, total: int) -> None:
        """Show nothing."""


@dataclass
class Loaded:
    """A model with its adapter, its tokenizer, and the name its base was loaded by."""

    model: Any
    tokenizer: Any
    base: str


def execute(
    config: RunConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Train, save and evaluate a run; return what `results.json` holds.

    Raises RunError where its directory holds another run, nothing can be resumed, or Ctrl-C ended
    training; ReftConfigError and DataError for what the config names.
    """
    reporter = reporter or Silent()
    directory = config.directory
    _prepare(config, resume, overwrite)
    examples = read_examples(config)
    reporter.say(f"Loading {config.model}")
    loaded = _attach(config)
    train, heldout = tokenise(config, examples, loaded.tokenizer)
    trainable, total = loaded.model.get_nb_trainable_parameters()
    results: dict[str, Any] = {
        "name": config.name,
        "parameters": trainable,
        "percent": 100 * trainable / (total - trainable),
        "examples": len(train),
    }
    reporter.say(
        f"Training {trainable:,} parameters ({results['percent']:.3f}% of the base) on "
        f"{len(train)} examples, {sum(train.lengths):,} tokens"
    )
    _train(config, loaded, train, heldout, results, resume, reporter)
    # Until now it names the directory that the base was loaded from.
    loaded.model.peft_config["default"].base_model_name_or_path = loaded.base
    save_adapter(loaded.model, directory / ADAPTER)
    reporter.say(f"Saved the adapter to {directory / ADAPTER}")
    wanted = config.evaluate
    results["tasks"] = evaluate.run_all(
        [get_task(n, config.data.data_dir or ".", limit=wanted.limit) for n in wanted.tasks],
        HFEngine(loaded.model, loaded.tokenizer, wanted.batch_size),
        base=wanted.base,
        samples=directory / "samples",
        progress=reporter.evaluating,
    )
    results["versions"] = versions()
    _finish(config, loaded, results, reporter)
    return results


def load_adapter(
    path: str | Path,
    *,
    base: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    name: str = "default",
) -> Loaded:
    """Load an adapter (its directory, a run's directory, or a Hub name) on its base model.

    `base` overrides the model that the adapter was trained on. Raises RunError.
    """
    import peft

    where = adapter_directory(path)
    try:
        config = peft.PeftConfig.from_pretrained(str(where))
    except ValueError as error:
        raise RunError(
            f"{str(path)!r} is no adapter: {error}. An adapter is a directory with an "
            "adapter_config.json, a run's directory, or a Hub name." + _unfinished(Path(path))
        ) from error
    base = base or config.base_model_name_or_path
    if not base:
        raise RunError(f"{where} does not say which model it is for; name it with --model.")
    by_hub_name = {hub: embedded for embedded, (_, hub) in EMBEDDED.items()}
    model, tokenizer = load_model(by_hub_name.get(base, base), dtype, device)  # type: ignore[arg-type]
    adapted = peft.PeftModel.from_pretrained(model, str(where), adapter_name=name)
    return Loaded(adapted, tokenizer, base)


def _unfinished(path: Path) -> str:
    if not (path / CHECKPOINTS).is_dir():
        return ""
    return f" This run is not finished: reftune train --resume {path / CONFIG}"


def adapter_directory(path: str | Path) -> Path | str:
    """Return the adapter in a run's directory, else the path (or Hub name) itself."""
    inside = Path(path) / ADAPTER
    return inside if (inside / "adapter_config.json").is_file() else path


def template_of(path: str | Path) -> str:
    """Return the template that a run's config (beside its adapter) names, else "auto"."""
    for folder in (Path(path), Path(path).parent):
        if (folder / CONFIG).is_file():
            values = yaml.safe_load((folder / CONFIG).read_text())
            return str(values["data"]["template"])
    return "auto"


def save_adapter(model: Any, directory: Path) -> None:
    """Save a `PeftModel`'s adapter so that the directory is whole or as it was before."""
    part = directory.with_name(f".{directory.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    # Embeddings are never trained here; to find that out PEFT would ask the Hub for the base.
    model.save_pretrained(str(part), save_embedding_layers=False)
    replace_directory(part, directory)


def replace_directory(new: Path, directory: Path) -> None:
    """Put a finished directory in the place of another."""
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        os.replace(directory, old)
    os.replace(new, directory)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    names = ("reftune", "torch", "transformers", "peft")
    known = {}
    for name in names:
        try:
            known[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a source tree
            known[name] = "unknown"
    return known


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
        shutil.rmtree(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_text(earlier, config.to_yaml())
    except OSError as error:
        raise RunError(
            f"{directory} cannot be written: {error}. Give another output_dir."
        ) from error


def _has_begun(directory: Path) -> bool:
    """Return whether there is more in a directory than the config of a run that never began."""
    return directory.is_dir() and any(path.name != CONFIG for path in directory.iterdir())


def _is_run(directory: Path) -> bool:
    try:
        load_config(directory / CONFIG)
    except ReftConfigError:
        return False
    return True


def _check_same(config: RunConfig, earlier: Path) -> None:
    before, now = yaml.safe_load(earlier.read_text()), config.model_dump(mode="json")
    changed = [
        f"{section}.{key}" if isinstance(value, dict) else section
        for section, value in now.items()
        if section in ("model", "dtype", "seed", "adapter", "data", "train")
        for key in (value if isinstance(value, dict) else [section])
        if not (section == "data" and key in HOW_DATA_IS_READ)
        if (value[key] if isinstance(value, dict) else value)
        != (before.get(section, {}).get(key) if isinstance(value, dict) else before.get(section))
    ]
    if changed:
        raise RunError(
            f"{earlier.parent} was started with other settings ({', '.join(changed)}), so it "
            "cannot be resumed with these. Use its own config.yaml, or another name."
        )


def _attach(config: RunConfig) -> Loaded:
    import peft
    from transformers import set_seed

    model, tokenizer = load_model(
        config.model, config.dtype, attn_implementation=config.attn_implementation
    )
    base = EMBEDDED[config.model][1] if config.model in EMBEDDED else config.model
    set_seed(config.seed)
    return Loaded(peft.get_peft_model(model, config.reft_config()), tokenizer, base)


def _train(
    config: RunConfig,
    loaded: Loaded,
    train: TokenDataset,
    heldout: TokenDataset | None,
    results: dict[str, Any],
    resume: bool,
    reporter: Reporter,
) -> None:
    """Train, and put the losses into the results. Raises RunError where Ctrl-C ended it."""
    directory = config.directory
    collator = Collator(loaded.tokenizer.pad_token_id)
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
    )
    if trained.interrupted:
        raise RunError(
            f"Training was interrupted at step {trained.steps}; a checkpoint is in "
            f"{directory / CHECKPOINTS}. Go on with: reftune train --resume {directory / CONFIG}"
        )
    results["train"] = _train_results(trained)
    if heldout is not None and trained.heldout_loss is not None:
        with loaded.model.disable_adapter():
            base = heldout_cross_entropy(loaded.model, heldout, collator, config.train.batch_size)
        results["heldout"] = {"n": len(heldout), "base": base, "adapter": trained.heldout_loss}


def _train_results(trained: Trained) -> dict[str, Any]:
    return {
        "loss": trained.loss,
        "steps": trained.steps,
        "seconds": round(trained.seconds, 1),
        "tokens_per_second": round(trained.tokens / max(trained.seconds, 1e-9), 1),
    }


def _finish(config: RunConfig, loaded: Loaded, results: dict[str, Any], reporter: Reporter) -> None:
    directory = config.directory
    adapter = loaded.model.peft_config["default"]
    assert isinstance(adapter, ReftConfig)
    write_text(directory / ADAPTER / "README.md", model_card(config, adapter, results))
    write_text(directory / RESULTS, json.dumps(results, indent=2) + "\n")
    if importlib.util.find_spec("matplotlib") is None:
        reporter.say("No loss.png: matplotlib is not installed (pip install 'reftune[plots]')")
    else:
        plot_loss(directory / LOG, directory / "loss.png", config.name)
