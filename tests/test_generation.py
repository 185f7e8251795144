"""`generate` in every way people call it, against a model with plain hooks that edit by formula.

The oracle shares no code with reftune: it counts columns itself and edits at the prompt only.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TextIteratorStreamer,
)

from reftune import PositionError, ReftConfig, options, reft_layers, set_strength
from tiny import tiny_llama, tiny_tokenizer

# PEFT 0.21 asks a model for a property that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

TOKENIZER = tiny_tokenizer()
SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
STEPS = 8
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": STEPS, "min_new_tokens": STEPS}


def prompt(length: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(100 * seed + length)
    return torch.randint(3, 259, (1, length), generator=g)


def tiny(name: str) -> Any:
    """Return a random fp32 model in which an edit matters."""
    if name == "llama":
        return tiny_llama()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "qwen2":
            return Qwen2ForCausalLM(Qwen2Config(**SIZES, initializer_range=0.3)).eval()
        config = Gemma3TextConfig(
            **{**SIZES, "num_hidden_layers": 3},
            head_dim=8,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            initializer_range=0.3,
            tie_word_embeddings=False,  # tied, a random model repeats one token
        )
        return Gemma3ForCausalLM(config).eval()


def attach(model: Any, seed: int = 0, scale: float = 4.0, **config: Any) -> PeftModel:
    """Attach a LoReFT whose edit is large."""
    torch.manual_seed(seed)
    given = {"task_type": "CAUSAL_LM", "r": 4, "positions": "f2+l2", **config}
    adapted = get_peft_model(model, ReftConfig(**given)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name.endswith((".W", ".bias")) and "reft_phi" in name:
                parameter.mul_(scale)
    return adapted


def edited(h_d: Tensor, phi: Any, group: int) -> Tensor:
    """h + R^T (W h + b - R h), written out for one token."""
    R, W, b = (getattr(phi, name)[group].detach() for name in ("R", "W", "bias"))
    return h_d + R.T @ (W @ h_d + b - R @ h_d)


@contextmanager
def plain_hooks(
    base: Any, adapted: PeftModel, columns: list[list[int]], beams: int = 1
) -> Iterator[Any]:
    """Edit the tokens in `columns` of each row of `base` with the parameters of `adapted`."""
    past = [0]
    phis = [layer.reft_phi["default"] for layer in reft_layers(adapted).values()]

    def note_past(module: nn.Module, args: Any, kwargs: Any) -> None:
        cache = kwargs.get("past_key_values")
        past[0] = 0 if cache is None else int(cache.get_seq_length())

    def edit_with(phi: Any) -> Callable[..., Tensor]:
        def edit(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            new = output.clone()
            for row in range(new.shape[0]):
                own = columns[row // (new.shape[0] // len(columns))]
                for i, column in enumerate(own):
                    at = column - past[0]
                    if 0 <= at < new.shape[1]:
                        group = 0 if phi.R.shape[0] == 1 else i * phi.R.shape[0] // len(own)
                        new[row, at] = edited(new[row, at], phi, group)
            return new

        return edit

    layers = base.model.layers
    handles = [base.model.register_forward_pre_hook(note_past, with_kwargs=True)]
    handles += [
        layer.register_forward_hook(edit_with(phi)) for layer, phi in zip(layers, phis, strict=True)
    ]
    try:
        yield base
    finally:
        for handle in handles:
            handle.remove()


def by_hand(model: Any, ids: Tensor, steps: int = STEPS) -> Tensor:
    """Choose greedily, recomputing everything from no cache at each step."""
    n = torch.tensor([ids.shape[1]])
    suppressed = torch.tensor([2])  # as min_new_tokens does
    for _ in range(steps):
        with torch.no_grad():
            logits = model(input_ids=ids, prompt_lengths=n, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.index_fill(-1, suppressed, -1e9).argmax(-1, True)], dim=1)
    return ids


def pad_left(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    T = max(p.shape[1] for p in prompts)
    ids = torch.cat([nn.functional.pad(p, (T - p.shape[1], 0), value=0) for p in prompts])
    mask = torch.cat([torch.arange(T)[None] >= T - p.shape[1] for p in prompts]).long()
    return ids, mask


@pytest.fixture
def llama() -> PeftModel:
    return attach(tiny_llama())


# --- cache and padding --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_the_adapter_changes_the_logits_by_a_lot(name):
    model, ids = attach(tiny(name)), prompt(9)
    with torch.no_grad():
        changed = model(ids).logits
        with model.disable_adapter():
            base = model(ids).logits
    assert (changed - base).norm() > 0.3 * base.norm()
    assert not torch.equal(
        model.generate(ids, **GREEDY), model.generate(ids, **GREEDY, adapter_names=["__base__"])
    )


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize(
    ("positions", "tied"),
    [("f2+l2", "all"), ("f2+l2", "sides"), ("f2+l2", "none"), ("l3", "all"), ("all", "all")],
)
def test_cached_is_uncached_is_recomputed_by_hand_is_plain_hooks(name, positions, tied):
    model, ids = attach(tiny(name), positions=positions, tied=tied), prompt(9)
    columns = {"f2+l2": [0, 1, 7, 8], "l3": [6, 7, 8], "all": list(range(9))}[positions]
    expected = by_hand(model, ids)
    with plain_hooks(tiny(name), model, [columns]) as base:
        assert torch.equal(base.generate(ids, **GREEDY), expected)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert torch.equal(model.generate(ids, **GREEDY, use_cache=False), expected)
    # no caller needs to know about reftune: the plain transformers model does it, too
    assert torch.equal(model.get_base_model().generate(ids, **GREEDY), expected)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_prompts_shorter_than_the_positions(name, n):
    model, ids = attach(tiny(name)), prompt(n)
    expected = by_hand(model, ids)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert torch.equal(model.generate(ids, **GREEDY, use_cache=False), expected)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("positions", ["f2+l2", "all"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_left_padded_batch_is_each_alone(name, positions, use_cache):
    model = attach(tiny(name), positions=positions)
    prompts = [prompt(n) for n in (9, 3, 6)]
    ids, mask = pad_left(prompts)
    batch = model.generate(ids, attention_mask=mask, **GREEDY, use_cache=use_cache)
    for row, alone in zip(batch, prompts, strict=True):
        assert torch.equal(row[-STEPS:], model.generate(alone, **GREEDY)[0, -STEPS:])


@pytest.mark.parametrize("positions", ["f2+l2", "l3", "all"])
def test_right_padding_is_left_padding_is_alone(positions):
    model = attach(tiny_llama(), positions=positions)
    prompts = [prompt(n) for n in (9, 3, 6)]
    left, left_mask = pad_left(prompts)
    right, right_mask = pad_left([p.flip(1) for p in prompts])
    right, right_mask = right.flip(1), right_mask.flip(1)
    position_ids = (left_mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        from_left = model(left, attention_mask=left_mask, position_ids=position_ids).logits
        from_right = model(right, attention_mask=right_mask).logits
        for i, p in enumerate(prompts):
            n, alone = p.shape[1], model(p).logits[0]
            torch.testing.assert_close(from_left[i, -n:], alone, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(from_right[i, :n], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 1.3},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
    ],
    ids=["sampled", "several-sampled", "beams", "several-beams", "sampled-beams"],
)
def test_sampling_and_beams_are_those_of_plain_hooks(name, settings):
    model, prompts = attach(tiny(name)), [prompt(9), prompt(5)]
    ids, mask = pad_left(prompts)
    given = {**GREEDY, **settings, "attention_mask": mask}

    def seeded(m: Any, **more: Any) -> Tensor:
        torch.manual_seed(3)
        return m.generate(ids, **given, **more)

    got = seeded(model)
    with plain_hooks(tiny(name), model, [[0, 1, 7, 8], [4, 5, 7, 8]]) as base:
        assert torch.equal(got, seeded(base))
    assert torch.equal(got, seeded(model, use_cache=False))
    assert not torch.equal(got, seeded(tiny(name)))


# --- ways to compute the same -------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 1},
        {"prefill_chunk_size": 4},
        {"prefill_chunk_size": 4, "cache_implementation": "static", "disable_compile": True},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_a_way_to_compute_does_not_change_the_result(name, settings):
    if name == "gemma3" and "prompt_lookup_num_tokens" in settings:
        pytest.skip("transformers refuses assisted decoding with a sliding window cache")
    model, ids = attach(tiny(name)), prompt(9)
    expected = by_hand(model, ids)
    assert torch.equal(model.generate(ids, **GREEDY, **settings), expected)


@pytest.mark.parametrize("settings", [{"cache_implementation": "static", "disable_compile": True}])
@pytest.mark.parametrize("chunk", [None, 3])
def test_a_static_cache_with_padding_and_chunks_is_each_alone(settings, chunk):
    model, prompts = attach(tiny_llama(), tied="sides"), [prompt(9), prompt(3)]
    ids, mask = pad_left(prompts)
    got = model.generate(ids, attention_mask=mask, **GREEDY, **settings, prefill_chunk_size=chunk)
    for row, alone in zip(got, prompts, strict=True):
        assert torch.equal(row[-STEPS:], model.generate(alone, **GREEDY)[0, -STEPS:])


@pytest.mark.parametrize("assistant", ["other", "base"])
def test_assisted_decoding_is_greedy(assistant):
    model, ids = attach(tiny_llama()), prompt(9)
    helper = tiny_llama(seed=5 if assistant == "other" else 0)
    given = {"do_sample": False, "max_new_tokens": STEPS}
    expected = model.generate(ids, **given)
    assert torch.equal(model.generate(ids, **given, assistant_model=helper), expected)


def test_a_quantised_cache_holds_the_edited_states():
    pytest.importorskip("optimum.quanto", reason="the quantised cache needs optimum-quanto")
    model, ids = attach(tiny_llama()), prompt(9)
    cache = {"backend": "quanto", "residual_length": 4, "q_group_size": 8}
    given = {**GREEDY, "cache_implementation": "quantized", "cache_config": cache}
    with plain_hooks(tiny_llama(), model, [[0, 1, 7, 8]]) as base:
        expected = base.generate(ids, **given)
    assert torch.equal(model.generate(ids, **given), expected)


def test_continuous_batching_is_refused(llama):
    with pytest.raises(PositionError, match="continuous batching"):
        llama.generate(prompt(9), **GREEDY, cache_implementation="paged")


def test_a_streamer_gets_the_generated_text(llama):
    ids = prompt(9)
    expected = TOKENIZER.decode(llama.generate(ids, **GREEDY)[0, 9:])
    streamer = TextIteratorStreamer(TOKENIZER, skip_prompt=True)
    thread = threading.Thread(
        target=llama.generate, kwargs={"input_ids": ids, **GREEDY, "streamer": streamer}
    )
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    assert streamed == expected


@pytest.mark.parametrize("padded", [False, True])
def test_inputs_embeds_are_input_ids(llama, padded):
    ids, mask = pad_left([prompt(9), prompt(4 if padded else 9, seed=1)])
    embeds = llama.get_input_embeddings()(ids)
    given = {**GREEDY, "attention_mask": mask}
    expected = llama.generate(ids, **given)[:, -STEPS:]
    for use_cache in (True, False):
        got = llama.generate(inputs_embeds=embeds, **given, use_cache=use_cache)
        assert torch.equal(got, expected)


# --- generated tokens ---------------------------------------------------------------------------


def test_a_generate_that_continues_a_cache_has_all_of_its_input_as_the_prompt(llama):
    """The second call's prompt is everything it is given: its last tokens are edited anew, and
    what the first call left in the cache stays as it was."""
    first = llama.generate(prompt(6), **GREEDY, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, prompt(4, seed=1)], dim=1)
    n = ids.shape[1]
    with plain_hooks(tiny_llama(), llama, [[0, 1, 4, 5]]) as base:
        same = base.generate(prompt(6), **GREEDY, return_dict_in_generate=True)
    assert torch.equal(first.sequences, same.sequences)
    with plain_hooks(tiny_llama(), llama, [[0, 1, n - 2, n - 1]]) as base:
        expected = base.generate(ids, **GREEDY, past_key_values=same.past_key_values)
    with pytest.warns(UserWarning, match="goes on with a cache.*another than without the cache"):
        got = llama.generate(ids, **GREEDY, past_key_values=first.past_key_values)
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("positions", "rule", "n", "warned"),
    [
        ("f7", "paper", 5, True),
        ("f7", "paper", 7, False),
        ("f4", "pyreft", 5, True),
        ("f2", "pyreft", 5, False),
    ],
)
def test_a_cache_of_a_prompt_too_short_for_its_prefix_is_told(positions, rule, n, warned):
    model = attach(tiny_llama(), positions=positions, short_prompts=rule)
    with torch.no_grad():
        cache = model(prompt(n), prompt_lengths=torch.tensor([n])).past_key_values
    ids = torch.cat([prompt(n), prompt(9, seed=1)], dim=1)
    match = "first tokens are edited as those of a prompt of"
    with pytest.warns(UserWarning, match=match) if warned else nullcontext():
        model.generate(ids, **GREEDY, past_key_values=cache)


def test_guidance_is_refused_and_not_guessed(llama):
    ids, other = prompt(9), prompt(5, seed=1)
    for how in (
        {"guidance_scale": 1.5},
        {"generation_config": GenerationConfig(guidance_scale=1.5, **GREEDY)},
    ):
        with pytest.raises(PositionError, match=r"guidance_scale=1\.5"):
            llama.generate(ids, negative_prompt_ids=other, **how)
    same = llama.generate(ids, **GREEDY)
    assert torch.equal(llama.generate(ids, **GREEDY, guidance_scale=1.0), same)
    with llama.disable_adapter():  # nothing is edited
        llama.generate(ids, **GREEDY, guidance_scale=1.5, negative_prompt_ids=other)


def test_labels_after_a_filled_cache_tell_the_prompt(llama):
    ids = prompt(12)
    labels = ids.clone()
    labels[:, :9] = -100
    with torch.no_grad():
        lengths = torch.tensor([9])
        cache = llama(ids[:, :6], prompt_lengths=lengths).past_key_values
        told = llama(ids[:, 6:], past_key_values=cache, prompt_lengths=lengths).logits
        cache = llama(ids[:, :6], prompt_lengths=lengths).past_key_values
        found = llama(ids[:, 6:], past_key_values=cache, labels=labels[:, 6:]).logits
    assert torch.equal(found, told)


@pytest.mark.parametrize("positions", ["f2", "f2+l2", "l1", "all"])
def test_the_tokens_after_a_filled_cache_may_be_given_alone(positions):
    """As transformers allows: the ids after the cache, and the mask of all tokens."""
    model = attach(tiny_llama(), positions=positions)
    ids = prompt(14)

    def filled():
        with options(prompt_lengths=torch.tensor([9])), torch.no_grad():
            return model(input_ids=ids[:, :9], use_cache=True).past_key_values

    def warning():
        return nullcontext() if positions == "f2" else pytest.warns(UserWarning, match="cache")

    mask = {"attention_mask": torch.ones_like(ids)}
    with warning():
        whole = model.generate(ids, **GREEDY, **mask, past_key_values=filled())
    with warning():
        alone = model.generate(ids[:, 9:], **GREEDY, **mask, past_key_values=filled())
    assert torch.equal(alone[:, -STEPS:], whole[:, -STEPS:])


@pytest.mark.parametrize("settings", [{}, {"prompt_lookup_num_tokens": 3}, {"num_beams": 3}])
def test_a_generated_token_is_never_edited(settings):
    model, ids = attach(tiny_llama(), positions="all"), prompt(6)
    inside, outside, past = [], [], [0]
    llama = model.get_base_model()

    def note_past(module: nn.Module, args: Any, kwargs: Any) -> None:
        past[0] = kwargs["past_key_values"].get_seq_length()

    def compare(module: nn.Module, args: Any, output: Any) -> None:
        moved = (output - before[0]).abs().amax(-1).ne(0)
        column = torch.arange(output.shape[1]) + past[0]
        inside.append(moved[:, column < 6].flatten())
        outside.append(moved[:, column >= 6].flatten())

    before: list[Tensor] = []
    layer = llama.model.layers[0]

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        before[:] = [output]

    handles = [
        llama.model.register_forward_pre_hook(note_past, with_kwargs=True),
        layer.register_forward_hook(keep, prepend=True),  # before the edit
        layer.register_forward_hook(compare),  # after it
    ]
    model.generate(ids, do_sample=False, max_new_tokens=STEPS, **settings)
    for handle in handles:
        handle.remove()
    assert torch.cat(inside).numel() >= 6
    assert torch.cat(inside).all()
    assert torch.cat(outside).numel() >= STEPS - 1
    assert not torch.cat(outside).any()


@pytest.mark.parametrize(
    ("positions", "tied"), [("f2+l2", "all"), ("l2", "all"), ("all", "all"), ("f2+l2", "sides")]
)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_edit_generated_edits_them_whatever_the_cache(name, positions, tied):
    model = attach(tiny(name), positions=positions, tied=tied, edit_generated=True)
    ids = prompt(6)
    expected = by_hand(model, ids)
    for settings in (
        {},
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 4},
    ):
        assert torch.equal(model.generate(ids, **GREEDY, **settings), expected), settings
    never = attach(tiny(name), positions=positions, tied=tied)
    never.load_state_dict(model.state_dict())
    assert not torch.equal(never.generate(ids, **GREEDY), expected)
    columns = {"f2+l2": [0, 1, 4, 5], "l2": [4, 5], "all": list(range(6))}[positions]
    columns = columns + list(range(6, 6 + STEPS))
    if tied == "all":
        with plain_hooks(tiny(name), model, [columns]) as base:
            assert torch.equal(base.generate(ids, **GREEDY), expected)


def test_edit_generated_in_a_left_padded_batch_is_each_alone():
    model = attach(tiny_llama(), edit_generated=True)
    prompts = [prompt(9), prompt(3)]
    ids, mask = pad_left(prompts)
    for settings in ({}, {"cache_implementation": "static", "disable_compile": True}):
        batch = model.generate(ids, attention_mask=mask, **GREEDY, **settings)
        for row, alone in zip(batch, prompts, strict=True):
            assert torch.equal(row[-STEPS:], model.generate(alone, **GREEDY)[0, -STEPS:])


# --- several adapters, several threads, accidents -----------------------------------------------


def two_adapters() -> PeftModel:
    model = attach(tiny_llama())
    torch.manual_seed(7)
    model.add_adapter("other", ReftConfig(task_type="CAUSAL_LM", r=3, positions="f1+l3"))
    return model.eval()


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"num_beams": 2, "use_cache": False}])
def test_adapter_names_in_a_batch_are_each_alone(settings):
    model, names = two_adapters(), ["other", "__base__", "default"]
    prompts = [prompt(9), prompt(7), prompt(5)]
    ids, mask = pad_left(prompts)
    got = model.generate(ids, attention_mask=mask, **GREEDY, **settings, adapter_names=names)
    for row, name, alone in zip(got, names, prompts, strict=True):
        if name == "__base__":
            expected = tiny_llama().generate(alone, **GREEDY, **settings)
        else:
            model.set_adapter(name)
            expected = model.generate(alone, **GREEDY, **settings)
        assert torch.equal(row[-STEPS:], expected[0, -STEPS:])


def test_threads_do_not_mix():
    model, ids = two_adapters(), prompt(9)
    jobs: list[tuple[str, float]] = [("default", 1.0), ("other", 1.0), ("default", -0.5)]
    jobs.append(("__base__", 1.0))
    results: dict[int, list[Tensor]] = {}
    barrier = threading.Barrier(len(jobs))

    def run(i: int, wait: bool) -> None:
        name, strength = jobs[i]
        if wait:
            barrier.wait()
        with options(adapter_names=[name], strength=strength):
            results.setdefault(i, []).extend(model.generate(ids, **GREEDY) for _ in range(4))

    for i in range(len(jobs)):
        run(i, wait=False)
    expected = {i: r[0] for i, r in results.items()}
    assert len({tuple(t[0].tolist()) for t in expected.values()}) == len(jobs)
    results.clear()
    threads = [threading.Thread(target=run, args=(i, True)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, expectation in expected.items():
        assert len(results[i]) == 4
        assert all(torch.equal(got, expectation) for got in results[i])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("how", ["forward", "generate"])
def test_an_interrupted_call_leaves_nothing_behind(llama, error, how):
    ids, other = prompt(9), prompt(5, seed=1)
    expected = llama(other).logits

    def interrupt(module: nn.Module, args: Any, output: Any) -> None:
        raise error("in the middle")

    layer = llama.get_base_model().model.layers[1]
    handle = layer.mlp.register_forward_hook(interrupt)
    call, given = {
        "forward": (llama, {"labels": ids, "prompt_lengths": torch.tensor([2])}),
        "generate": (llama.generate, {**GREEDY, "adapter_names": ["default"]}),
    }[how]
    with pytest.raises(error, match="in the middle"), options(strength=3.0):
        call(input_ids=ids, **given)
    handle.remove()
    torch.testing.assert_close(llama(other).logits, expected, rtol=0, atol=0)
    inner = llama.get_base_model().model
    torch.testing.assert_close(
        llama.get_base_model().lm_head(inner(other).last_hidden_state), expected, rtol=0, atol=0
    )


def test_strength_is_followed_by_generate(llama):
    ids = prompt(9)
    set_strength(llama, 0.0)
    assert torch.equal(llama.generate(ids, **GREEDY), tiny_llama().generate(ids, **GREEDY))


# --- encoder and decoder ------------------------------------------------------------------------


def tiny_seq2seq(name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "t5":
            config = T5Config(
                vocab_size=259,
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=4,
                initializer_factor=5.0,
                decoder_start_token_id=0,
            )
            return T5ForConditionalGeneration(config).eval()
        config = BartConfig(
            vocab_size=259,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            init_std=0.4,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
        )
        return BartForConditionalGeneration(config).eval()


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
def test_of_an_encoder_decoder_the_encoder_is_edited(name, settings):
    model = attach(tiny_seq2seq(name), task_type="SEQ_2_SEQ_LM")
    assert all(".encoder." in f".{n}." for n in reft_layers(model))
    prompts = [prompt(9), prompt(5)]
    T, given = 9, {**GREEDY, "min_new_tokens": None, **settings}
    ids = torch.cat([nn.functional.pad(p, (0, T - p.shape[1])) for p in prompts])
    mask = ids.ne(0).long()
    got = model.generate(input_ids=ids, attention_mask=mask, **given)
    base = tiny_seq2seq(name)
    phis = [layer.reft_phi["default"] for layer in reft_layers(model).values()]
    encoder = base.get_encoder()
    layers = encoder.block if name == "t5" else encoder.layers

    def edit_with(phi: Any) -> Callable[..., Any]:
        def edit(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            new = hidden.clone()
            for row, columns in enumerate([[0, 1, 7, 8], [0, 1, 3, 4]]):
                for column in columns:
                    new[row, column] = edited(new[row, column], phi, 0)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return edit

    plain = base.generate(input_ids=ids, attention_mask=mask, **given)
    for layer, phi in zip(layers, phis, strict=True):
        layer.register_forward_hook(edit_with(phi))
    expected = base.generate(input_ids=ids, attention_mask=mask, **given)
    assert torch.equal(got, expected)
    assert got.shape != plain.shape or not torch.equal(got, plain)
