"""Classification: an encoder with a trained head on a set of GLUE, from a run's config to scores.

    read(config) -> Sets; load(config) -> Classifier; train(...); evaluate(...)

The head is trained in full, beside the adapter and saved with it, for it is new. As in the paper it
is not counted among an adapter's parameters.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray
from peft import PeftModel, get_peft_model
from torch import Tensor

from reftune.callbacks import Progress, Reporter
from reftune.encoder import (
    Texts,
    check_length,
    collator,
    head_modules,
    load_classifier,
    model_config,
    predict,
)
from reftune.errors import ReftConfigError, ReftuneError
from reftune.methods import train_weights
from reftune.prompts import Example
from reftune.samples import Result
from reftune.settings import RunConfig
from reftune.tasks import glue
from reftune.tasks.glue import GlueSet, Labelled
from reftune.tasks.leaks import look_for_leaks
from reftune.train import Selection, Trained, fit

PREDICTIONS = "predictions"


@final
@dataclass(frozen=True)
class Sets:
    """The rows of a run: to train on, to choose an epoch by (None: the last one), to score.

    `notes` say which of the latter two are trained on.
    """

    name: str
    train: list[Labelled]
    choosing: list[Labelled] | None
    scored: Mapping[str, list[Labelled]]
    notes: Sequence[str] = ()

    @property
    def about(self) -> GlueSet:
        """Return the set of GLUE that they are of."""
        return glue.get_set(self.name)


@final
@dataclass
class Classifier:
    """A model with its head and what else is trained, its tokenizer and the modules of its head."""

    model: Any
    tokenizer: Any
    head: tuple[str, ...]


# --- data and model -------------------------------------------------------------------------------


def read(config: RunConfig) -> Sets:
    """Read the rows that a run needs, divided as its protocol says.

    Raises:
        ReftConfigError: `data.train` is not one set of GLUE, or a setting does not fit it.
        DataError: a file or a label is missing; names file and line. Or rows that choose the epoch
            or are scored are trained on, too, and `data.leaks` is "refuse".
    """
    glue.check_metrics_installed()
    names = [config.data.train] if isinstance(config.data.train, str) else config.data.train
    if len(names) != 1:
        raise ReftConfigError(f"data.train is {names}; a classifier is trained on one set of GLUE.")
    name, about = names[0], glue.get_set(names[0])
    _check_settings(config, (name, *about.more))
    folder, limit = config.data.data_dir, config.evaluate.limit
    train = glue.load(name, ("train",), folder, config.data.limit)
    held = glue.load(name, about.validation, folder)
    wanted = config.evaluate.tasks or [name, *about.more]
    tests = {n: glue.load(name, s, folder) for n, s in about.more.items() if n in wanted}
    if name in wanted or config.classify.protocol == "paper":
        tests = {name: held} | tests
    train, notes = _without_leaks(config, train, tests)
    for part, rows in (("training", train), ("validation", held)):
        if not rows:
            raise ReftConfigError(f"The {part} split of {name!r} has no rows.")
    choosing, scored = None, held
    if config.classify.protocol == "paper":
        by, rest = glue.divide(len(held), config.seed)
        choosing, scored = [held[i] for i in by], [held[i] for i in rest]
    sets = {n: (scored if n == name else rows)[:limit] for n, rows in tests.items() if n in wanted}
    return Sets(name, train, choosing, sets, notes)


def load(config: RunConfig, about: GlueSet) -> Classifier:
    """Load a run's encoder with a new head, and attach what is trained.

    The head starts the same for each method. Raises ReftConfigError and RunError.
    """
    from transformers import set_seed

    settings = model_config(config.model, about.labels, config.classify.head_dropout)
    set_seed(config.seed)
    model, tokenizer = load_classifier(
        config.model, settings, config.dtype, attn_implementation=config.attn_implementation
    )
    check_length(config.data.max_length, model.config, tokenizer)
    head = head_modules(model)
    set_seed(config.seed)
    return Classifier(attach(model, config, head), tokenizer, head)


def attach(model: Any, config: RunConfig, head: Sequence[str]) -> Any:
    """Return a model with what the config's method trains, and with its head trained.

    Raises ReftConfigError.
    """
    adapter = config.peft_config()
    if adapter is None:
        return train_weights(model, config.method)
    if hasattr(adapter, "modules_to_save"):  # not of PEFT's prompt learning
        own = adapter.modules_to_save or []
        # PEFT itself adds these two, whatever is there.
        more = [name for name in head if name not in ("classifier", "score", *own)]
        adapter.modules_to_save = [*own, *more] or None
    try:
        return get_peft_model(model, adapter)
    except ReftuneError:
        raise
    except ValueError as error:
        raise ReftConfigError(f"{config.method} does not fit {config.model}: {error}") from error


def count_parameters(classifier: Classifier) -> dict[str, float]:
    """Return what is trained besides the head, what of the head, and both as % of the encoder."""
    head = tuple(f"{name}." for name in classifier.head)
    adapter = trained_head = encoder = 0
    for name, parameter in classifier.model.named_parameters():
        plain = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
        if plain.startswith(head):
            trained_head += parameter.numel() if parameter.requires_grad else 0
            continue
        adapter += parameter.numel() if parameter.requires_grad else 0
        inside = not (parameter.requires_grad and isinstance(classifier.model, PeftModel))
        encoder += parameter.numel() if inside else 0
    return {
        "parameters": adapter,
        "percent": 100 * adapter / encoder,
        "head_parameters": trained_head,
        "percent_with_head": 100 * (adapter + trained_head) / encoder,
    }


# --- training and scoring -------------------------------------------------------------------------


def run(
    config: RunConfig,
    resume: bool,
    reporter: Reporter,
    report: Callable[[Trained, Path], dict[str, Any]],
) -> tuple[Classifier, dict[str, Any]]:
    """Train and score a classifier; return it, and what `results.json` holds.

    `report` makes of a training the part "train" of that. Raises as `reftune.run.execute`.
    """
    sets = read(config)
    for note in sets.notes:
        reporter.say(note)
    reporter.say(f"Loading {config.model}")
    classifier = load(config, sets.about)
    counts = count_parameters(classifier)
    results: dict[str, Any] = {
        "name": config.name,
        "method": config.method,
        "seed": config.seed,
        **counts,
        "examples": len(sets.train),
    }
    reporter.say(
        f"Training {counts['parameters']:,} parameters ({counts['percent']:.3f}% of the encoder) "
        f"and {counts['head_parameters']:,} of the head on {len(sets.train)} examples"
    )
    trained = train(config, classifier, sets, resume=resume, on_progress=reporter.training)
    results["train"] = report(trained, config.directory)
    if sets.choosing is not None:
        results["selection"] = {
            "metric": sets.about.metrics[0],
            "value": trained.best_value,
            "step": trained.best_step,
            "n": len(sets.choosing),
        }
    results["tasks"] = evaluate(config, classifier, sets, reporter.evaluating)
    return classifier, results


def train(
    config: RunConfig,
    classifier: Classifier,
    sets: Sets,
    *,
    resume: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> Trained:
    """Train in place; under the paper's protocol the best epoch on `sets.choosing` is kept."""
    length, tokenizer = config.data.max_length, classifier.tokenizer
    selection = None
    if sets.choosing is not None:
        about = sets.about
        chosen = Texts(sets.choosing, tokenizer, length)
        selection = Selection(chosen, about.metrics[0], _Compute(about))
    return fit(
        classifier.model,
        Texts(sets.train, tokenizer, length),
        None,
        collator(tokenizer),
        config.train,
        config.directory,
        seed=config.seed,
        resume=resume,
        on_progress=on_progress,
        selection=selection,
    )


