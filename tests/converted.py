"""The recorded checkpoints of other libraries, their base models, and what was converted."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

DATA = Path(__file__).parent / "data" / "convert"
PYREFT = Path(__file__).parent / "data" / "pyreft"
TOLERANCE = 1e-5


@cache
def recorded(library: str) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Return the index of a library's cases, and their logits by name."""
    folder = DATA / library
    cases = json.loads((folder / "index.json").read_text())["cases"]
    return cases, load_file(folder / "logits.safetensors")


def names(library: str) -> list[str]:
    return [case["name"] for case in recorded(library)[0]]


def case(library: str, name: str) -> dict[str, Any]:
    return next(c for c in recorded(library)[0] if c["name"] == name)


@cache
def base_directory(root: Path) -> str:
    """Write the base model's config alone: conversion reads no weights of it."""
    config = json.loads((PYREFT / "base_config.json").read_text())
    folder = root / "base"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def base_model() -> LlamaForCausalLM:
    config = LlamaConfig(**json.loads((PYREFT / "base_config.json").read_text()))
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    model.load_state_dict(load_file(PYREFT / "base.safetensors"))
    return model.eval()


def classifier() -> LlamaForSequenceClassification:
    config = LlamaConfig(**json.loads((PYREFT / "base_config.json").read_text()), num_labels=3)
    config._attn_implementation = "eager"
    model = LlamaForSequenceClassification(config)
    model.load_state_dict(load_file(PYREFT / "base.safetensors"), strict=False)
    return model.eval()


def batch() -> dict[str, Tensor]:
    found = load_file(PYREFT / "batch.safetensors")
    return {name: found[name] for name in ("input_ids", "attention_mask", "labels")}


def load(directory: Path, model: torch.nn.Module | None = None) -> PeftModel:
    return PeftModel.from_pretrained(model or base_model(), str(directory)).eval()


def logits(model: torch.nn.Module) -> Tensor:
    """Return the logits of real tokens; prompts end where labels begin."""
    inputs = batch()
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found[inputs["attention_mask"].bool()]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)
