"""GRPO of a ReFT, with a reward that can be verified: TRL's example, and `peft_config`.

    python examples/trl_grpo.py --steps 40 --log grpo.json

The task is reasoning-gym's `chain_sum`: "... the following arithmetic problem: 4 + 7 =". A reply
is right where its verifier accepts it as it is, with a full stop or without: the number and nothing
else. Rewards of held-out problems are measured, too.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import reasoning_gym
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

import tiny
from reftune import ReftConfig

TASK = {"min_terms": 2, "max_terms": 2, "max_digits": 1}
GYM = reasoning_gym.create_dataset("chain_sum", size=1, **TASK)


def problems(count: int, seed: int, without: Dataset | None = None) -> Dataset:
    """Return problems as TRL wants them: a `prompt`, and what the reward needs beside it."""
    seen = set() if without is None else set(without["prompt"])
    entries = reasoning_gym.create_dataset("chain_sum", size=2 * count, seed=seed, **TASK)
    rows = [{"prompt": e["question"], "answer": e["answer"]} for e in entries]
    return Dataset.from_list([row for row in rows if row["prompt"] not in seen][:count])


def verified(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Return 1 where the verifier accepts the whole reply, 0 elsewhere."""
    replies = [text.strip().removesuffix(".") for text in completions]
    pairs = zip(replies, answer, strict=True)
    return [float(GYM.score_answer(got, {"answer": wanted}) == 1.0) for got, wanted in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32, help="completions of a step")
    parser.add_argument("--generations", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--layers", type=int, nargs="+", help="which are edited; default: all")
    parser.add_argument("--positions", default="f7+l7")
    parser.add_argument("--held-out", type=int, default=16)
    parser.add_argument("--eval-every", type=int, default=10)
    parser.add_argument("--out", default="runs/trl_grpo")
    parser.add_argument("--log", type=Path, help="write what was measured here, as JSON")
    parser.add_argument("--tiny", action="store_true", help="a random model, two steps")
    args = parser.parse_args()
    if args.tiny:
        args.steps, args.batch, args.generations, args.held_out, args.eval_every = 2, 4, 2, 2, 1

    model, tokenizer = tiny.load(args.model, args.tiny)
    where = {"layers": args.layers or "all", "positions": args.positions}
    held_out = problems(args.held_out, seed=1_000_000_000)
    trainer = GRPOTrainer(
        model=model,
        args=GRPOConfig(
            output_dir=args.out,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            per_device_eval_batch_size=args.batch,
            num_generations=args.generations,
            max_completion_length=5,
            learning_rate=args.learning_rate,
            gradient_checkpointing=False,
            eval_strategy="steps",
            eval_steps=args.eval_every,
            eval_on_start=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=args.tiny,
            bf16=False,
        ),
        reward_funcs=verified,
        train_dataset=problems(args.steps * args.batch // args.generations, 0, without=held_out),
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=ReftConfig(task_type="CAUSAL_LM", r=8, init="noop", **where),
    )
    trainer.train()
    trainer.save_model()
    history = trainer.state.log_history
    before, *_, after = [e["eval_reward"] for e in history if "eval_reward" in e]
    print(f"held-out reward: {before:.4f} before, {after:.4f} after {args.steps} steps")
    if args.log is not None:
        args.log.write_text(json.dumps(history, indent=1))


if __name__ == "__main__":
    main()
