"""One batch: rows that are done leave it, and what the others generate stays the same."""

import dataclasses
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel

import reftune
from adapted_tiny import config, reft, strong
from reftune.completions import complete_batch
from reftune.decoding import has_plain_cache, longest_first, settled_text
from reftune.errors import ReftConfigError
from reftune.generate import HFEngine, Sampling, stream
from reftune.serve.engine import _params
from tiny import tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPTS = [list(range(10, 10 + n)) for n in (3, 17, 6, 9, 4, 12, 5, 8)]
ENDS = [2, *range(40, 70)]  # so many words end a sequence that rows end at different times

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


def ending(model: Any) -> Any:
    model.generation_config.eos_token_id = ENDS
    return model


def tiny_gemma() -> PreTrainedModel:
    """Return a random model whose first layer sees 6 tokens back."""
    torch.manual_seed(0)
    settings = Gemma3TextConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
        tie_word_embeddings=False,  # tied, it repeats itself
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=1,
    )
    return Gemma3ForCausalLM(settings).eval()


def two_adapters() -> PeftModel:
    model = reft(positions="f2+l3")
    model.add_adapter("second", config(positions="all", layers=[0]))
    return strong(model, seed=5).eval()


MODELS: dict[str, Callable[[], Any]] = {
    "base": tiny_llama,
    "suffix": lambda: reft(positions="l3"),
    "everything": lambda: reft(positions="all"),
    "edit_generated": lambda: reft("reft_r1", positions="all", edit_generated=True),
    "sliding window": tiny_gemma,
}
SAMPLINGS = {
    "greedy": Sampling(max_new_tokens=24),
    "stop": Sampling(max_new_tokens=24, stop=("e", "aa")),
    "penalty": Sampling(max_new_tokens=24, repetition_penalty=1.3, no_repeat_ngram_size=2),
}


def rows_computed(model: nn.Module, run: Callable[[], Any]) -> tuple[Any, list[int]]:
    """Return what `run` returns, and how many rows each forward of the model had."""
    rows: list[int] = []
    decoder = (model.get_base_model() if isinstance(model, PeftModel) else model).model
    handle = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        return run(), rows
    finally:
        handle.remove()


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_rows_that_are_done_leave_the_batch_and_nothing_else_changes(make, sampling):
    model = ending(make())
    alone = [complete_batch(model, TOKENIZER, [prompt], sampling)[0] for prompt in PROMPTS]
    together, rows = rows_computed(
        model, lambda: complete_batch(model, TOKENIZER, PROMPTS, sampling)
    )
    assert together == alone
    lengths = sorted({len(c.token_ids) for c in alone})
    assert len(lengths) > 3, "rows end at different times"
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] < len(PROMPTS) / 2
    needed = sum(min(len(c.token_ids) + 1, sampling.max_new_tokens) for c in alone)
    assert sum(rows) <= needed * 4 / 3 + 1, "at most a quarter of the rows is done already"


@pytest.mark.parametrize(
    "sampling",
    [
        *SAMPLINGS.values(),
        Sampling(max_new_tokens=24, temperature=1.0, seed=3),
        Sampling(max_new_tokens=24, num_beams=3),
    ],
)
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["batch", "one"])
def test_a_stop_token_ends_a_completion_as_the_models_own_end_does(sampling, prompts):
    model, stops = reft(positions="l3"), dataclasses.replace(sampling, stop_token_ids=tuple(ENDS))
    own = model.generation_config.to_dict()
    found = HFEngine(model, TOKENIZER, 8).generate(prompts, stops)
    assert model.generation_config.to_dict() == own
    assert found == HFEngine(ending(reft(positions="l3")), TOKENIZER, 8).generate(prompts, sampling)
    assert "stop" in {completion.finish_reason for completion in found}
    assert not {i for completion in found for i in completion.token_ids} & set(ENDS)


def test_a_stream_ends_before_a_stop_token():
    model, sampling = tiny_llama(), Sampling(max_new_tokens=24, stop_token_ids=tuple(ENDS))
    for prompt in PROMPTS:
        (expected,) = complete_batch(model, TOKENIZER, [prompt], sampling)
        assert "".join(stream(model, TOKENIZER, prompt, sampling)) == expected.text


def test_vllm_is_told_of_stop_tokens(monkeypatch):
    told = SimpleNamespace(SamplingParams=lambda **settings: settings)
    monkeypatch.setitem(sys.modules, "vllm", told)
    assert _params(Sampling(stop_token_ids=(7, 9)), 0)["stop_token_ids"] == [7, 9]


def test_only_stop_tokens_that_there_are_go_into_files():
    assert "stop_token_ids" not in Sampling().recorded(), "so that earlier files say the same"
    assert Sampling(stop_token_ids=(7,)).recorded()["stop_token_ids"] == (7,)
    rest = dataclasses.asdict(Sampling(stop=("e",))) | {"stop_token_ids": (7,)}
    assert Sampling(stop=("e",), stop_token_ids=(7,)).recorded() == rest


