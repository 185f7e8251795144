"""Find the span that answers: which of three sentences says what the question says (STS-B).

    python examples/question_answering.py --data-dir DATA   # DATA/glue/stsb/
    python examples/question_answering.py --tiny

No set of questions with marked answers is at hand, so one is made of real sentences: the question
is a sentence, the context three others of the same genre, and the answer the one that people graded
as (nearly) equivalent, 4 or more of 5. As transformers' run_qa, with one line more:
`get_peft_model(model, ReftConfig(...))`. Start and end of the answer are labels, not prompts.
"""

import json
import random
from typing import Any

import _tasks
import numpy as np
from transformers import AutoModelForQuestionAnswering, DataCollatorWithPadding, Trainer

from reftune import ReftConfig

SENTENCES = 3
EQUIVALENT = 4.0


def rows(args: Any, part: str) -> list[dict[str, Any]]:
    """Return questions, contexts, and where the answer starts and ends in the context."""
    if args.tiny:
        pairs = [
            (f"a {name} runs", f"the {name} is running", "x") for name in ("dog", "cat", "cow")
        ]
    else:
        file = args.data_dir / "glue/stsb" / {"train": "train.jsonl", "test": "dev.jsonl"}[part]
        graded = [json.loads(line) for line in file.read_text().splitlines()]
        pairs = [
            (row["sentence1"], row["sentence2"], row["genre"])
            for row in graded
            if row["score"] >= EQUIVALENT
        ]
    rng = random.Random(0)
    rng.shuffle(pairs)
    found = []
    for question, answer, genre in pairs * (4 if args.tiny else 1):
        others = sorted({b for a, b, other in pairs if other == genre and a != question} - {answer})
        context = [*rng.sample(others, SENTENCES - 1), answer]
        rng.shuffle(context)
        text = " ".join(context)
        start = len(" ".join(context[: context.index(answer)])) + bool(context.index(answer))
        found.append({"question": question, "context": text, "span": (start, start + len(answer))})
    return found


def main() -> None:
    args = _tasks.parse(_tasks.arguments(__doc__))
    model, tokenizer = _tasks.load_encoder(args, AutoModelForQuestionAnswering)

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        encoded = tokenizer(row["question"], row["context"], truncation=True, max_length=160)
        start, end = row["span"]
        places = [encoded.char_to_token(at, sequence_index=1) for at in (start, end - 1)]
        first, last = (0 if at is None else at for at in places)  # 0: it was cut off
        return {**encoded, "start_positions": first, "end_positions": last}

    train, test = ([encode(row) for row in rows(args, part)] for part in ("train", "test"))
    config = ReftConfig(task_type="QUESTION_ANS", r=4, positions="all")
    model = _tasks.adapt(args, model, config)
    model.print_trainable_parameters()

    def score(found: Any) -> dict[str, float]:
        start, end = (logits.argmax(-1) for logits in found.predictions[:2])
        right = [answer == gold for answer, gold in zip((start, end), found.label_ids, strict=True)]
        return {"start": float(right[0].mean()), "exact": float((right[0] & right[1]).mean())}

    trainer = Trainer(
        model,
        _tasks.training_arguments(args, label_names=["start_positions", "end_positions"]),
        train_dataset=train,
        eval_dataset=test[: args.limit],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=score,
    )
    longest = round(float(np.mean([len(row["input_ids"]) for row in train])), 1)
    about = {"task": "equivalent sentence of three (STS-B)", "chance": round(1 / SENTENCES, 4)}
    _tasks.finish(args, trainer, {**about, "rows": len(train), "mean_tokens": longest})


if __name__ == "__main__":
    main()
