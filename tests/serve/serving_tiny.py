"""Tiny random models that vLLM runs on a CPU (heads of 32), adapters for them, and the oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from reftune import ReftConfig
from reftune.generate import Completion, HFEngine, Sampling
from tiny import tiny_tokenizer

GREEDY = Sampling(max_new_tokens=16)

_COMMON: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
ARCHITECTURES: Mapping[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "gemma3_text": {"sliding_window": 16, "query_pre_attn_scalar": 32},
    "phi3": {},
    # vLLM's layers of these return hidden states that have the residual in them already.
    "stablelm": {},
    "cohere": {"tie_word_embeddings": True},
}


def tiny(architecture: str = "llama") -> PreTrainedModel:
    """Return a random fp32 model: 3 layers, hidden size 64, the tiny tokenizer's 259 words."""
    settings = {**_COMMON, **ARCHITECTURES[architecture]}
    config = CONFIG_MAPPING[architecture](**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def save_base(directory: Path, architecture: str = "llama") -> Path:
    """Save a tiny model with its tokenizer."""
    tiny(architecture).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def save_adapter(
    directory: Path, seed: int, architecture: str = "llama", scale: float = 2.0, **config: Any
) -> Path:
    """Save a random adapter whose bias is large enough to change what is generated."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(
            tiny(architecture), ReftConfig(task_type="CAUSAL_LM", **{"r": 4, **config})
        )
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and ".reft" in name:
                parameter.data.normal_().mul_(scale)
    model.save_pretrained(str(directory), save_embedding_layers=False)
    return directory


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Return random prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 259, (n,), generator=generator).tolist() for n in lengths]


def with_adapters(adapters: Mapping[str, Path], architecture: str = "llama") -> HFEngine:
    """Return the oracle: transformers' model with reftune's own tuner."""
    first, *others = adapters
    model = PeftModel.from_pretrained(tiny(architecture), str(adapters[first]), adapter_name=first)
    for name in others:
        model.load_adapter(str(adapters[name]), adapter_name=name)
    return HFEngine(model.eval(), tiny_tokenizer(), batch_size=1)


def expected(
    adapters: Mapping[str, Path],
    inputs: Sequence[list[int]],
    names: Sequence[str | None],
    architecture: str = "llama",
    sampling: Sampling = GREEDY,
) -> list[tuple[int, ...]]:
    """Return the oracle's tokens, each prompt alone with its adapter."""
    completions: list[Completion] = with_adapters(adapters, architecture).generate(
        inputs, sampling, names
    )
    return [c.token_ids for c in completions]
