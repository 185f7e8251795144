"""Generation against oracles: each prompt alone, a greedy loop by hand, the model as it was."""

import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from reftune.errors import DataError, ReftConfigError
from reftune.generate import Completion, HFEngine, Sampling, stream
from tiny import tiny_llama, tiny_tokenizer

# PEFT 0.21 asks a model for a property that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

TOKENIZER = tiny_tokenizer()
TEXTS = [
    "a",
    "a longer prompt than that",
    "of middle length",
    "bc",
    "the longest of all the prompts",
]
PROMPTS: list[list[int]] = [TOKENIZER(text)["input_ids"] for text in TEXTS]
GREEDY = Sampling(max_new_tokens=12)


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def transformers_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Catch what transformers logs: its logger does not propagate by default."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def greedy_by_hand(model: Any, prompt: list[int], steps: int) -> list[int]:
    """Recompute everything at every step: no cache, no padding, no generate."""
    ids = list(prompt)
    for _ in range(steps):
        with torch.no_grad():
            token = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token == TOKENIZER.eos_token_id:
            break
        ids.append(token)
    return ids[len(prompt) :]


def favour(model: LlamaForCausalLM, token: int, at_length: int | None = None) -> None:
    """Make the model write `token` always, or once the sequence has `at_length` tokens."""

    def hook(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        position = kwargs["position_ids"][:, -1] + 1
        rows = position == at_length if at_length is not None else position >= 0
        output.logits[rows, -1, token] = 1e4
        return output

    model.register_forward_hook(hook, with_kwargs=True)


def two_adapters(model: LlamaForCausalLM) -> PeftModel:
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    adapted = get_peft_model(model, config, adapter_name="one")
    adapted.add_adapter("two", config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    return adapted.eval()


def test_a_left_padded_batch_is_each_prompt_alone_in_the_prompts_order(model):
    expected = [greedy_by_hand(model, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(e) for e in expected}) == len(expected), "the oracle must tell rows apart"
    for batch_size in (1, 2, 16):
        got = HFEngine(model, TOKENIZER, batch_size).generate(PROMPTS, GREEDY)
        assert [list(c.token_ids) for c in got] == expected
        assert [list(c.prompt_ids) for c in got] == PROMPTS
        assert [c.text for c in got] == [
            TOKENIZER.decode(e, skip_special_tokens=True) for e in expected
        ]


def test_padding_is_masked_even_when_the_pad_token_is_the_end_token(model):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    got = HFEngine(model, tokenizer).generate(PROMPTS, GREEDY)
    assert [list(c.token_ids) for c in got] == [greedy_by_hand(model, p, 12) for p in PROMPTS]


def test_no_prompts_give_no_completions(model):
    assert HFEngine(model, TOKENIZER).generate([], GREEDY) == []


def test_an_empty_prompt_is_named(model):
    with pytest.raises(DataError, match="prompt 1 has no tokens"):
        HFEngine(model, TOKENIZER).generate([[5], []], GREEDY)
    with pytest.raises(DataError, match="no tokens"):
        stream(model, TOKENIZER, [], GREEDY)


def test_the_end_token_ends_a_completion_and_is_not_part_of_it(model):
    favour(model, TOKENIZER.eos_token_id, at_length=len(PROMPTS[1]) + 3)
    short, cut = HFEngine(model, TOKENIZER).generate([PROMPTS[0], PROMPTS[1]], GREEDY)
    assert (len(cut.token_ids), cut.finish_reason) == (3, "stop")
    assert (len(short.token_ids), short.finish_reason) == (12, "length")


def test_every_end_token_of_the_model_counts(model):
    model.generation_config.eos_token_id = [2, 7]
    favour(model, 7, at_length=len(PROMPTS[0]) + 2)
    (got,) = HFEngine(model, TOKENIZER).generate([PROMPTS[0]], GREEDY)
    assert (len(got.token_ids), got.finish_reason) == (2, "stop")


def test_a_stop_string_cuts_the_text_and_the_tokens_of_its_row_only(model):
    engine = HFEngine(model, TOKENIZER)
    free = engine.generate(PROMPTS, GREEDY)
    tokens = free[1].token_ids
    stop = next(
        s
        for n in range(4, 12)
        if (s := TOKENIZER.decode(list(tokens[n : n + 1]))).isascii() and s.strip()
    )
    got = engine.generate(PROMPTS, Sampling(max_new_tokens=12, stop=(stop, "never written")))
    for completion, unstopped in zip(got, free, strict=True):
        before, found, _ = unstopped.text.partition(stop)
        assert completion.text == before
        assert completion.finish_reason == ("stop" if found else unstopped.finish_reason)
        assert completion.token_ids == unstopped.token_ids[: len(completion.token_ids)]
        assert TOKENIZER.decode(completion.token_ids).startswith(before + found)
    assert got[1].finish_reason == "stop"
    assert len(got[1].token_ids) < 12


def test_a_stop_string_ends_generation_early(model):
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    favour(model, TOKENIZER("x")["input_ids"][0])
    (got,) = HFEngine(model, TOKENIZER).generate(
        [PROMPTS[0]], Sampling(max_new_tokens=50, stop=("xxx",))
    )
    assert (got.text, len(got.token_ids), len(calls)) == ("", 3, 3)


def test_a_stop_string_that_begins_in_the_prompt_does_not_count(model):
    favour(model, TOKENIZER("x")["input_ids"][0])
    (got,) = HFEngine(model, TOKENIZER).generate(
        [TOKENIZER("ax")["input_ids"]], Sampling(max_new_tokens=3, stop=("ax",))
    )
    assert (got.text, got.finish_reason) == ("xxx", "length")


def test_the_model_is_left_as_it_was(model):
    model.generation_config.temperature = 0.6
    model.model.layers[0].eval()
    model.lm_head.train()
    before = model.generation_config.to_dict()
    modes = [m.training for m in model.modules()]
    seen: list[bool] = []
    model.lm_head.register_forward_hook(lambda module, *_: seen.append(module.training))
    HFEngine(model, TOKENIZER).generate(PROMPTS, GREEDY)
    assert model.generation_config.to_dict() == before
    assert [m.training for m in model.modules()] == modes
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("count", [1, 3])
def test_the_head_is_given_dense_states(model, count):
    """Of a slice of bfloat16 states the product on a CPU takes hundreds of times as long."""
    model.to(torch.bfloat16)
    seen = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    HFEngine(model, TOKENIZER, batch_size=4).generate(
        PROMPTS[1 : 1 + count], Sampling(max_new_tokens=2)
    )
    handle.remove()
    assert [len(states) for states in seen] == [count, count]
    assert all(states.stride() == torch.empty(states.shape).stride() for states in seen)
    assert not head._forward_pre_hooks


def test_a_model_that_does_not_tell_its_head_generates(model, monkeypatch):
    def untold():
        raise NotImplementedError

    expected = HFEngine(model, TOKENIZER).generate(PROMPTS[:1], GREEDY)
    monkeypatch.setattr(model, "get_output_embeddings", untold)
    assert HFEngine(model, TOKENIZER).generate(PROMPTS[:1], GREEDY) == expected


def test_a_training_step_works_after_generating(model):
    HFEngine(model, TOKENIZER).generate(PROMPTS, GREEDY)
    ids = torch.tensor([PROMPTS[1]])
    model.train()
    model(ids, labels=ids).loss.backward()
    assert model.lm_head.weight.grad is not None


def test_an_error_restores_the_mode(model):
    model.train()
    model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        HFEngine(model, TOKENIZER).generate(PROMPTS, GREEDY)
    assert model.training
    assert model.lm_head.training


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        Sampling(max_new_tokens=3, temperature=0.7, top_p=0.9, top_k=5, seed=0),
        Sampling(max_new_tokens=3, num_beams=3),
        Sampling(max_new_tokens=3, repetition_penalty=1.3, no_repeat_ngram_size=2),
    ],
)
def test_the_models_own_generation_config_does_not_leak_and_nothing_is_logged(
    model, sampling, transformers_log
):
    expected = HFEngine(model, TOKENIZER).generate(PROMPTS, sampling)
    own = model.generation_config
    own.do_sample, own.temperature, own.top_p, own.top_k = True, 0.3, 0.5, 3
    own.typical_p, own.repetition_penalty = 0.7, 5.0
    if sampling.temperature > 0:  # else transformers notes once that it ignores the model's min_p
        own.min_p = 0.4
    own.max_length, own.num_beams, own.no_repeat_ngram_size = 4096, 4, 3
    assert HFEngine(model, TOKENIZER).generate(PROMPTS, sampling) == expected
    own.max_length, own.max_new_tokens = None, 1
    assert HFEngine(model, TOKENIZER).generate(PROMPTS, sampling) == expected
    assert transformers_log.records == []


