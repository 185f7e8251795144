"""A Hub cache with tiny random models under the ids that PEFT's tests load, made on the spot.

With it and HF_HUB_OFFLINE=1 the tests run unchanged and without a network: `from_pretrained` finds
every id in the cache, of the architecture that its name says. The weights are random with a wide
spread, so that an adapter's effect on the logits exceeds the tests' tolerances; padding is the end
token, as the tests strip that one alone from what two batches generated. No tokenizers: no test of
ours reads text.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import transformers as tf

_SIZES = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_GPT = {
    "vocab_size": 259,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OPT = {
    **{k: v for k, v in _SIZES.items() if k not in ("intermediate_size", "initializer_range")},
    "ffn_dim": 64,
    "word_embed_proj_dim": 32,
    "pad_token_id": 2,
    "init_std": 0.2,
}
_BART = {
    "vocab_size": 259,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "pad_token_id": 2,
    "max_position_embeddings": 128,
    "init_std": 0.2,
}
_T5 = {
    "vocab_size": 259,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
    "initializer_factor": 2.0,
}

MODELS: Mapping[str, tuple[str, str, dict[str, object]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTConfig", "OPTForCausalLM", _OPT),
    "peft-internal-testing/opt-125m": ("OPTConfig", "OPTForCausalLM", _OPT),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2Config", "GPT2LMHeadModel", _GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        "GPTJConfig",
        "GPTJForCausalLM",
        {**_GPT, "rotary_dim": 4},
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": (
        "LlamaConfig",
        "LlamaForCausalLM",
        _GROUPED,
    ),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _GROUPED),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**_GROUPED, "head_dim": 8, "tie_word_embeddings": False},
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5Config",
        "T5ForConditionalGeneration",
        _T5,
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartConfig",
        "BartForConditionalGeneration",
        _BART,
    ),
    "peft-internal-testing/tiny-random-BertModel": ("BertConfig", "BertModel", _SIZES),
    "peft-internal-testing/tiny-random-RobertaModel": (
        "RobertaConfig",
        "RobertaModel",
        {**_SIZES, "max_position_embeddings": 130},
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaConfig",
        "RobertaForSequenceClassification",
        {**_SIZES, "max_position_embeddings": 130},
    ),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaConfig", "DebertaModel", _SIZES),
    "peft-internal-testing/tiny-random-DebertaV2Model": (
        "DebertaV2Config",
        "DebertaV2Model",
        _SIZES,
    ),
    "bert-base-uncased": ("BertConfig", "BertForSequenceClassification", _SIZES),
}
"""Model id -> names of transformers' config and model class, and the config's arguments."""

_REVISION = "0" * 40


def build(cache: Path) -> None:
    """Write every model of `MODELS` into the Hub cache directory `cache` (what HF_HUB_CACHE names).

    Seeded: the same files each time.
    """
    for model_id, (config_cls, model_cls, arguments) in MODELS.items():
        folder = cache / f"models--{model_id.replace('/', '--')}"
        snapshot = folder / "snapshots" / _REVISION
        snapshot.mkdir(parents=True, exist_ok=True)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(_REVISION)
        torch.manual_seed(0)
        config = getattr(tf, config_cls)(**arguments)
        getattr(tf, model_cls)(config).save_pretrained(snapshot)
