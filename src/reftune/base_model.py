"""The base model of an experiment's cells: evaluated once, its replies put beside each cell's."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from reftune import alpaca_eval, evaluate
from reftune.callbacks import Reporter
from reftune.experiment import Experiment
from reftune.generate import HFEngine
from reftune.models import load_model, own_device
from reftune.run import write_text
from reftune.settings import RunConfig
from reftune.sources import tasks_of

BASE = "base"
Scores = Mapping[str, Mapping[str, Any]]


def base_scores(experiment: Experiment, config: RunConfig, reporter: Reporter) -> Scores | None:
    """Evaluate the base model of a cell on what is not evaluated yet: {task: result}.

    None where the cell does not ask for it; a classifier's base has no head.
    """
    if not config.evaluate.base or config.task_type != "causal_lm":
        return None
    folder = experiment.directory / BASE / _digest(config)
    scores: dict[str, Any] = {}
    engine: HFEngine | None = None
    for task in tasks_of(config):
        path = folder / f"{task.name}.json"
        if not path.is_file():
            if engine is None:
                reporter.say(f"Evaluating the base model {config.model}")
                engine = _base_engine(config)

            def tell(done: int, total: int, name: str = task.name) -> None:
                reporter.evaluating(f"{name}, base", done, total)

            samples = folder / f"{task.name}.jsonl"
            result = evaluate.run(task, engine, samples_path=samples, progress=tell)
            write_text(path, json.dumps(dataclasses.asdict(result)) + "\n")
        scores[task.name] = json.loads(path.read_text(encoding="utf-8"))
    return scores


def share_base_samples(experiment: Experiment, config: RunConfig) -> None:
    """Put the base model's generations beside a cell's own, as a run has them."""
    folder = experiment.directory / BASE / _digest(config)
    samples = config.directory / "samples"
    for path in sorted(folder.rglob("*.jsonl")):  # words/sst2 is a task, and so a folder
        copy = samples / BASE / path.relative_to(folder)
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            write_text(copy, path.read_text(encoding="utf-8"))
    there = (samples.parent / alpaca_eval.NAME / f"{BASE}.json").is_file()
    if not there and (samples / BASE / f"{alpaca_eval.NAME}.jsonl").is_file():
        asked = [task for task in tasks_of(config) if task.name == alpaca_eval.NAME]
        who = {alpaca_eval.NAME: (BASE,)}
        alpaca_eval.write_outputs(asked, who, samples, {BASE: config.model})


def _base_engine(config: RunConfig) -> HFEngine:
    model, tokenizer = load_model(
        config.model,
        config.dtype,
        "cpu" if config.train.device == "cpu" else own_device(),
        attn_implementation=config.attn_implementation,
        quantization=config.quantization,
    )
    return HFEngine(model, tokenizer, config.evaluate.batch_size)


def _digest(config: RunConfig) -> str:
    """Return a name for what decides the base model's generations."""
    asked = config.evaluate.model_dump(mode="json")
    how = {key: asked[key] for key in asked if key not in ("tasks", "batch_size", "base", "show")}
    model = [config.model, config.dtype, config.attn_implementation, config.data.data_dir]
    if config.quantization is not None:
        model.append(config.quantization)
    text = json.dumps([model, how], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