def evaluate(
    config: RunConfig,
    classifier: Classifier,
    sets: Sets,
    progress: Callable[[str, int, int], None],
) -> dict[str, dict[str, Any]]:
    """Score a classifier: {set: {"adapter": result, "majority": result}}.

    A result is a `Result` with "metrics", {name: {"value", "stderr"}}. Each prediction goes to
    `directory`/predictions/SET.jsonl. "majority" always gives the commonest answer of training.
    """
    results: dict[str, dict[str, Any]] = {}
    about = sets.about
    for name, rows in sets.scored.items():
        start = time.perf_counter()
        data = Texts(rows, classifier.tokenizer, config.data.max_length)
        logits = predict(
            classifier.model,
            classifier.tokenizer,
            data,
            config.evaluate.batch_size,
            lambda done, total, what=name: progress(what, done, total),  # type: ignore[misc]
        )
        predicted = _answers(logits.numpy(), about)
        gold = np.array([row.label for row in rows])
        path = config.directory / PREDICTIONS / f"{name}.jsonl"
        _write_predictions(path, rows, predicted, logits, about)
        seconds = time.perf_counter() - start
        results[name] = {"adapter": _result(name, about, gold, predicted, seconds)}
        if not about.is_graded:
            usual = np.full_like(gold, glue.commonest(sets.train))
            results[name]["majority"] = _result(name, about, gold, usual, 0.0)
    return results


