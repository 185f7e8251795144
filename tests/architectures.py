"""The matrix of architectures: tiny random models of many families, and inputs for each.

What an entry states (the path of its layers, their number) is what the structural search of
`reftune.layers` is checked against; nothing here is known to the package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
import transformers
from torch import Tensor

VOCAB = 96
LENGTH = 11
DEPTH = 3
# Large enough that an edit of one row moves the output far beyond rounding.
INIT = 0.2
IMAGE, IMAGE_TOKEN = 16, 5

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": INIT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,  # greedy decoding runs to its full length
    # Dropout under the names that the families give it: two passes in training mode must agree.
    **dict.fromkeys(
        [
            *("attention_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob"),
            *("resid_pdrop", "embd_pdrop", "attn_pdrop", "embd_dropout", "hidden_dropout"),
            *("dropout", "dropout_rate", "activation_dropout", "embedding_dropout", "mlp_dropout"),
        ],
        0.0,
    ),
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4}
VIT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "image_size": IMAGE,
    "patch_size": 4,
    "initializer_range": INIT,
}


@dataclass(frozen=True)
class Architecture:
    """A family of models, with a tiny random member.

    Attributes:
        model: name of the model's class in transformers.
        config: name of the configuration's class.
        settings: of the configuration.
        layers: the path of the layers that a prompt goes through.
        kind: "decoder", "encoder", "seq2seq", "vision" or "vision-language".
        depth: how many layers there are.
        pads: the sides on which the base model itself computes the same for a prompt with padding
            as for the prompt alone.
        embeddings_first: whether `hidden_states` starts with the embeddings.
        images: makes the images of a batch, for a model that sees.
    """

    model: str
    config: str
    settings: Mapping[str, Any]
    layers: str
    kind: str = "decoder"
    depth: int = DEPTH
    pads: tuple[str, ...] = ("right", "left")
    embeddings_first: bool = True
    images: Callable[[int, torch.Generator], dict[str, Tensor]] | None = None

    @property
    def generates(self) -> bool:
        """Return whether the model continues its prompt, token by token."""
        return self.kind in ("decoder", "vision-language")

    @property
    def reads_text(self) -> bool:
        """Return whether the prompt is `input_ids`."""
        return self.kind != "vision"

    @property
    def takes_position_ids(self) -> bool:
        """Return whether the model's forward has the argument."""
        return "position_ids" in signature(getattr(transformers, self.model).forward).parameters

    def make(self, seed: int = 0, model: str | None = None, **settings: Any) -> Any:
        """Return the model in evaluation mode, the same one for the same seed.

        `model` names another class of the family, `settings` are added to the configuration.
        """
        config = getattr(transformers, self.config)(**{**self.settings, **settings})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return getattr(transformers, model or self.model)(config).eval()

    def inputs(self, batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
        """Return random inputs: `batch` prompts of `LENGTH` tokens."""
        g = torch.Generator().manual_seed(seed)
        if self.kind == "vision":
            return _square(batch, g)
        ids = torch.randint(6, VOCAB, (batch, LENGTH), generator=g)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.kind == "seq2seq":
            inputs["decoder_input_ids"] = torch.randint(6, VOCAB, (batch, 4), generator=g)
        if self.images is not None:
            ids[:, 2:6] = IMAGE_TOKEN  # each image is four tokens
            inputs |= self.images(batch, g)
        return inputs


def _square(batch: int, g: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, IMAGE, IMAGE, generator=g)}


def _patches(batch: int, g: torch.Generator) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.randn(batch * 16, 3 * 2 * 4 * 4, generator=g),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * batch),
        "mm_token_type_ids": torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0]] * batch),
    }


def _decoder(name: str, layers: str = "model.layers", **settings: Any) -> Architecture:
    flags = {k: settings.pop(k) for k in ("pads", "embeddings_first") if k in settings}
    model = settings.pop("model", f"{name}ForCausalLM")
    config = f"{settings.pop('config', name)}Config"
    return Architecture(model, config, {**COMMON, **settings}, layers, **flags)


def _encoder(name: str, layers: str, model: str = "Model", **settings: Any) -> Architecture:
    flags = {k: settings.pop(k) for k in ("pads", "embeddings_first") if k in settings}
    merged = {**COMMON, **settings}
    return Architecture(f"{name}{model}", f"{name}Config", merged, layers, "encoder", **flags)


