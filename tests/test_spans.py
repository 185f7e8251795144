"""Where the prompt is: which tokens of a real model are edited, by who says so."""

import itertools
import threading
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from reftune import PositionError, ReftConfig, masks, options, reft_layers, spans
from tiny import tiny_llama

# PEFT 0.21 asks a model for a property that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

S = 10
IDS = torch.randint(3, 259, (2, S), generator=torch.Generator().manual_seed(0))


def adapted(**settings: Any) -> PeftModel:
    torch.manual_seed(0)
    settings = {"r": 4, "positions": "f2+l1", "task_type": "CAUSAL_LM", **settings}
    return get_peft_model(tiny_llama(), ReftConfig(**settings)).eval()


@pytest.fixture
def model() -> PeftModel:
    return adapted()


@torch.no_grad()
def logits(model: PeftModel, ids: Tensor, **inputs: Any) -> Tensor:
    out: Tensor = model(input_ids=ids, **inputs).logits
    return out


@torch.no_grad()
def edited(model: nn.Module, ids: Tensor, **inputs: Any) -> list[list[int]]:
    """Return the columns that the first layer edits, of each row.

    Nothing precedes its edit, so its output differs from the base model's there and only there.
    """
    on = model(input_ids=ids, output_hidden_states=True, **inputs).hidden_states[1]
    with options(strength=0.0):
        off = model(input_ids=ids, output_hidden_states=True, **inputs).hidden_states[1]
    return [row.nonzero()[:, 0].tolist() for row in (on != off).any(-1)]


def columns(n: int) -> Tensor:
    return (torch.arange(S) < n).expand(2, S)


# Each says another length of the prompt; earlier ones win.
SOURCES = ["prompt_mask", "prompt_lengths", "labels", "generation", "attention_mask"]
LENGTHS = dict(zip(SOURCES, (3, 4, 5, 7, 9), strict=True))
CONFLICTS = [c for n in range(6) for c in itertools.combinations(SOURCES, n)]


@pytest.mark.parametrize("how", ["argument", "options"])
@pytest.mark.parametrize("given", CONFLICTS, ids="+".join)
def test_sources_in_their_order(given: tuple[str, ...], how: str, model: PeftModel) -> None:
    inputs: dict[str, Any] = {
        "prompt_mask": columns(LENGTHS["prompt_mask"]),
        "prompt_lengths": torch.full((2,), LENGTHS["prompt_lengths"]),
        "labels": IDS.masked_fill(columns(LENGTHS["labels"]), -100),
        "attention_mask": columns(LENGTHS["attention_mask"]).long(),
    }
    inputs = {k: v for k, v in inputs.items() if k in given}
    expected = min((LENGTHS[name] for name in given), default=S)
    with ExitStack() as stack:
        if "generation" in given:
            stack.enter_context(spans.generation(LENGTHS["generation"], None))
        if how == "options":
            explicit = {k: inputs.pop(k) for k in SOURCES[:2] if k in inputs}
            stack.enter_context(options(**explicit))
        assert edited(model, IDS, **inputs) == [[0, 1, expected - 1]] * 2


