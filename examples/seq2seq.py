"""Rewrite words with an encoder-decoder: an adapter picks one of the skills that a frozen T5 has.

    python examples/seq2seq.py --data-dir DATA     # words of DATA/alice_in_wonderland.txt
    python examples/seq2seq.py --tiny

No pretrained encoder-decoder is at hand, so a small T5 is first trained from scratch on two skills:
"=word" is copied, "<word" has its letters turned round. Frozen, it is then given "?word", a mark
that it never saw, and an adapter learns from examples that this means to turn round. What this
shows: edits of the encoder's states at a few positions choose what the decoder writes. It is no
measure of language. As transformers' run_summarization, with one line more: `get_peft_model(model,
ReftConfig(...))`. Positions are counted in the encoder's input; what the decoder writes is never
edited.
"""

import re
from pathlib import Path
from typing import Any

import _tasks
import numpy as np
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

from reftune import ReftConfig

HELD_OUT = 100
LONGEST = 6
SKILLS = {"=": lambda word: word, "<": lambda word: word[::-1]}


def words_of(args: Any) -> list[str]:
    """Return the different words of 3 to 6 letters, in an order that means nothing."""
    text = "the cat saw a red house by sea" if args.tiny else read(args.data_dir)
    words = sorted({word.lower() for word in re.findall(r"[A-Za-z]+", text)})
    words = [word for word in words if 3 <= len(word) <= LONGEST]
    return [words[i] for i in np.random.default_rng(0).permutation(len(words))]


def read(folder: Path) -> str:
    return (folder / "alice_in_wonderland.txt").read_text(encoding="utf-8")


def encode(tokenizer: PreTrainedTokenizerFast, source: str, target: str) -> dict[str, Any]:
    """Return the tokens of both, one for a letter; the target ends with [SEP]."""
    letters = tokenizer(" ".join(target))["input_ids"]
    return {"input_ids": tokenizer(" ".join(source))["input_ids"], "labels": letters[1:]}


def main() -> None:
    parser = _tasks.arguments(__doc__, model=None, steps=200)
    parser.add_argument("--base-steps", type=int, default=2500, help="to train the T5 itself")
    parser.set_defaults(batch_size=32, limit=HELD_OUT)
    args = _tasks.parse(parser)
    words, tokenizer = words_of(args), _tasks.letters_tokenizer()
    held_out = min(HELD_OUT, len(words) // 4)
    # Half of the words are for the base, the others for the adapter: it learns no word by heart.
    test, rest = words[:held_out], words[held_out:]
    skills = [
        encode(tokenizer, mark + word, skill(word))
        for word in rest[::2]
        for mark, skill in SKILLS.items()
    ]
    unknown = [encode(tokenizer, f"?{word}", word[::-1]) for word in rest[1::2]]
    scored = [encode(tokenizer, f"?{word}", word[::-1]) for word in test]

    def score(found: Any) -> dict[str, float]:
        right = [
            [token for token in answer[1:] if token > 0] == [token for token in gold if token > 0]
            for answer, gold in zip(found.predictions, found.label_ids, strict=True)
        ]
        return {"exact": float(np.mean(right))}

    def trainer_of(model: Any, rows: list[dict[str, Any]], **settings: Any) -> Seq2SeqTrainer:
        given = {
            "kind": Seq2SeqTrainingArguments,
            "predict_with_generate": True,
            "generation_max_length": LONGEST + 3,
            **settings,
        }
        return Seq2SeqTrainer(
            model,
            _tasks.training_arguments(args, **given),
            train_dataset=rows,
            eval_dataset=scored[: args.limit],
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            compute_metrics=score,
        )

    base = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.sep_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
    )
    own = {"max_steps": args.steps if args.tiny else args.base_steps, "learning_rate": 2e-3}
    first = trainer_of(base, skills, **own)
    first.train()
    known = [encode(tokenizer, f"<{word}", word[::-1]) for word in test]
    skill = first.evaluate(known[: args.limit])["eval_exact"]
    untold = first.evaluate()["eval_exact"]

    config = ReftConfig(task_type="SEQ_2_SEQ_LM", r=4, positions="f3+l3")
    model = _tasks.adapt(args, base.requires_grad_(False), config, {"target_modules": ["q", "v"]})
    model.print_trainable_parameters()
    about = {"task": "turn a word round, asked by an unknown mark", "base_asked_by_its_mark": skill}
    _tasks.finish(args, trainer_of(model, unknown), {**about, "base": untold})


if __name__ == "__main__":
    main()
