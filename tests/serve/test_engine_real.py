"""Real models, with adapters of several kinds: the tokens of transformers.

The embedded model, and those whose directories REFTUNE_REAL_MODELS names (as PATH does).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from test_engine_exact import requests, run, tokens_of

from reftune import ReftConfig
from reftune.data import load_rows, to_examples
from reftune.demo import HELDOUT
from reftune.errors import ReftuneError
from reftune.generate import HFEngine, Sampling
from reftune.models import load_model, resolve
from reftune.prompts import encode_prompt

# Layers are of the embedded model's 30; another model has the nearest.
CONFIGS: dict[str, dict[str, Any]] = {
    "f7l7": {"r": 8, "positions": "f7+l7"},
    "last": {"r": 4, "positions": "l1", "layers": [5, 15, 25]},
    "sides": {"r": 4, "positions": "f2+l2", "tied": "sides", "method": "direft", "layers": [8]},
}

EMBEDDED = "smollm2-135m"
NAMED = [path for path in os.environ.get("REFTUNE_REAL_MODELS", "").split(os.pathsep) if path]


@pytest.mark.slow
@pytest.mark.parametrize("real", [EMBEDDED, *NAMED])
def test_a_real_model(real: str, start: Callable[..., Any], tmp_path: Path) -> None:
    try:
        model, tokenizer = load_model(real, "float32")
    except (ReftuneError, OSError):
        if real != EMBEDDED:
            raise
        pytest.skip("the embedded model is not installed, and there is no Hub")
    adapted: Any = None
    for seed, (name, config) in enumerate(CONFIGS.items()):
        torch.manual_seed(seed)
        if "layers" in config:
            depth = model.config.num_hidden_layers
            config = config | {"layers": [layer * depth // 30 for layer in config["layers"]]}
        settings = ReftConfig(task_type="CAUSAL_LM", **config)
        if adapted is None:
            adapted = get_peft_model(model, settings, adapter_name=name)
        else:
            adapted.add_adapter(name, settings)
        for key, parameter in adapted.named_parameters():
            if f".{name}." in key and key.endswith("bias"):
                parameter.data.normal_(std=1.0 if real == EMBEDDED else 40.0)
    adapted.save_pretrained(str(tmp_path), save_embedding_layers=False)
    examples = to_examples(load_rows(HELDOUT))[:8]
    inputs = [encode_prompt(example.prompt, tokenizer, "auto") for example in examples]
    names = [[*CONFIGS, None][i % 4] for i in range(len(inputs))]
    alone = HFEngine(adapted.eval(), tokenizer, batch_size=1)
    wanted, bare = (
        [c.token_ids for c in alone.generate(inputs, Sampling(max_new_tokens=24), which)]
        for which in (names, [None] * len(names))
    )
    llm = start(model=resolve(real), max_num_batched_tokens=64)  # prompts in parts
    outputs = run(llm, inputs, requests({n: tmp_path / n for n in CONFIGS}, names), tokens=24)
    assert [t[: len(w)] for t, w in zip(tokens_of(outputs), wanted, strict=True)] == wanted
    assert sum(a != b for a, b in zip(wanted, bare, strict=True)) >= 5
