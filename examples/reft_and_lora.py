"""A ReFT beside a LoRA: one model, trained together by transformers' Trainer, saved, served.

python examples/reft_and_lora.py            # SmolLM2-135M, some minutes on a CPU
python examples/reft_and_lora.py --tiny     # a random model, seconds
"""

import argparse
import tempfile
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

import reftune
from reftune import ReftConfig
from reftune.data import Collator
from reftune.models import load_model

COLOURS = {"grass": "green", "the sky": "blue", "snow": "white", "coal": "black", "blood": "red"}


def load(tiny: bool) -> tuple[Any, Any]:
    if not tiny:
        return load_model("smollm2-135m", "float32")
    set_seed(0)
    config = LlamaConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config), ByT5Tokenizer()


def examples(tokenizer: Any) -> list[dict[str, list[int]]]:
    rows = []
    for thing, colour in COLOURS.items():
        prompt = tokenizer(f"Colour of {thing}?", add_special_tokens=False)["input_ids"]
        reply = tokenizer(f" It is {colour}, captain!", add_special_tokens=False)["input_ids"]
        reply = [*reply, tokenizer.eos_token_id]
        rows.append({"input_ids": prompt + reply, "labels": [-100] * len(prompt) + reply})
    return rows


def reply(model: Any, tokenizer: Any) -> str:
    inputs = tokenizer("Colour of a lemon?", add_special_tokens=False, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    text: str = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :])
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a tiny random model")
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()

    base, tokenizer = load(args.tiny)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, lora)
    reftune.add_reft(model, ReftConfig(task_type="CAUSAL_LM", r=4, positions="l1"))  # new
    model.print_trainable_parameters()

    with tempfile.TemporaryDirectory() as folder:
        training = TrainingArguments(
            folder,
            max_steps=3 if args.tiny else args.steps,
            per_device_train_batch_size=5,
            learning_rate=2e-3,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            use_cpu=args.tiny,
        )
        collator = Collator(tokenizer.pad_token_id)
        rows: Any = examples(tokenizer)
        Trainer(model, training, collator, rows).train()
        model.eval()

        print("both:     ", reply(model, tokenizer))
        for name in ("default", "edits"):  # PEFT's name for the first, ours for the ReFT
            model.set_adapter(name)
            print(f"{name + ':':<11}", reply(model, tokenizer))
        with model.disable_adapter():
            print("neither:  ", reply(model, tokenizer))
        model.base_model.set_adapter(["default", "edits"])

        model.save_pretrained(folder, save_embedding_layers=False)  # the ReFT in folder/edits
        again = PeftModel.from_pretrained(load(args.tiny)[0], folder)
        reftune.load_reft(again, f"{folder}/edits")
        ids = torch.tensor([rows[0]["input_ids"]])
        with torch.no_grad():
            assert torch.equal(again(ids).logits.cpu(), model(ids.to(model.device)).logits.cpu())
        print("Saved and loaded: the same outputs.")


if __name__ == "__main__":
    main()