def test_an_argument_wins_over_options(model: PeftModel) -> None:
    with options(prompt_lengths=torch.tensor([4, 4])):
        assert edited(model, IDS, prompt_lengths=torch.tensor([6, 3])) == [[0, 1, 5], [0, 1, 2]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_lengths_and_labels_count_attended_tokens(side: str, model: PeftModel) -> None:
    pads = 3
    mask = torch.ones(2, S).long()
    mask[0, slice(0, pads) if side == "left" else slice(S - pads, S)] = 0
    start = pads if side == "left" else 0
    expected = [[start, start + 1, start + 4], [0, 1, 4]]
    lengths = torch.tensor([5, 5])
    assert edited(model, IDS, attention_mask=mask, prompt_lengths=lengths) == expected
    labels = IDS.clone()
    labels[0, : start + 5], labels[1, :5] = -100, -100
    assert edited(model, IDS, attention_mask=mask, labels=labels) == expected
    ends = [[start, start + 1, start + S - pads - 1], [0, 1, S - 1]]
    assert edited(model, IDS, attention_mask=mask) == ends


def test_labels_of_a_classifier_are_no_prompt() -> None:
    model = adapted(task_type=None)
    entry = masks.entry_of(model, model, causal_lm=False)
    _, span = spans.open_span(model, entry, (), {"input_ids": IDS, "labels": IDS})
    spans.close_span(model)
    assert span is not None
    assert span.labels is None


@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("positions", ["f2+l1", "l2", "all"])
@pytest.mark.parametrize("tied", ["all", "sides"])
def test_packed_equals_each_alone(tied: str, positions: str, with_labels: bool) -> None:
    model = adapted(positions=positions, tied=tied)
    parts = [IDS[:1, :2], IDS[:1, 2:7], IDS[1:, :1], IDS[1:, 3:10]]
    ids = torch.cat(parts, dim=1)
    position_ids = torch.cat([torch.arange(p.shape[1]) for p in parts])[None]
    labels = [part.clone() for part in parts]
    for label in labels:
        label[:, : label.shape[1] - 1] = -100
    inputs = {"labels": torch.cat(labels, dim=1)} if with_labels else {}
    # Without a cache: with one, transformers takes restarting position ids for one sequence.
    together = logits(model, ids, position_ids=position_ids, use_cache=False, **inputs)
    alone = [
        logits(model, part, **({"labels": label} if with_labels else {}))
        for part, label in zip(parts, labels, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone, dim=1), atol=1e-4, rtol=1e-4)


def in_chunks(model: PeftModel, cache: Any, sizes: list[int], **inputs: Any) -> Tensor:
    """Return the logits of IDS fed in chunks; a mask is given as far as `full` says."""
    parts, past = [], 0
    for size in sizes:
        ids = IDS[:, past : past + size]
        parts.append(logits(model, ids, past_key_values=cache, **inputs))
        past += size
    return torch.cat(parts, dim=1)


def dynamic(model: PeftModel) -> Any:
    return DynamicCache(config=model.config)


def static(model: PeftModel) -> Any:
    return StaticCache(config=model.config, max_cache_len=16)


@pytest.mark.parametrize(
    ("say", "cache"),
    [("prompt_lengths", dynamic), ("prompt_mask", dynamic), ("prompt_mask", static)],
)
@pytest.mark.parametrize("sizes", [[4, 4, 1, 1], [1, 6, 3], [7, 1, 1, 1]])
@pytest.mark.parametrize("positions", ["f2+l3", "f3", "l2", "all"])
def test_chunks_equal_one_forward(say: str, positions: str, sizes: list[int], cache: Any) -> None:
    """A prompt of 7 and of 5 tokens, then a completion; its chunks cross and split both."""
    model, lengths = adapted(positions=positions), torch.tensor([7, 5])
    said = {
        "prompt_lengths": lengths,
        "prompt_mask": torch.arange(S) < lengths[:, None],
    }[say]
    whole = logits(model, IDS, **{say: said})
    chunked = in_chunks(model, cache(model), sizes, **{say: said})
    torch.testing.assert_close(chunked, whole, atol=1e-4, rtol=1e-4)
    base = logits(model, IDS, prompt_mask=torch.zeros(2, S, dtype=torch.bool))
    assert not torch.allclose(whole, base, atol=1e-2)


@pytest.mark.parametrize("positions", ["f2+l3", "all"])
def test_a_mask_that_reaches_further_says_that_the_prompt_goes_on(positions: str) -> None:
    model, mask = adapted(positions=positions), torch.ones(2, S).long()
    mask[0, :3] = 0
    whole = logits(model, IDS, attention_mask=mask)
    cache = dynamic(model)
    chunks = [
        logits(model, IDS[:, a:b], attention_mask=mask, past_key_values=cache)
        for a, b in ((0, 4), (4, 9), (9, S))
    ]
    got = torch.cat(chunks, dim=1)[:, 4:9]
    torch.testing.assert_close(got, whole[:, 4:9], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cache", [dynamic, static])
def test_decoded_tokens_are_not_edited(cache: Any, model: PeftModel) -> None:
    past = cache(model)
    whole = logits(model, IDS, prompt_lengths=torch.tensor([7, 7]))
    first = logits(model, IDS[:, :7], past_key_values=past)
    rest = [logits(model, IDS[:, t : t + 1], past_key_values=past) for t in range(7, S)]
    torch.testing.assert_close(torch.cat([first, *rest], 1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cache", [dynamic, static])
def test_edit_generated_edits_decoded_tokens(cache: Any) -> None:
    model = adapted(edit_generated=True)
    assert edited(model, IDS, prompt_lengths=torch.tensor([4, 6])) == [
        [0, 1, 3, 4, 5, 6, 7, 8, 9],
        [0, 1, 5, 6, 7, 8, 9],
    ]
    past = cache(model)
    whole = logits(model, IDS, prompt_lengths=torch.tensor([7, 7]))
    first = logits(model, IDS[:, :7], past_key_values=past)
    rest = [logits(model, IDS[:, t : t + 1], past_key_values=past) for t in range(7, S)]
    torch.testing.assert_close(torch.cat([first, *rest], 1), whole, atol=1e-4, rtol=1e-4)


def square_mask(mask: Tensor, kind: str) -> Tensor:
    """Return the causal (B, 1, S, S) mask of a mask of tokens."""
    seen = torch.ones(S, S).tril().bool() & mask.bool()[:, None, None, :]
    return seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, -1e9)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_masks_of_four_dimensions(side: str, kind: str, model: PeftModel) -> None:
    mask = torch.ones(2, S).long()
    mask[0, slice(0, 3) if side == "left" else slice(7, S)] = 0
    expected = [[3, 4, 9] if side == "left" else [0, 1, 6], [0, 1, 9]]
    assert edited(model, IDS, attention_mask=mask) == expected
    assert edited(model, IDS, attention_mask=square_mask(mask, kind)) == expected


def test_options_nest(model: PeftModel) -> None:
    six, four = (torch.full((2,), n) for n in (6, 4))
    with options(prompt_lengths=six, strength=1.0):
        assert edited(model, IDS)[0] == [0, 1, 5]
        with options(prompt_lengths=four):
            assert edited(model, IDS)[0] == [0, 1, 3]
            with options(strength=0.0):
                inner = spans.current_span().options
                assert inner.strength == 0.0
                assert torch.equal(inner.prompt_lengths, four)
        assert edited(model, IDS)[0] == [0, 1, 5]
        with pytest.raises(RuntimeError, match="inside"), options(prompt_lengths=four):
            raise RuntimeError("inside")
        assert edited(model, IDS)[0] == [0, 1, 5]
    assert edited(model, IDS)[0] == [0, 1, 9]


def test_options_belong_to_a_thread(model: PeftModel) -> None:
    barrier, found = threading.Barrier(3, timeout=60), {}

    def work(n: int) -> None:
        with options(prompt_lengths=torch.full((2,), n)):
            barrier.wait()
            found[n] = [edited(model, IDS)[0] for _ in range(5)]
            barrier.wait()

    threads = [threading.Thread(target=work, args=(n,)) for n in (4, 6)]
    for thread in threads:
        thread.start()
    barrier.wait()
    outside = edited(model, IDS)[0]
    barrier.wait()
    for thread in threads:
        thread.join()
    assert outside == [0, 1, 9]
    assert found == {n: [[0, 1, n - 1]] * 5 for n in (4, 6)}


@pytest.mark.parametrize("where", ["model.layers.0.mlp", "model.layers.1", "lm_head", ""])
def test_a_span_is_closed_after_an_exception(where: str, model: PeftModel) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("in mid-forward")

    handle = model.base_model.model.get_submodule(where).register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in mid-forward"):
        logits(model, IDS, prompt_lengths=torch.tensor([4, 4]))
    handle.remove()
    assert spans._span.get() is None
    assert edited(model, IDS) == [[0, 1, 9]] * 2


def test_no_span_stays_open(model: PeftModel) -> None:
    logits(model, IDS)
    model.generate(input_ids=IDS, max_new_tokens=2, do_sample=False)
    model.base_model.model.model(input_ids=IDS)
    assert spans._span.get() is None
    assert spans._generation.get() is None


def test_two_forwards_before_one_backward(model: PeftModel) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]

    def loss(n: int) -> Tensor:
        out: Tensor = model(input_ids=IDS, labels=IDS.masked_fill(columns(n), -100)).loss
        return out

    together = torch.autograd.grad(loss(4) + loss(7), parameters)
    apart = [torch.autograd.grad(loss(n), parameters) for n in (4, 7)]
    for got, one, other in zip(together, *apart, strict=True):
        torch.testing.assert_close(got, one + other)


def test_what_does_not_fit_is_an_error(model: PeftModel) -> None:
    with pytest.raises(PositionError, match="prompt_mask has 3 rows, the batch has 2"):
        logits(model, IDS, prompt_mask=torch.ones(3, S).bool())
    with pytest.raises(PositionError, match="prompt_lengths has 3 rows"):
        logits(model, IDS, prompt_lengths=torch.tensor([1, 2, 3]))


def test_a_layer_by_itself_takes_every_token_for_prompt(model: PeftModel) -> None:
    layer = next(iter(reft_layers(model).values()))
    h = torch.randn(2, 5, 32)
    changed = (layer(h) != h).any(-1)
    assert changed.tolist() == [[True, True, False, False, True]] * 2
