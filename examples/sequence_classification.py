"""Classify questions (TREC, six types), or grade how alike two sentences are (STS-B).

    python examples/sequence_classification.py --data-dir DATA              # DATA/classification/
    python examples/sequence_classification.py --data-dir DATA --regression # DATA/glue/stsb/
    python examples/sequence_classification.py --tiny

As transformers' run_classification, with one line more: `get_peft_model(model, ReftConfig(...))`.
The task type makes PEFT train and save the new head, too.
"""

import json
from typing import Any

import _tasks
import numpy as np
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
)

from reftune import ReftConfig

TYPES = ("description", "entity", "abbreviation", "person", "place", "number")


def rows(args: Any, part: str) -> list[dict[str, Any]]:
    """Return texts, one or two each, and what they are labelled."""
    if args.tiny:
        texts = [("how many are there", 5), ("who was it", 3), ("where is it", 4)]
        made = [{"texts": [text], "labels": label} for text, label in texts * 8]
        return [row | {"labels": float(row["labels"])} for row in made] if args.regression else made
    if args.regression:
        file = args.data_dir / "glue/stsb" / {"train": "train.jsonl", "test": "dev.jsonl"}[part]
        found = [json.loads(line) for line in file.read_text().splitlines()]
        pairs = [([row["sentence1"], row["sentence2"]], row["score"]) for row in found]
        return [{"texts": texts, "labels": float(score)} for texts, score in pairs]
    file = args.data_dir / "classification" / f"TREC.{part}.all.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()]
    return [{"texts": [row["text"]], "labels": int(row["label"])} for row in found]


def main() -> None:
    parser = _tasks.arguments(__doc__)
    parser.add_argument("--regression", action="store_true", help="grade pairs of sentences")
    args = _tasks.parse(parser)
    labels = 1 if args.regression else len(TYPES)
    model, tokenizer = _tasks.load_encoder(
        args, AutoModelForSequenceClassification, num_labels=labels
    )

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        return {**tokenizer(*row["texts"], truncation=True), "labels": row["labels"]}

    train, test = ([encode(row) for row in rows(args, part)] for part in ("train", "test"))
    # The first token is what the head reads.
    config = ReftConfig(task_type="SEQ_CLS", r=4, positions="f3+l3")
    model = _tasks.adapt(args, model, config)
    model.print_trainable_parameters()

    def score(found: Any) -> dict[str, float]:
        if args.regression:
            grades = found.predictions.reshape(-1)
            return {"pearson": float(np.corrcoef(grades, found.label_ids)[0, 1])}
        return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}

    trainer = Trainer(
        model,
        _tasks.training_arguments(args),
        train_dataset=train,
        eval_dataset=test[: args.limit],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=score,
    )
    usual = np.bincount([row["labels"] for row in train]).argmax() if not args.regression else None
    about = {} if usual is None else {"majority": majority(test[: args.limit], usual)}
    _tasks.finish(args, trainer, {"task": "STS-B" if args.regression else "TREC", **about})


def majority(test: list[dict[str, Any]], usual: int) -> float:
    """Return the accuracy of always giving the commonest label of training."""
    return round(float(np.mean([row["labels"] == usual for row in test])), 4)


if __name__ == "__main__":
    main()