@pytest.mark.parametrize("ids", [[7], (-1,), ("</s>",), 7])
def test_stop_tokens_are_a_tuple_of_ids(ids):
    with pytest.raises(ReftConfigError, match="tuple of the tokenizer's ids"):
        Sampling(stop_token_ids=ids)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_repetition_penalty_is_not_for_padding(num_beams):
    # Up to transformers 5.22 it was: there a padded row whose end token pads ends later.
    model, tokenizer, short = tiny_llama(), tiny_tokenizer(), PROMPTS[0]
    ids = torch.tensor([short])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -1]
    logits[short] = -torch.inf  # those are penalised by right
    likeliest = tokenizer.convert_ids_to_tokens(int(logits.argmax()))
    tokenizer.eos_token = tokenizer.pad_token = likeliest
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    sampling = Sampling(max_new_tokens=8, repetition_penalty=3.0, num_beams=num_beams)
    alone = [complete_batch(model, tokenizer, [prompt], sampling)[0] for prompt in PROMPTS]
    assert complete_batch(model, tokenizer, PROMPTS, sampling) == alone
    assert alone[0].finish_reason == "stop"


def test_rows_of_different_adapters_leave_the_batch():
    model = ending(two_adapters())
    names = ["default", "second", "__base__", "second"] * 2
    sampling = SAMPLINGS["greedy"]
    alone = [
        complete_batch(model, TOKENIZER, [prompt], sampling, [name])[0]
        for prompt, name in zip(PROMPTS, names, strict=True)
    ]
    together, rows = rows_computed(
        model, lambda: complete_batch(model, TOKENIZER, PROMPTS, sampling, names)
    )
    assert together == alone
    assert rows[-1] < rows[0]


def test_rows_stay_where_options_are_told_for_the_whole_batch():
    model = ending(reft(positions="l3"))
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[0, 2:] = False  # here the prompt ends after two tokens
    sampling, prompts = SAMPLINGS["greedy"], [[11, 12, 13, 14], [21, 22, 23, 24]]
    with reftune.options(prompt_mask=mask):
        together = complete_batch(model, TOKENIZER, prompts, sampling)
    for i, prompt in enumerate(prompts):
        with reftune.options(prompt_mask=mask[i : i + 1]):
            assert complete_batch(model, TOKENIZER, [prompt], sampling) == [together[i]]


def test_drawn_tokens_are_those_of_a_batch_that_stays_together(monkeypatch):
    model = ending(tiny_llama())
    sampling = Sampling(max_new_tokens=24, temperature=1.0, seed=3)
    engine = HFEngine(model, TOKENIZER, batch_size=8)
    expected = engine.generate(PROMPTS, sampling)
    never = engine.generate(PROMPTS, sampling, is_decided=lambda i, text: True)
    assert never == expected, "a decision would change what is drawn for the others"


def test_a_completion_ends_as_soon_as_it_is_decided():
    model = tiny_llama()
    sampling = Sampling(max_new_tokens=24)
    engine = HFEngine(model, TOKENIZER, batch_size=3)
    whole = engine.generate(PROMPTS, sampling)
    asked: list[tuple[int, str]] = []

    def is_decided(i: int, text: str) -> bool:
        asked.append((i, text))
        return len(text) >= 2 + i

    ended = engine.generate(PROMPTS, sampling, is_decided=is_decided)
    for i, (short, long) in enumerate(zip(ended, whole, strict=True)):
        assert short.finish_reason == "decided"
        assert short.token_ids == long.token_ids[: len(short.token_ids)]
        assert len(short.text) >= 2 + i
        texts = [text for k, text in asked if k == i]
        assert all(long.text.startswith(text) for text in texts), "an end may not change later"
        assert [len(text) >= 2 + i for text in texts] == [False] * (len(texts) - 1) + [True]


def test_text_that_may_still_change_is_held_back():
    ids = TOKENIZER("a Käfer and").input_ids
    at = TOKENIZER("a K").input_ids
    assert settled_text(TOKENIZER, ids[: len(at) + 1], ()) == "a K", "half of an umlaut"
    assert settled_text(TOKENIZER, ids, ("\n\n",)) == "a Käfer and"
    assert settled_text(TOKENIZER, ids, ("nd!",)) == "a Käfer a"


def test_batches_have_at_most_so_many_rows_and_tokens():
    lengths = [5, 40, 7, 7, 6, 90, 3]
    assert longest_first(lengths, 2) == [[5, 1], [2, 3], [4, 0], [6]]
    assert longest_first(lengths, 16, 50) == [[5], [1], [2, 3, 4, 0, 6]]
    assert longest_first(lengths, 16, 30) == [[5], [1], [2, 3, 4, 0], [6]]
    assert longest_first([1, 1, 1], 4, None, [3, 2, 2]) == [[0], [1, 2]]
    assert longest_first([], 4) == []


def test_an_engine_fills_batches_by_tokens():
    sampling = Sampling(max_new_tokens=4)
    engine = HFEngine(tiny_llama(), TOKENIZER, batch_size=8, batch_tokens=40)
    expected = HFEngine(tiny_llama(), TOKENIZER, batch_size=1).generate(PROMPTS, sampling)
    found, rows = rows_computed(engine.model, lambda: engine.generate(PROMPTS, sampling))
    assert found == expected
    # With what is generated, they are 21, 16, 13, 12, 10, 9, 8, 7 tokens long.
    assert rows[::4] == [1, 2, 3, 2]
    with pytest.raises(ReftConfigError, match="batch_tokens=0"):
        HFEngine(tiny_llama(), TOKENIZER, batch_tokens=0)


def test_which_caches_rows_can_leave():
    assert has_plain_cache(tiny_llama())
    assert has_plain_cache(reft())
    assert has_plain_cache(tiny_gemma())
    from transformers import MambaConfig, MambaForCausalLM

    mamba = MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)
    assert not has_plain_cache(MambaForCausalLM(mamba))
