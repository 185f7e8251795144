"""A reward model as a ReFT, from preference pairs: TRL's example, and `peft_config`.

    python examples/trl_reward.py --data PAIRS.json --steps 30

A reward model reads a whole text and has no prompt: `f7+l7` are the text's first and last tokens.
`task_type="SEQ_CLS"` has PEFT train and save the head, too. Data as for trl_dpo.py.
"""

import argparse
from pathlib import Path

from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer
from trl_dpo import pairs

import tiny
from reftune import ReftConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--out", default="runs/trl_reward")
    parser.add_argument("--tiny", action="store_true", help="a random model, two steps")
    args = parser.parse_args()

    kind = AutoModelForSequenceClassification
    model, tokenizer = tiny.load(args.model, args.tiny, kind, num_labels=1)
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(
            output_dir=args.out,
            max_steps=2 if args.tiny else args.steps,
            per_device_train_batch_size=args.batch,
            learning_rate=1e-3,
            max_length=args.max_length,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=args.tiny,
            bf16=False,
        ),
        train_dataset=pairs(args.data),
        processing_class=tokenizer,
        peft_config=ReftConfig(task_type="SEQ_CLS", r=8, positions="f7+l7"),
    )
    trainer.train()
    trainer.save_model()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    first, last = (history[i]["accuracy"] for i in (0, -1))
    print(f"right pairs: {first} of the first batch, {last} of the last of {len(history)}")


if __name__ == "__main__":
    main()