ARCHITECTURES: dict[str, Architecture] = {
    "llama": _decoder("Llama", **GROUPED),
    "qwen2": _decoder("Qwen2", num_key_value_heads=2),
    "qwen3": _decoder("Qwen3", **GROUPED),
    "gemma3": _decoder(
        "Gemma3",
        config="Gemma3Text",
        **GROUPED,
        query_pre_attn_scalar=8,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "mistral": _decoder("Mistral", **GROUPED, sliding_window=6),
    "phi": _decoder("Phi"),
    "phi3": _decoder("Phi3", num_key_value_heads=2),
    "gpt2": _decoder("GPT2", "transformer.h", model="GPT2LMHeadModel", n_inner=64),
    "gpt-neox": _decoder("GPTNeoX", "gpt_neox.layers"),
    "opt": _decoder("OPT", "model.decoder.layers", ffn_dim=64, word_embed_proj_dim=32),
    "falcon": _decoder("Falcon", "transformer.h"),
    "bloom": _decoder("Bloom", "transformer.h"),
    "qwen3-moe": _decoder("Qwen3Moe", **GROUPED, **EXPERTS, moe_intermediate_size=16),
    "mixtral": _decoder("Mixtral", **GROUPED, **EXPERTS),
    "qwen3-next": _decoder(
        "Qwen3Next",
        **GROUPED,
        **EXPERTS,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    ),
    "falcon-h1": _decoder(
        "FalconH1",
        **GROUPED,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_n_groups=1,
        mamba_d_state=8,
        mamba_chunk_size=4,
    ),
    "mamba": _decoder("Mamba", "backbone.layers", embeddings_first=False, state_size=8),
    "mamba2": _decoder(
        "Mamba2",
        "backbone.layers",
        embeddings_first=False,
        num_heads=8,
        head_dim=8,
        n_groups=1,
        state_size=8,
        chunk_size=4,
    ),
    "jamba": _decoder(
        "Jamba",
        num_key_value_heads=2,
        **EXPERTS,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
    ),
    "bert": _encoder("Bert", "encoder.layer", pads=("right",)),
    "roberta": _encoder("Roberta", "encoder.layer"),
    "modernbert": _encoder("ModernBert", "layers", cls_token_id=1, sep_token_id=2),
    "deberta-v2": _encoder(
        "DebertaV2",
        "encoder.layer",
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
    ),
    "distilbert": _encoder(
        "DistilBert",
        "transformer.layer",
        pads=("right",),
        dim=32,
        hidden_dim=64,
        n_heads=4,
        n_layers=DEPTH,
    ),
    "mpnet": _encoder("MPNet", "encoder.layer", pads=("right",)),
    "t5": Architecture(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            **COMMON,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": DEPTH,
            "num_heads": 4,
            "num_decoder_layers": 2,
            "initializer_factor": 1.0,
            "decoder_start_token_id": 0,
        },
        "encoder.block",
        "seq2seq",
    ),
    "bart": Architecture(
        "BartForConditionalGeneration",
        "BartConfig",
        {
            **COMMON,
            "d_model": 32,
            "encoder_layers": DEPTH,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "init_std": INIT,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": None,
        },
        "model.encoder.layers",
        "seq2seq",
        pads=("right",),
    ),
    "llava": Architecture(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {"model_type": "llama", **COMMON, **GROUPED},
            "vision_config": {"model_type": "clip_vision_model", **VIT, "patch_size": 8},
            "image_token_index": IMAGE_TOKEN,
            "vision_feature_layer": -1,
        },
        "model.language_model.layers",
        "vision-language",
        images=_square,
    ),
    "idefics3": Architecture(
        "Idefics3ForConditionalGeneration",
        "Idefics3Config",
        {
            "text_config": {"model_type": "llama", **COMMON, **GROUPED},
            "vision_config": VIT,
            "image_token_id": IMAGE_TOKEN,
            "scale_factor": 2,
            "pad_token_id": 0,
        },
        "model.text_model.layers",
        "vision-language",
        images=lambda batch, g: {"pixel_values": _square(batch, g)["pixel_values"][:, None]},
    ),
    "qwen2.5-vl": Architecture(
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {
            "text_config": {
                **COMMON,
                "num_key_value_heads": 2,
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
            },
            "vision_config": {
                "depth": DEPTH,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_heads": 4,
                "out_hidden_size": 32,
                "patch_size": 4,
                "window_size": 16,
                "fullatt_block_indexes": [1],
                "initializer_range": INIT,
            },
            "image_token_id": IMAGE_TOKEN,
            "video_token_id": 4,
            "vision_start_token_id": 3,
            "vision_end_token_id": 2,
        },
        "model.language_model.layers",
        "vision-language",
        images=_patches,
    ),
    "vit": Architecture("ViTModel", "ViTConfig", VIT, "layers", "vision"),
    "dinov2": Architecture("Dinov2Model", "Dinov2Config", VIT, "encoder.layer", "vision"),
}
