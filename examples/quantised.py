"""A ReFT on a base in 4 or 8 bits: PEFT's QLoRA example with another config.

    python examples/quantised.py                 # SmolLM2-135M in 4 bits, some minutes on a CPU
    python examples/quantised.py --eight         # in 8 bits
    python examples/quantised.py --tiny          # a random model, seconds

As a run: `reftune train recipes/demo.yaml quantization=bnb-4bit`.
"""

import argparse
import tempfile
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from reftune import ReftConfig
from reftune.models import resolve

PROMPT, REPLY = "Say something nice.", " You have read this far: thank you!"


def tiny_model(folder: str) -> str:
    config = LlamaConfig(
        vocab_size=384, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a tiny random model")
    parser.add_argument("--eight", action="store_true", help="8 bits (LLM.int8) in place of 4")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    torch.manual_seed(0)

    with tempfile.TemporaryDirectory() as folder:
        name = tiny_model(f"{folder}/base") if args.tiny else resolve("smollm2-135m")
        tokenizer: Any = ByT5Tokenizer() if args.tiny else AutoTokenizer.from_pretrained(name)
        if args.eight:
            quantised = BitsAndBytesConfig(load_in_8bit=True)
        else:
            quantised = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
            )

        def load() -> Any:
            return AutoModelForCausalLM.from_pretrained(
                name, quantization_config=quantised, dtype=torch.float32
            )

        # In place of LoraConfig. No prepare_model_for_kbit_training: nothing of the base is trained
        model = get_peft_model(load(), ReftConfig(task_type="CAUSAL_LM", r=4, positions="f1+l2"))
        model.print_trainable_parameters()
        print(f"base: {model.get_memory_footprint() / 1e6:.1f} MB")

        prompt = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
        reply = tokenizer(REPLY, add_special_tokens=False)["input_ids"]
        reply = [*reply, tokenizer.eos_token_id]
        ids = torch.tensor([prompt + reply], device=model.device)
        labels = torch.tensor([[-100] * len(prompt) + reply], device=model.device)
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
        model.train()
        for step in range(3 if args.tiny else args.steps):
            loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 5 == 0:
                print(f"step {step:>2}  loss {loss.item():.3f}")
        model.eval()
        model.save_pretrained(f"{folder}/adapter", save_embedding_layers=False)

        loaded = PeftModel.from_pretrained(load(), f"{folder}/adapter")
        asked = torch.tensor([prompt], device=loaded.device)
        tokens = loaded.generate(input_ids=asked, max_new_tokens=20, do_sample=False)
        print(PROMPT, "->", tokenizer.decode(tokens[0, len(prompt) :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
