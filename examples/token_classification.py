"""Tag words: which of *Alice in Wonderland* are written with a capital, seen in lower case?

    python examples/token_classification.py --data-dir DATA    # DATA/alice_in_wonderland.txt
    python examples/token_classification.py --tiny

The tags are made by a rule from the text: a word inside a sentence that begins with a capital
(Alice, Rabbit, I) is one. MiniLM reads lower case, so it has to know a name by its context. As
transformers' run_ner, with one line more: `get_peft_model(model, ReftConfig(...))`. The labels have
-100 where there is nothing to tag; the prompt is the whole input all the same.
"""

import re
from typing import Any

import _tasks
import numpy as np
from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    Trainer,
)

from reftune import ReftConfig

ALICE = "alice_in_wonderland.txt"
TINY = "So she saw a White Rabbit near. The cat and Alice went to sea. Then Bill was on the roof. "


def sentences(text: str) -> list[list[str]]:
    """Return sentences of 4 to 40 words, as they are written."""
    found = re.split(r"(?<=[.!?;:])['\s]+", " ".join(text.split()))
    words = [re.findall(r"[A-Za-z]+|[^A-Za-z\s]", sentence) for sentence in found]
    return [sentence for sentence in words if 4 <= len(sentence) <= 40]


def tags_of(words: list[str]) -> list[int]:
    """Return 1 for a word with a capital, 0 for one without, -100 where there is nothing to tell.

    Nothing can be told of what begins a sentence or follows a mark, nor of a shouted word.
    """
    tags, told = [], False
    for word in words:
        shouted = len(word) > 1 and word.isupper()
        is_word = word.isalpha() and told and not shouted
        tags.append(int(word[0].isupper()) if is_word else -100)
        told = word.isalpha() or word == ","
    return tags


def main() -> None:
    args = _tasks.parse(_tasks.arguments(__doc__))
    text = TINY * 8 if args.tiny else (args.data_dir / ALICE).read_text(encoding="utf-8")
    model, tokenizer = _tasks.load_encoder(args, AutoModelForTokenClassification, num_labels=2)

    def encode(words: list[str]) -> dict[str, Any]:
        encoded = tokenizer([word.lower() for word in words], is_split_into_words=True)
        tags, places = tags_of(words), encoded.word_ids()
        # A word is tagged at its first piece.
        first = [i for i, at in enumerate(places) if at is not None and at != places[i - 1]]
        labels = [-100] * len(places)
        for i in first:
            labels[i] = tags[places[i]]
        return {**encoded, "labels": labels}

    rows = [encode(words) for words in sentences(text)]
    border = len(rows) * 4 // 5  # the last chapters are held out
    config = ReftConfig(task_type="TOKEN_CLS", r=4, positions="all")
    model = _tasks.adapt(args, model, config)
    model.print_trainable_parameters()

    def score(found: Any) -> dict[str, float]:
        told = found.label_ids != -100
        gold, answer = found.label_ids[told] == 1, found.predictions.argmax(-1)[told] == 1
        right = float((gold & answer).sum())
        f1 = 2 * right / max(float(gold.sum() + answer.sum()), 1.0)
        return {"accuracy": float((gold == answer).mean()), "f1": f1}

    trainer = Trainer(
        model,
        _tasks.training_arguments(args),
        train_dataset=rows[:border],
        eval_dataset=rows[border:][: args.limit],
        data_collator=DataCollatorForTokenClassification(tokenizer),
        compute_metrics=score,
    )
    gold = np.concatenate([row["labels"] for row in rows[border:][: args.limit]])
    small = round(float((gold[gold != -100] == 0).mean()), 4)
    _tasks.finish(args, trainer, {"task": "capitals of Alice", "majority": small})


if __name__ == "__main__":
    main()
