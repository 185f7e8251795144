"""Choose one of several answers: questions of ARC-Easy, each answer read with the question.

    python examples/multiple_choice.py --data-dir DATA   # DATA/llm_adapters/dataset/ARC-Easy/
    python examples/multiple_choice.py --tiny

As transformers' run_swag, with one line more: `get_peft_model(model, ReftConfig(...))`. PEFT has no
task type for choices; SEQ_CLS is the one whose head has the same name. The prompts of a question
are its answers' (batch x choices), each edited at its own tokens.
"""

import json
import re
from typing import Any

import _tasks
from transformers import AutoModelForMultipleChoice, DataCollatorForMultipleChoice, Trainer

from reftune import ReftConfig

CHOICES = 4


def rows(args: Any, part: str) -> list[dict[str, Any]]:
    """Return questions with four answers and the number of the right one."""
    if args.tiny:
        return [
            {"question": f"what is {word}", "answers": ["red", word, "blue", "sun"], "labels": 1}
            for word in ("sea", "tea", "ice", "sky") * 4
        ]
    file = args.data_dir / "llm_adapters/dataset/ARC-Easy" / f"{part}.json"
    found = []
    for row in json.loads(file.read_text()):
        body = row["instruction"].split("question:", 1)[1].split("Answer format:")[0]
        question, *answers = re.split(r"\s*Answer\d:\s*", body.strip())
        if len(answers) == CHOICES:
            right = int(row["answer"].removeprefix("answer")) - 1
            found.append({"question": question, "answers": answers, "labels": right})
    return found


def main() -> None:
    args = _tasks.parse(_tasks.arguments(__doc__))
    model, tokenizer = _tasks.load_encoder(args, AutoModelForMultipleChoice)

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        asked = [row["question"]] * len(row["answers"])
        encoded = tokenizer(asked, row["answers"], truncation=True, max_length=96)
        return {**encoded, "labels": row["labels"]}

    train, test = ([encode(row) for row in rows(args, part)] for part in ("train", "test"))
    config = ReftConfig(task_type="SEQ_CLS", r=4, positions="f3+l3")
    model = _tasks.adapt(args, model, config)
    model.print_trainable_parameters()

    def score(found: Any) -> dict[str, float]:
        return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}

    trainer = Trainer(
        model,
        _tasks.training_arguments(args),
        train_dataset=train,
        eval_dataset=test[: args.limit],
        data_collator=DataCollatorForMultipleChoice(tokenizer),
        compute_metrics=score,
    )
    _tasks.finish(args, trainer, {"task": "ARC-Easy", "chance": 1 / CHOICES})


if __name__ == "__main__":
    main()