def test_a_seed_repeats_the_draw_and_leaves_other_randomness_alone(model):
    engine = HFEngine(model, TOKENIZER, batch_size=2)
    sampling = Sampling(max_new_tokens=12, temperature=1.0, seed=3)
    torch.manual_seed(0)
    first = engine.generate(PROMPTS, sampling)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), drawn)
    assert engine.generate(PROMPTS, sampling) == first
    other = Sampling(max_new_tokens=12, temperature=1.0, seed=4)
    assert engine.generate(PROMPTS, other) != first


def test_beams_find_a_likelier_completion_than_greedy(model):
    def likelihood(c: Completion) -> float:
        ids = torch.tensor([[*c.prompt_ids, *c.token_ids]])
        with torch.no_grad():
            logp = model(ids).logits[0, :-1].log_softmax(-1)
        rows = torch.arange(len(c.prompt_ids) - 1, ids.shape[1] - 1)
        return float(logp[rows, ids[0, len(c.prompt_ids) :]].sum())

    engine = HFEngine(model, TOKENIZER)
    greedy = engine.generate(PROMPTS, Sampling(max_new_tokens=5))
    beams = engine.generate(PROMPTS, Sampling(max_new_tokens=5, num_beams=8))
    assert sum(map(likelihood, beams)) > sum(map(likelihood, greedy))


