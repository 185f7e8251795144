"""The workloads as jobs: model, examples as tokens, setting. Uses reftune to tokenise.

    A  SmolLM2-135M, fp32     commonsense rows, batch 16   all layers, r 8, f7+l7 tied
    B  SmolLM2-135M, fp32     UltraFeedback, batch 4       layers 3;9;18;24, r 4, f5+l5 untied
    C10, C100  SmolLM2-135M   short rows, 100 epochs       layer 15, r 4, l1; whole run
    Q10  SmolLM2-135M         short rows after a system message as long as that of pyreft's
                              quickstart (140 tokens), short answers; as C
    D  Qwen2.5-Coder-0.5B, bf16                            as A
    D32  D in fp32, for CPUs that have no fast bfloat16
    F  SmolLM2-1.7B's shape, bf16                          as A; random weights, for GPUs
    E  MiniLM, fp32           MRPC pairs, batch 32         all layers, r 1, f3, trained head

A, B, D, E and F are one pass over as many examples as the steps take; reftune's own sampler groups
them by length, within fewer batches than it would have of a whole data set.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training_peers.job import Job, Row, Setting

SEED = 42
MODELS = ("smollm2", "smollm2-1.7b", "qwen", "minilm")
COMMONSENSE = ("boolq", "ARC-Easy", "ARC-Challenge", "openbookqa")
PAPER = {"reft": 9e-4, "lora": 3e-4}
SHORT_ROWS = 100
SYSTEM = (
    "You are an assistant who helps people with small tasks. Give the answer and nothing else: no "
    "greeting, no explanation and no repetition of the question. Be accurate and polite, and never "
    "give advice that could hurt somebody. When a question makes no sense, or rests on something "
    "that is not true, say so in a few words and do not guess. When you do not know the answer, "
    "say that you do not know it, and do not make one up. Write in the language of the question, "
    "use plain words, and keep to what was asked. Numbers are written as digits, names as they are "
    "spelled in the question, and lists with a comma between their entries and without a full stop."
)


@dataclass(frozen=True)
class Options:
    """What the command line says about jobs."""

    models: dict[str, str]  # of MODELS
    data_dir: Path
    steps: int | None  # measured ones, of the workloads of one epoch
    epochs: int | None  # of the others
    first_steps: int
    threads: int
    device: str


@dataclass(frozen=True)
class Workload:
    """What is the same for every run of a workload."""

    model: str
    source: str
    setting: Setting
    batch_size: int
    steps: int  # measured ones, if --steps does not say otherwise
    dtype: str = "float32"
    epochs: int = 1
    limit: int = 0  # examples, where there are several epochs
    learning_rate: tuple[float, float] = (PAPER["reft"], PAPER["lora"])
    warmup_ratio: float = 0.1
    task: str = "causal"
    heldout: int = 64


def _all(layers: int) -> list[int]:
    return list(range(layers))


_QUICKSTART = Setting([15], 4, 0, 1, tied=True)
WORKLOADS = {
    "A": Workload("smollm2", "commonsense", Setting(_all(30), 8, 7, 7, tied=True), 16, 40),
    "B": Workload(
        "smollm2", "ultrafeedback", Setting([3, 9, 18, 24], 4, 5, 5, tied=False), 4, 25,
        warmup_ratio=0.0, heldout=16,
    ),
    "C10": Workload(
        "smollm2", "short", _QUICKSTART, 10, 100,
        epochs=100, limit=10, learning_rate=(4e-3, 3e-4), warmup_ratio=0.0,
    ),
    "C100": Workload(
        "smollm2", "short", _QUICKSTART, 10, 1000,
        epochs=100, limit=100, learning_rate=(4e-3, 3e-4), warmup_ratio=0.0,
    ),
    "Q10": Workload(
        "smollm2", "quickstart", _QUICKSTART, 10, 100,
        epochs=100, limit=10, learning_rate=(4e-3, 3e-4), warmup_ratio=0.0,
    ),
    "D": Workload(
        "qwen", "commonsense", Setting(_all(24), 8, 7, 7, tied=True), 16, 25, dtype="bfloat16"
    ),
    "D32": Workload("qwen", "commonsense", Setting(_all(24), 8, 7, 7, tied=True), 16, 25),
    "F": Workload(
        "smollm2-1.7b", "commonsense", Setting(_all(24), 8, 7, 7, tied=True), 16, 60,
        dtype="bfloat16",
    ),
    "E": Workload(
        "minilm", "mrpc", Setting(_all(6), 1, 3, 0, tied=True), 32, 60,
        learning_rate=(3e-4, 3e-4), warmup_ratio=0.0, task="classification",
    ),
}  # fmt: skip


def build(name: str, options: Options) -> Job:
    """Return the job of a workload. Raises KeyError where its model was not given."""
    from reftune.train import EpochSampler

    workload = WORKLOADS[name]
    model = options.models[workload.model]
    tokenizer = _tokenizer(model)
    whole_run = workload.epochs > 1
    epochs = options.epochs or workload.epochs if whole_run else 1
    steps = workload.steps if options.steps is None else options.steps
    wanted = workload.limit if whole_run else (options.first_steps + steps) * workload.batch_size
    rows = _SOURCES[workload.source](options.data_dir, tokenizer, wanted + workload.heldout)
    examples, heldout = rows[:wanted], rows[wanted : wanted + workload.heldout]
    if len(examples) < wanted:
        raise ValueError(f"workload {name} takes {wanted} examples, there are {len(examples)}")
    sampler = EpochSampler([len(r.input_ids) for r in examples], workload.batch_size, SEED)
    grouped = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        grouped += list(sampler)
    reft, lora = workload.learning_rate
    return Job(
        workload=name,
        task=workload.task,
        model=model,
        dtype=workload.dtype,
        pad_token_id=tokenizer.pad_token_id,
        setting=workload.setting,
        batch_size=workload.batch_size,
        epochs=epochs,
        first_steps=0 if whole_run else options.first_steps,
        whole_run=whole_run,
        learning_rate={"reft": reft, "lora": lora},
        warmup_ratio=workload.warmup_ratio,
        threads=options.threads,
        device=options.device,
        seed=SEED,
        examples=examples,
        heldout=examples if whole_run else heldout,  # what is memorised has nothing held out
        plain_order=list(range(wanted)) * epochs,
        grouped_order=grouped,
        num_labels=2 if workload.task == "classification" else 0,
    )


def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def _encoded(
    examples: Sequence[Any], tokenizer: Any, template: Any, max_length: int, limit: int
) -> list[Row]:
    from reftune.prompts import encode_examples

    encoded = encode_examples(examples[: 2 * limit], tokenizer, template, max_length, "skip")
    return [Row(one.input_ids, one.prompt_length) for one in encoded[:limit]]


def commonsense(data_dir: Path, tokenizer: Any, limit: int) -> list[Row]:
    """Return a mixture of the paper's training sets, as many as there are with training rows."""
    from reftune.tasks import training_examples

    examples = training_examples(COMMONSENSE, data_dir / "llm_adapters/dataset", seed=SEED)
    return _encoded(examples, tokenizer, "commonsense", 512, limit)


