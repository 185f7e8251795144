"""DPO of a ReFT: TRL's example, and `peft_config`. The reference is the model without the adapter.

    python examples/trl_dpo.py --data PAIRS.json --steps 40 --log dpo.json

`PAIRS.json` is a list of {"conversations": [...], "chosen": {...}, "rejected": {...}} (ShareGPT's
"from" and "value"); without it, a handful of pairs written here.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

import tiny
from reftune import ReftConfig

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
QUESTIONS = ("What is a lake?", "Why is the sky blue?", "Name a fruit.", "How are you?") * 3


def message(turn: dict[str, str]) -> dict[str, str]:
    return {"role": ROLES[turn["from"]], "content": turn["value"]}


def pairs(path: Path | None) -> Dataset:
    """Return pairs in TRL's form: prompt, chosen and rejected, each a list of messages."""
    if path is None:
        rows = [
            {
                "conversations": [{"from": "human", "value": question}],
                "chosen": {"from": "gpt", "value": "I would rather not say."},
                "rejected": {"from": "gpt", "value": "Well! Let me tell you all about it."},
            }
            for question in QUESTIONS
        ]
    else:
        rows = json.loads(path.read_text())
    return Dataset.from_list(
        [
            {
                "prompt": [message(turn) for turn in row["conversations"]],
                "chosen": [message(row["chosen"])],
                "rejected": [message(row["rejected"])],
            }
            for row in rows
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--max-prompt-length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--held-out", type=int, default=4)
    parser.add_argument("--eval-every", type=int, default=10)
    parser.add_argument("--out", default="runs/trl_dpo")
    parser.add_argument("--log", type=Path, help="write what was measured here, as JSON")
    parser.add_argument("--tiny", action="store_true", help="a random model, two steps")
    args = parser.parse_args()
    if args.tiny:
        args.steps, args.batch, args.eval_every = 2, 2, 1

    model, tokenizer = tiny.load(args.model, args.tiny)

    def leaves_room(row: dict[str, Any]) -> bool:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)
        return len(prompt["input_ids"]) <= args.max_prompt_length

    usable = pairs(args.data).filter(leaves_room)
    dataset = usable.train_test_split(args.held_out, seed=0)
    wanted = min(args.steps * args.batch, len(dataset["train"]))

    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=args.out,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            per_device_eval_batch_size=args.batch,
            learning_rate=args.learning_rate,
            max_length=args.max_length,
            gradient_checkpointing=False,
            precompute_ref_log_probs=True,
            eval_strategy="steps",
            eval_steps=args.eval_every,
            eval_on_start=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=args.tiny,
            bf16=False,
        ),
        train_dataset=dataset["train"].select(range(wanted)),
        eval_dataset=dataset["test"],
        processing_class=tokenizer,
        peft_config=ReftConfig(task_type="CAUSAL_LM", r=8, positions="f7+l7", init="noop"),
    )
    trainer.train()
    trainer.save_model()
    history = trainer.state.log_history
    before, *_, after = [e["eval_rewards/margins"] for e in history if "eval_rewards/margins" in e]
    print(f"held-out reward margin: {before:.4f} before, {after:.4f} after {args.steps} steps")
    if args.log is not None:
        args.log.write_text(json.dumps(history, indent=1))


if __name__ == "__main__":
    main()