@final
@dataclass(frozen=True)
class _Compute:
    """The metrics of a set, as transformers' Trainer asks for them."""

    about: GlueSet

    def __call__(self, outputs: Any) -> dict[str, float]:
        logits = outputs.predictions
        logits = logits[0] if isinstance(logits, tuple) else logits
        answers = _answers(logits, self.about)
        gold = outputs.label_ids
        return {name: glue.score(name, gold, answers) for name in self.about.metrics}


def _answers(logits: NDArray[Any], about: GlueSet) -> Any:
    """Return classes (N,), or grades, of logits (N, labels)."""
    return logits.reshape(-1).astype(np.float64) if about.is_graded else logits.argmax(-1)


def _result(name: str, about: GlueSet, gold: Any, predicted: Any, seconds: float) -> dict[str, Any]:
    metrics = {
        metric: {
            "value": glue.score(metric, gold, predicted),
            "stderr": glue.standard_error(metric, gold, predicted),
        }
        for metric in about.metrics
    }
    first = about.metrics[0]
    value, stderr = metrics[first]["value"], metrics[first]["stderr"]
    assert value is not None
    result = Result(name, first, value, stderr, len(gold), round(seconds, 3), 0)
    return dataclasses.asdict(result) | {"metrics": metrics}


def _write_predictions(
    path: Path, rows: Sequence[Labelled], predicted: Any, logits: Tensor, about: GlueSet
) -> None:
    """Write a line for each row; its score is 1 or 0, for grades minus the error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8") as file:
        for index, (row, answer) in enumerate(zip(rows, predicted.tolist(), strict=True)):
            right = -abs(answer - row.label) if about.is_graded else float(answer == row.label)
            line = {
                "index": index,
                "where": row.where,
                "texts": row.texts,
                "gold": row.label,
                "prediction": answer,
                "score": right,
                "logits": logits[index].tolist(),
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    os.replace(part, path)


def _without_leaks(
    config: RunConfig, train: list[Labelled], tests: Mapping[str, Sequence[Labelled]]
) -> tuple[list[Labelled], list[str]]:
    """Do for a classifier's rows, whole sets of them, what `sources.without_leaks` does."""

    def examples(rows: Sequence[Labelled]) -> list[Example]:  # two texts are one question
        return [Example("\n".join(row.texts), str(row.label), where=row.where) for row in rows]

    questions = {name: examples(rows) for name, rows in tests.items()}
    left_out, notes = look_for_leaks(examples(train), questions, config.data.leaks)
    return [row for i, row in enumerate(train) if i not in left_out], notes


def _check_settings(config: RunConfig, names: Sequence[str]) -> None:
    wrong = [name for name in config.evaluate.tasks if name not in names]
    if wrong:
        raise ReftConfigError(
            f"evaluate.tasks has {', '.join(wrong)}; a classifier of {names[0]} is scored on "
            f"{', '.join(names)}."
        )
    for key in ("heldout", "heldout_fraction", "columns", "system", "streaming"):
        if value := getattr(config.data, key):
            raise ReftConfigError(
                f"data.{key} is {value!r}; a classifier has no use for it, leave it out."
            )
    if config.classify.protocol == "paper" and config.train.save_steps is not None:
        raise ReftConfigError(
            f"train.save_steps is {config.train.save_steps}; under classify.protocol=paper each "
            "epoch is scored and saved, leave it out."
        )