def test_on_done_hears_of_every_completion_longest_batch_first(model):
    heard: dict[int, Completion] = {}
    got = HFEngine(model, TOKENIZER, 2).generate(PROMPTS, GREEDY, on_done=heard.__setitem__)
    assert [heard[i] for i in range(len(PROMPTS))] == got
    assert list(heard) == sorted(heard, key=lambda i: -len(PROMPTS[i]))


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_mixed_batch_of_adapters_is_each_alone(model, num_beams):
    adapted = two_adapters(model)
    engine = HFEngine(adapted, TOKENIZER)
    sampling = Sampling(max_new_tokens=12, num_beams=num_beams)
    adapters = ["one", None, "two", "one", None]
    got = engine.generate(PROMPTS, sampling, adapters)
    for i, name in enumerate(adapters):
        if name is None:
            with adapted.disable_adapter():
                (alone,) = engine.generate([PROMPTS[i]], sampling)
        else:
            adapted.set_adapter(name)
            (alone,) = engine.generate([PROMPTS[i]], sampling)
        assert got[i] == alone
    assert engine.generate(PROMPTS[:1], sampling, ["two"]) != got[:1]


def test_wrong_adapters_are_refused_with_a_hint(model):
    with pytest.raises(ReftConfigError, match="plain LlamaForCausalLM"):
        HFEngine(model, TOKENIZER).generate(PROMPTS[:1], GREEDY, [None])
    engine = HFEngine(two_adapters(model), TOKENIZER)
    with pytest.raises(ReftConfigError, match=r"no adapter 'onee'.*Did you mean 'one'"):
        engine.generate(PROMPTS[:1], GREEDY, ["onee"])
    with pytest.raises(ReftConfigError, match="2 adapters for 1 prompts"):
        engine.generate(PROMPTS[:1], GREEDY, ["one", "two"])


def test_the_identity_changes_with_weights_and_active_adapter(model):
    engine = HFEngine(two_adapters(model), TOKENIZER)
    first = engine.identity
    assert engine.identity == first
    engine.model.set_adapter("two")
    second = engine.identity
    next(p for n, p in engine.model.named_parameters() if "two" in n).data.mul_(1.001)
    assert len({first, second, engine.identity}) == 3


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0.*1 or more"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"num_beams": 0}, "num_beams"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size"),
        ({"stop": "\n"}, "tuple of non-empty strings"),
        ({"stop": ("",)}, "tuple of non-empty strings"),
    ],
)
def test_a_setting_out_of_range_is_refused(setting, message):
    with pytest.raises(ReftConfigError, match=message):
        Sampling(**setting)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_streamed_pieces_joined_are_the_completion(model, prompt):
    (expected,) = HFEngine(model, TOKENIZER).generate([prompt], GREEDY)
    assert "".join(stream(model, TOKENIZER, prompt, GREEDY)) == expected.text


def test_a_stream_holds_back_what_may_become_a_stop_string(model):
    favour(model, TOKENIZER(" ")["input_ids"][0])
    start = len(PROMPTS[0])
    for offset, letter in ((2, "E"), (3, "N"), (5, "E"), (6, "N"), (7, "D")):
        favour(model, TOKENIZER(letter)["input_ids"][0], at_length=start + offset)
    model._forward_hooks.move_to_end(next(iter(model._forward_hooks)), last=False)
    sampling = Sampling(max_new_tokens=12, stop=("END",))
    (expected,) = HFEngine(model, TOKENIZER).generate([PROMPTS[0]], sampling)
    assert "".join(stream(model, TOKENIZER, PROMPTS[0], sampling)) == expected.text, (
        "stream differs"
    )
    assert "END" not in expected.text
    assert expected.finish_reason == "stop"


def test_an_error_while_streaming_reaches_the_consumer(model):
    model.train()
    model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(stream(model, TOKENIZER, PROMPTS[0], GREEDY))
    assert model.training


def test_closing_a_stream_ends_its_thread(model):
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    favour(model, TOKENIZER(" ")["input_ids"][0])
    pieces = stream(model, TOKENIZER, PROMPTS[0], Sampling(max_new_tokens=400))
    next(pieces)
    pieces.close()
    assert not [t for t in threading.enumerate() if t.name == "reftune-stream"]
    assert len(calls) < 400


def test_beams_cannot_be_streamed(model):
    with pytest.raises(ReftConfigError, match="num_beams=2 cannot be streamed"):
        stream(model, TOKENIZER, PROMPTS[0], Sampling(num_beams=2))
