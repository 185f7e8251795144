"""What the names of settings cannot tell, by model type.

`needs`: what the class wants before it can be made with defaults. `settings`: on top of what was
shrunken. `drop`: names to leave to the class, which derives them.
"""

from typing import Any

TWO = ["sliding_attention", "full_attention"]
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "mamba_d_ssm": 64}
LINEAR = ["linear_attention", "full_attention", "linear_attention"]

SWIN = {"embed_dim": 24, "depths": [1, 2], "num_heads": [3, 6]}

SETTINGS: dict[str, dict[str, Any]] = {
    **{key: {"settings": SWIN} for key in ("swin", "swinv2", "donut-swin")},
    "bamba": {"settings": {**MAMBA2, "attn_layer_indices": [1]}},
    "falcon_h1": {"settings": MAMBA2},
    "granitemoehybrid": {"settings": {**MAMBA2, "layer_types": LINEAR}},
    "mamba2": {"settings": {"num_heads": 8, "head_dim": 8}},
    "xlstm": {
        "settings": {"hidden_size": 64, "embedding_dim": 64, "chunk_size": 4, "qk_dim_factor": 1.0}
    },
    "zamba": {
        "settings": {
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
            "num_hidden_layers": 4,
            "attention_hidden_size": 64,
            "attention_head_dim": 16,
        }
    },
    "zamba2": {
        "settings": {
            "layers_block_type": ["linear_attention", "hybrid"] * 2,
            "num_hidden_layers": 4,
        },
        "drop": ["attention_hidden_size", "attention_head_dim", "mamba_headdim", "kv_channels"],
    },
    "musicgen_decoder": {"settings": {"num_codebooks": 1}},
    "musicgen_melody_decoder": {"settings": {"num_codebooks": 1}},
    "zaya": {"settings": {"num_experts_per_tok": 1}},
    "jamba": {"settings": {"attn_layer_period": 2, "attn_layer_offset": 1}},
    "deepseek_v2": {"settings": {"num_experts_per_tok": 2}},
    "dots3_note_text": {
        "settings": {
            **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16},
            **{"swa_kv_lora_rank": 8, "swa_head_dim": 8, "swa_qk_nope_head_dim": 4},
            **{"swa_v_head_dim": 8, "num_key_value_heads": 4},
        },
    },
    "dots1": {"settings": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}},
    "cohere_compass_text": {"settings": {"rope_parameters": {"full_attention": PLAIN_ROPE}}},
    "dbrx": {"settings": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}}},
    "gpt_neo": {
        "settings": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
        "drop": ["attention_layers"],
    },
    "gemma3n_text": {"settings": {"num_kv_shared_layers": 0}},
    "gemma4_assistant": {
        "needs": {
            "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
        }
    },
    "hrm_text": {"settings": {"num_hidden_layers": 2}, "drop": ["num_layers_per_stack"]},
    "mobilebert": {"settings": {"initializer_range": 0.05}},  # no norms: it overflows
    "mistral4": {
        "settings": {
            "head_dim": 4,
            "rope_parameters": {
                **PLAIN_ROPE,
                "llama_4_scaling_beta": 0.1,
                "original_max_position_embeddings": 64,
            },
        }
    },
    "hy_v4": {"settings": {"index_topk": 64}},  # nothing left out: no jumps by rounding
    "hunyuan_v1_dense": {"settings": {"head_dim": 8}},
    "hunyuan_v1_moe": {"settings": {"head_dim": 8}},
    "ministral": {"settings": {"head_dim": 8}},
    "ministral3": {
        "settings": {
            "rope_parameters": {
                **PLAIN_ROPE,
                "llama_4_scaling_beta": 0.1,
                "original_max_position_embeddings": 64,
            }
        }
    },
    "nemotron": {"settings": {"num_key_value_heads": 2}},
    "lfm2_moe": {"settings": {"layer_types": ["conv", "full_attention", "conv"]}},
    "qwen4_exp_text": {
        "settings": {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
        }
    },
    "reformer": {
        "settings": {
            "is_decoder": True,
            "attn_layers": ["local", "local", "local"],
            "axial_pos_embds": False,
            "local_attn_chunk_length": 4,
        }
    },
    "xmod": {"settings": {"default_language": "en_XX"}},
}

# Where the layers cannot be told by structure: their path, by kind and model type.
LAYERS_PATHS: dict[tuple[str, str], str] = {
    ("causal", "hrm_text"): "model.H_module.layers",
    ("causal", "xlm"): "transformer.layer_norm2",
    ("seq-cls", "xlm"): "transformer.layer_norm2",
    ("seq-cls", "flaubert"): "transformer.layer_norm2",
}
