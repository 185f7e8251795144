"""A run with shortcuts goes step by step as one without, whatever the Trainer does around them."""

import json
import pickle
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import DataCollatorWithPadding

from architectures import ARCHITECTURES
from reftune.callbacks import Progress
from reftune.speed.training import Step, taking
from reftune.train import Trained, TrainingData, TrainSettings, fit, shortcuts
from speed_tiny import COLLATOR, adapted, dataset, described, nothing_left, ways
from test_speed import CAUSAL
from tiny import tiny_tokenizer

pytestmark = [
    # PEFT 0.21 and transformers 5.23 rename gradient checkpointing, each at its own pace.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    # transformers' Trainer pins memory by a function that torch deprecates
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
]

SHAPES = [(3, 2), (9, 4), (1, 3), (14, 9), (2, 1), (7, 7), (20, 1), (5, 5), (4, 2), (6, 1), (30, 3)]
SETTINGS: dict[str, Any] = {
    "epochs": 3,
    "batch_size": 3,
    "gradient_accumulation_steps": 3,  # of 4 batches: one remains
    "learning_rate": 0.05,
    "optimizer": "sgd",  # Adam makes steps of rounding where a gradient is nearly zero
    "logging_steps": 1,
    "device": "cpu",
    "reuse": True,
    "compile": False,
}
OFF = {"shortcuts": False}


def llama(**settings: Any) -> PeftModel:
    return adapted(CAUSAL["llama"].make(), **settings)


