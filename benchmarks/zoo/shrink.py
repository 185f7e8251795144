"""Make a tiny random model of any class of transformers, from its configuration's defaults.

Every setting that has one of the names below becomes small, in nested configurations, too; what a
name cannot tell stands in `zoo.special`. Nothing here is known to the package.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig

from zoo.special import SETTINGS

VOCAB, WIDTH, HEADS, DEPTH = 99, 32, 4, 3
MOST_PARAMETERS = 30_000_000

# What transformers calls it, and the families' own names.
_BY_VALUE: tuple[tuple[int, str], ...] = (
    (
        VOCAB,
        "vocab_size decoder_vocab_size unpadded_vocab_size vocab_size_per_layer_input "
        "pronunciation_vocab_size shape_vocab_size encoder_hash_byte_group_vocab n_words",
    ),
    (
        WIDTH,
        "hidden_size d_model n_embd emb_dim dim embedding_size embedding_dim embed_dim "
        "word_embed_proj_dim input_embedding_size output_embedding_size lru_width "
        "backbone_hidden_size pronunciation_embed_dim shape_embed_dim out_hidden_size "
        "hidden_dim mamba_d_ssm router_hidden_size text_hidden_size projection_dim output_dim "
        "vision_output_dim encoder_hidden_size attention_hidden_size prompt_mid_dim "
        "decoder_hidden_size",
    ),
    (
        2 * WIDTH,
        "intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim dff dim_ff d_inner n_inner "
        "ffn_hidden_size feed_forward_size intermediate_size_mlp shared_intermediate_size "
        "dense_intermediate_size d_ff decoder_intermediate_size encoder_intermediate_size "
        "hidden_dim_ff",
    ),
    (
        WIDTH // 2,
        "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size "
        "moe_shared_expert_intermediate_size shared_experts_intermediate_size q_lora_rank "
        "hidden_size_per_layer_input o_lora_rank expert_dim laurel_rank hc_lowrank "
        "adapter_rank",
    ),
    (
        DEPTH,
        "num_hidden_layers n_layer n_layers num_layers num_blocks encoder_layers "
        "decoder_layers num_encoder_layers num_decoder_layers num_layers_per_stack depth",
    ),
    (
        HEADS,
        "num_attention_heads encoder_attention_heads decoder_attention_heads n_head n_heads "
        "num_heads attention_heads num_encoder_attention_heads num_decoder_attention_heads "
        "linear_num_value_heads num_query_groups index_n_heads swa_num_attention_heads "
        "num_local_experts num_experts n_routed_experts moe_num_experts linear_num_heads "
        "lightning_nh swa_attention_heads",
    ),
    (
        2,
        "num_experts_per_tok moe_topk moe_k linear_num_key_heads n_group num_expert_group "
        "o_groups num_experts_per_token num_selected_experts",
    ),
    (
        1,
        "n_shared_experts num_shared_experts moe_num_shared_experts topk_group mamba_n_groups "
        "n_groups mamba_ngroups num_mem_blocks first_k_dense_replace num_dense_layers "
        "zero_expert_num num_random_blocks",
    ),
    (
        8,
        "head_dim kv_channels dim_head d_kv d_head attention_head_size linear_key_head_dim "
        "linear_value_head_dim linear_head_dim mamba_head_dim mamba_d_state state_size "
        "ssm_state_size v_head_dim index_head_dim swa_head_dim kv_lora_rank qk_head_dim "
        "attention_head_dim rotary_dim dim_model_base query_pre_attn_scalar global_head_dim "
        "swa_v_head_dim index_topk gated_norm_rank mamba_d_head mamba_headdim",
    ),
    (
        4,
        "qk_rope_head_dim qk_nope_head_dim mamba_chunk_size chunk_size mamba_dt_rank "
        "time_step_rank patch_size image_token_id image_token_index d_rel",
    ),
    (
        5,
        "video_token_id video_token_index audio_token_id",
    ),
    (
        6,
        "sliding_window window_size local_attention attention_window_size sliding_window_size "
        "attention_chunk_size mm_tokens_per_image",
    ),
    (
        64,
        "max_position_embeddings n_positions n_ctx max_seq_len context_length "
        "model_max_length original_max_position_embeddings max_target_positions "
        "max_source_positions rel_extent position_bias_max_distance",
    ),
    (
        16,
        "image_size num_mel_bins",
    ),
)
VALUES: dict[str, int] = {name: v for v, names in _BY_VALUE for name in names.split()}
DEPTHS = frozenset(next(names for v, names in _BY_VALUE if v == DEPTH).split())
# Kinds of layers, one per layer: one of each kind, then again from the first.
KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "indexer_types")
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads")
INITIALISERS = ("initializer_range", "init_std", "initializer_factor")


def tiny_config(model_type: str, model_class: str) -> PreTrainedConfig:
    """Return the shrunken configuration of a class of a model type (transformers' name for it).

    A language model that is a part of a larger one gets its part of the configuration.
    """
    with quiet():
        whole = CONFIG_MAPPING[model_type]
        wanted = getattr(transformers, model_class).config_class
        cls = whole if wanted is None or issubclass(whole, wanted) else wanted
        defaults = cls(**SETTINGS.get(cls.model_type, {}).get("needs", {}))
        return cls(**_shrunken(defaults, cls.model_type))


def tiny_model(model_class: str, config: PreTrainedConfig, seed: int = 0) -> Any:
    """Return the model, random and in evaluation mode, the same one for the same seed.

    Raises ValueError where it is not small after all.
    """
    cls = getattr(transformers, model_class)
    with quiet(), torch.device("meta"):
        size = sum(p.numel() for p in cls(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters: the configuration was not shrunk")
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        model = cls(config).eval()
        _fill(model)
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what transformers logs about settings that are unusual on purpose."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


def _shrunken(config: PreTrainedConfig, model_type: str) -> dict[str, Any]:
    """Return the arguments that make a small configuration of the class of `config`."""
    special = SETTINGS.get(model_type, {})
    own = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "dtype")}
    renamed = {old: new for new, old in config.attribute_map.items()}
    depth = _depth(own)
    settings: dict[str, Any] = dict(special.get("needs", {}))
    for name, value in own.items():
        inner = vars(config).get(name)
        if isinstance(inner, PreTrainedConfig):
            settings[name] = type(inner)(**_shrunken(inner, inner.model_type))
        elif (small := _small(name, renamed.get(name, name), value, own, depth)) is not None:
            settings[name] = small
    settings |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    known = own.keys() | special.get("needs", {})
    settings = {k: v for k, v in settings.items() if k in known}
    for name in special.get("drop", ()):
        settings.pop(name, None)
    return {**settings, **special.get("settings", {})}


def _depth(own: dict[str, Any]) -> int:
    """Return how many layers it takes to have one of each kind."""
    kinds = [len(set(v)) for k in KINDS if isinstance(v := own.get(k), list) and v]
    return max([DEPTH, *kinds])


def _small(name: str, common: str, value: Any, own: dict[str, Any], depth: int) -> Any:
    if name in KINDS and isinstance(value, list) and value:
        kinds = list(dict.fromkeys(value))
        return [kinds[i % len(kinds)] for i in range(depth)]
    if name == "rope_parameters" and isinstance(value, dict):
        return _rope(value)
    if isinstance(value, bool | str | dict | list) or not value:
        return None  # also what is off (0) or derived (None)
    if "drop" in name:
        return type(value)(0)
    if name in INITIALISERS:
        return 0.2 if name != "initializer_factor" else 1.0
    if name == "head_dim" and value == own.get("qk_rope_head_dim"):
        return VALUES["qk_rope_head_dim"]
    if name in KEY_VALUE_HEADS:
        heads = own.get("num_attention_heads") or own.get("n_head") or value
        return HEADS if value == heads else 2
    small = VALUES.get(name, VALUES.get(common))
    if small is None:
        return None
    if name in DEPTHS or common in DEPTHS:
        return depth
    return small if isinstance(value, int) else None


def _rope(value: dict[str, Any]) -> dict[str, Any]:
    """Return plain rotary settings, for each kind of layer where they differ."""
    if not any(k in value for k in ("rope_type", "rope_theta")):
        return {k: _rope(v) if isinstance(v, dict) else v for k, v in value.items()}
    plain: dict[str, Any] = {"rope_type": "default", "rope_theta": value.get("rope_theta", 1e4)}
    if "partial_rotary_factor" in value:
        plain["partial_rotary_factor"] = value["partial_rotary_factor"]
    if "mrope_section" in value:
        plain["mrope_section"] = [1, 1, 2]
    if value.get("rope_type") not in ("default", "llama3", "yarn", "longrope", "dynamic", "linear"):
        plain["rope_type"] = value["rope_type"]
    return plain


def _fill(model: nn.Module) -> None:
    """Give a value to what the class leaves as memory happened to be, or at zero.

    A layer whose output projection starts at zero hides what is edited before it.
    """
    for p in model.parameters():
        if not p.is_floating_point():
            continue
        broken = not bool(p.isfinite().all()) or float(p.abs().max()) > 1e3
        if broken or (p.dim() > 1 and not bool(p.any())):
            bound = 1.0 / math.sqrt(max(1, p.shape[-1]))
            with torch.no_grad():
                p.uniform_(-bound, bound)
