"""Write a model of SmolLM2-1.7B's shape with random weights: for time and memory, not for losses.

python benchmarks/training_peers/random_model.py TOKENIZER OUT

TOKENIZER is a directory with SmolLM2's (REFTUNE_CACHE's smollm2-135m-v1); OUT gets both, 3.4 GB in
bfloat16.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

# https://huggingface.co/HuggingFaceTB/SmolLM2-1.7B, config.json
SHAPE = LlamaConfig(
    vocab_size=49152,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=24,
    num_attention_heads=32,
    num_key_value_heads=32,
    max_position_embeddings=8192,
    rope_parameters={"rope_type": "default", "rope_theta": 130000.0},
    tie_word_embeddings=True,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(SHAPE).to(torch.bfloat16)
    model.cpu().save_pretrained(args.out)
    AutoTokenizer.from_pretrained(args.tokenizer).save_pretrained(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