def logged(directory: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [row for row in lines if "loss" in row]


@dataclass
class Ran:
    """What a run logged at each step, and what it learned."""

    losses: list[float]
    norms: list[float]
    parameters: dict[str, Tensor]


def run(
    model: Any,
    directory: Path,
    data: TrainingData | None = None,
    collator: Any = COLLATOR,
    **settings: Any,
) -> Ran:
    directory.mkdir(exist_ok=True)
    given = TrainSettings(**{**SETTINGS, **settings})
    fit(model, data or dataset(SHAPES), None, collator, given, directory, seed=1)
    return ran(model, directory)


def ran(model: Any, directory: Path) -> Ran:
    rows = logged(directory)
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    return Ran([row["loss"] for row in rows], [row["grad_norm"] for row in rows], trained)


def assert_same_run(got: Ran, expected: Ran) -> None:
    assert len(got.losses) > 3
    assert max(expected.losses) - min(expected.losses) > 1e-3, "it learns something"
    torch.testing.assert_close(got.losses, expected.losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.norms, expected.norms, rtol=1e-3, atol=1e-5)
    for name, parameter in expected.parameters.items():
        torch.testing.assert_close(
            got.parameters[name], parameter, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


VARIANTS: dict[str, dict[str, Any]] = {
    "all by default": {},
    "not grouped": {"group_by_length": False},
    "no accumulation": {"gradient_accumulation_steps": 1},
    "checkpointing": {"gradient_checkpointing": True},
    "no reuse": {"reuse": False},
    "reuse on disk": {"reuse_memory_gb": 0},
    "no room for reuse": {"reuse_memory_gb": 0, "reuse_disk_gb": 0},
    "little room for reuse": {"reuse_memory_gb": 1e-5, "reuse_disk_gb": 1e-5},
    "packed": {"packing": True},
    "a worker": {"num_workers": 1, "epochs": 2},
    "clipped": {"max_grad_norm": 0.05},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_goes_as_one_without_shortcuts(variant, tmp_path) -> None:
    settings = VARIANTS[variant]
    expected = run(llama(), tmp_path / "off", **settings, **OFF)
    model = llama()
    with nothing_left(model, trained=True):
        assert_same_run(run(model, tmp_path / "on", **settings), expected)
    left = {path.name for path in (tmp_path / "on").iterdir()}
    assert left == {"log.jsonl", "checkpoints"}


@pytest.mark.parametrize("adapter", [{"dropout": 0.3}, {"positions": "f2+l2", "layers": "all"}])
def test_a_run_of_another_adapter_goes_as_one_without_shortcuts(adapter, tmp_path) -> None:
    expected = run(llama(**adapter), tmp_path / "off", **OFF)
    assert_same_run(run(llama(**adapter), tmp_path / "on"), expected)


def test_the_batches_can_be_made_in_another_process(tmp_path) -> None:
    """Where processes are spawned the collator is pickled."""
    model = llama()
    examples = [dataset(SHAPES)[i] for i in range(4)]
    for chosen in ways(model, tmp_path).values():
        with taking(described(model), chosen, COLLATOR) as step:
            batch = step.collate(examples)
            other = pickle.loads(pickle.dumps(step.collate))(examples)
            assert batch.keys() == other.keys()
            torch.testing.assert_close(other, batch)


class InterruptAt:
    """Press Ctrl-C when training reaches a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, progress: Progress) -> None:
        if progress.step == self.step:
            self.step = -1
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("variant", ["all by default", "not grouped", "reuse on disk"])
@pytest.mark.parametrize("at", [3, 5])
def test_a_run_resumed_within_an_epoch_goes_as_one_without_shortcuts(at, variant, tmp_path) -> None:
    """Two steps an epoch: step 3 is in the middle of the second, where states would be reused."""
    settings = VARIANTS[variant]
    expected = run(llama(), tmp_path / "off", **settings, **OFF)
    given = TrainSettings(**{**SETTINGS, **settings})
    directory, data = tmp_path / "on", dataset(SHAPES)
    directory.mkdir()
    first: Trained = fit(
        llama(), data, None, COLLATOR, given, directory, seed=1, on_progress=InterruptAt(at)
    )
    assert first.interrupted
    assert first.steps == at
    model = llama()
    fit(model, data, None, COLLATOR, given, directory, seed=1, resume=True)
    assert_same_run(ran(model, directory), expected)


def test_later_epochs_of_a_run_compute_only_what_the_adapter_changes(tmp_path) -> None:
    model, rows = llama(positions="l1", layers=[1]), [0, 0, 0]

    def count(number: int, given: tuple[Tensor]) -> None:
        rows[number] += given[0].shape[:-1].numel()

    for number, layer in enumerate(described(model).layers):
        layer.mlp.register_forward_pre_hook(lambda _, given, n=number: count(n, given))
    totals = []

    def at_step(progress: Progress) -> None:
        if progress.step % 2 == 0 and progress.step == len(totals) * 2 + 2:
            totals.append(list(rows))

    given = TrainSettings(**{**SETTINGS, "skip_unread": False})
    fit(model, dataset(SHAPES), None, COLLATOR, given, tmp_path, seed=1, on_progress=at_step)
    epochs = [[b - a for a, b in zip(*two, strict=True)] for two in pairwise(totals)]
    assert len(epochs) == 2
    for below, edited, above in epochs:
        assert below == edited == 0
        # Tails of the last prompt token and the answer without its end, and padding in a batch.
        assert sum(c for _, c in SHAPES) <= above <= len(SHAPES) * 9


# --- classifiers --------------------------------------------------------------------------------


@dataclass
class Labelled:
    """Token ids and labels of a sequence classification task."""

    shapes: Sequence[int]
    lengths: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.lengths = list(self.shapes)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        g = torch.Generator().manual_seed(index)
        ids = torch.randint(6, 96, (self.lengths[index],), generator=g).tolist()
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": index % 3}


ENCODERS = {
    "bert": "BertForSequenceClassification",
    "roberta": "RobertaForSequenceClassification",
    "modernbert": "ModernBertForSequenceClassification",
    "deberta-v2": "DebertaV2ForSequenceClassification",
    "distilbert": "DistilBertForSequenceClassification",
    "mpnet": "MPNetForSequenceClassification",
}
DECODERS = {
    "llama": "LlamaForSequenceClassification",
    "gpt2": "GPT2ForSequenceClassification",
    "qwen3": "Qwen3ForSequenceClassification",
}
NO_DROPOUT = {"classifier_dropout": 0.0, "seq_classif_dropout": 0.0, "pooler_dropout": 0.0}


def classifier(name: str, side: str = "right", **settings: Any) -> tuple[PeftModel, Any]:
    """Return a classifier with an adapter and a head to train, and its collator."""
    arch = ARCHITECTURES[name]
    given = {**NO_DROPOUT, **settings}
    base = arch.make(model=(ENCODERS | DECODERS)[name], num_labels=3, **given)
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    head = "score" if name in DECODERS else "classifier"
    model = adapted(
        base,
        positions="f1+l1",
        layers="all",
        task_type="SEQ_CLS",
        modules_to_save=[head, *(["pre_classifier"] if name == "distilbert" else [])],
    )
    return model, DataCollatorWithPadding(tokenizer)


LENGTHS = [3, 9, 5, 5, 14, 4, 7, 11, 3, 6]


@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS])
def test_a_classifier_trains_as_without_shortcuts(name, tmp_path) -> None:
    settings = {"gradient_accumulation_steps": 2, "learning_rate": 0.01}
    data = Labelled(LENGTHS)
    model, collator = classifier(name)
    expected = run(model, tmp_path / "off", data, collator, **settings, **OFF)
    model, collator = classifier(name)
    with nothing_left(model, trained=True):
        assert_same_run(run(model, tmp_path / "on", data, collator, **settings), expected)
    assert any("modules_to_save" in parameter for parameter in expected.parameters)


def chosen_for(model: Any, data: Any, collator: Any, folder: Path) -> Step:
    with shortcuts(model, data, collator, TrainSettings(device="cpu", compile=False), folder) as s:
        return s


@pytest.mark.parametrize("lengths", [LENGTHS, [1, 1, 1, 6, 9], [1, 2, 2, 2]])
@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS])
def test_what_a_classifier_reads_is_found_out(name, lengths, tmp_path) -> None:
    """Also where the shortest sequences are one token, the first and the last at once."""
    model, collator = classifier(name)
    step = chosen_for(model, Labelled(lengths), collator, tmp_path)
    assert step.collate.first_read == (name in ENCODERS)  # type: ignore[attr-defined]


def test_a_classifier_of_left_padded_sequences_reads_padding(tmp_path) -> None:
    """BERT's looks at the first column, whatever is there."""
    model, collator = classifier("bert", side="left")
    step = chosen_for(model, Labelled(LENGTHS), collator, tmp_path)
    assert not getattr(step.collate, "first_read", False)


def test_a_mean_over_tokens_reads_them_all(tmp_path) -> None:
    for pooling, first in (("cls", True), ("mean", False)):
        model, collator = classifier("modernbert", classifier_pooling=pooling)
        step = chosen_for(model, Labelled(LENGTHS), collator, tmp_path)
        assert step.collate.first_read == first  # type: ignore[attr-defined]