def ultrafeedback(data_dir: Path, tokenizer: Any, limit: int) -> list[Row]:
    """Return long answers, cut to 768 tokens as the paper's."""
    from reftune.data import load_rows, to_examples

    examples = to_examples(load_rows(data_dir / "instruct/ultrafeedback_1k.jsonl"))
    random.Random(SEED).shuffle(examples)
    return _encoded(examples, tokenizer, "alpaca", 768, limit)


def quickstart(data_dir: Path, tokenizer: Any, limit: int) -> list[Row]:
    """Return the seed tasks with the shortest answers, as chats after a system message."""
    return short(data_dir, tokenizer, limit, SYSTEM)


def short(data_dir: Path, tokenizer: Any, limit: int, system: str | None = None) -> list[Row]:
    """Return the shortest of self-instruct's seed tasks, as chats."""
    from reftune.data import Row as DataRow
    from reftune.data import to_examples

    lines = (data_dir / "instruct/self_instruct_seed_tasks.jsonl").read_text().splitlines()
    tasks = [
        {"instruction": task["instruction"], **task["instances"][0]}
        for task in map(json.loads, lines)
    ]
    keys = ("output",) if system else ("instruction", "input", "output")
    tasks.sort(key=lambda task: sum(len(task[key]) for key in keys))
    tasks = tasks[:SHORT_ROWS]
    random.Random(SEED).shuffle(tasks)
    rows = [DataRow(task, f"seed task {i}") for i, task in enumerate(tasks)]
    return _encoded(to_examples(rows, system=system), tokenizer, "chat", 512, limit)


def mrpc(data_dir: Path, tokenizer: Any, limit: int) -> list[Row]:
    """Return pairs of sentences, and whether they say the same."""
    lines = (data_dir / "glue/mrpc/train.jsonl").read_text().splitlines()
    pairs = [json.loads(line) for line in lines]
    random.Random(SEED).shuffle(pairs)
    pairs = pairs[:limit]
    ids = tokenizer([p["sentence1"] for p in pairs], [p["sentence2"] for p in pairs]).input_ids
    return [Row(row, len(row), int(p["label"])) for row, p in zip(ids, pairs, strict=True)]


_SOURCES = {
    "quickstart": quickstart,
    "commonsense": commonsense,
    "ultrafeedback": ultrafeedback,
    "short": short,
    "mrpc": mrpc,
}
