"""Likelihoods in batches, with shared contexts, equal those of one example at a time."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from adapted_tiny import config, reft, strong
from architectures import ARCHITECTURES
from reftune import METHODS, ReftConfig
from reftune.errors import DataError, ReftConfigError
from reftune.likelihood import Likelihood, Pair, Scorer
from tiny import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

CONTEXTS = [tuple(range(10, 10 + n)) for n in (9, 4, 1, 14, 6)]
CONTINUATIONS = [(20,), (21,), (20, 30), (20, 31), (50, 51, 52, 53, 54), (60, 61, 62)]
PAIRS = [
    *(Pair(context, continuation) for context in CONTEXTS for continuation in CONTINUATIONS),
    *(Pair(CONTEXTS[0], continuation, has_prompt=False) for continuation in CONTINUATIONS),
    Pair(CONTEXTS[0][:-1], (CONTEXTS[0][-1], 20)),  # the tokens of another pair, divided elsewhere
    Pair((33, 34, 35), (36, 37)),
    Pair((33, 34, 35, 36), (37,)),
    Pair((70, 71), tuple(range(40, 52))),
]


@torch.no_grad()
def alone(model: Any, pair: Pair) -> Likelihood:
    """Score a pair by one forward of all its tokens, with the prompt's length as an argument."""
    n, ids = len(pair.context), torch.tensor([[*pair.context, *pair.continuation[:-1]]])
    told = {}
    if isinstance(model, PeftModel):
        told = {"prompt_lengths": torch.tensor([n if pair.has_prompt else 0])}
    logprobs = model(input_ids=ids, **told).logits[0].log_softmax(-1)[n - 1 :]
    target = torch.tensor(pair.continuation)
    value = logprobs.gather(-1, target[:, None]).sum()
    return Likelihood(float(value), bool((logprobs.argmax(-1) == target).all()))


def assert_same(found: Sequence[Likelihood], expected: Sequence[Likelihood]) -> None:
    assert [f.is_greedy for f in found] == [e.is_greedy for e in expected]
    torch.testing.assert_close(
        [f.logprob for f in found], [e.logprob for e in expected], rtol=1e-5, atol=1e-5
    )


def forwards(model: Any) -> list[tuple[int, int]]:
    """Return a list that is filled with the shape of each forward's ids."""
    shapes: list[tuple[int, int]] = []
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    base.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    return shapes


@pytest.mark.parametrize("positions", ["f2+l3", "l1", "f3", "all"])
@pytest.mark.parametrize("method", METHODS)
def test_pairs_in_batches_are_edited_where_each_alone_is(method, positions):
    model = reft(method, positions=positions)
    expected = [alone(model, pair) for pair in PAIRS]
    for batch_size in (1, 4, 32):
        assert_same(Scorer(model, batch_size).score(PAIRS), expected)
    base = [alone(tiny_llama(), pair).logprob for pair in PAIRS[-10:-4]]
    without = [e.logprob for e in expected[-10:-4]]
    assert without == pytest.approx(base, abs=1e-4), "no prompt, no edit"
    base = [alone(tiny_llama(), pair).logprob for pair in PAIRS[:30]]
    changed = [abs(e.logprob - b) for e, b in zip(expected[:30], base, strict=True)]
    assert max(changed) > 2e-4, "a prompt is edited"


@pytest.mark.parametrize("method", ["loreft", "reft_r1"])
def test_adapters_that_edit_what_is_generated_edit_continuations(method):
    model = reft(method, positions="f1+l1", edit_generated=True)
    expected = [alone(model, pair) for pair in PAIRS]
    assert_same(Scorer(model, 8).score(PAIRS), expected)


DECODERS = sorted(name for name, a in ARCHITECTURES.items() if a.kind == "decoder")


@pytest.mark.parametrize("name", DECODERS)
def test_every_architecture_scores_as_each_alone(name):
    model = get_peft_model(ARCHITECTURES[name].make(), ReftConfig(r=4, positions="f2+l3")).eval()
    model = strong(model)
    assert_same(Scorer(model, 8).score(PAIRS), [alone(model, pair) for pair in PAIRS])


def test_a_greedy_continuation_is_told():
    model = reft()
    context = (10, 11, 12)
    with torch.no_grad():
        ids = model.generate(input_ids=torch.tensor([context]), max_new_tokens=4, do_sample=False)
    greedy = tuple(ids[0, 3:].tolist())
    found = Scorer(model).score([Pair(context, greedy), Pair(context, (*greedy[:-1], 99))])
    assert [one.is_greedy for one in found] == [True, False]


def test_a_context_goes_in_once_for_all_its_continuations():
    model = reft()
    shapes = forwards(model)
    pairs = [Pair(CONTEXTS[3], continuation) for continuation in CONTINUATIONS]
    Scorer(model).score(pairs)
    assert shapes == [(1, 14), (4, 4)], "four distinct continuations without their last tokens"


def test_continuations_of_one_token_need_their_context_alone():
    model = reft()
    shapes = forwards(model)
    Scorer(model).score([Pair(c, (20 + k,)) for c in CONTEXTS[:2] for k in range(5)])
    assert shapes == [(2, 9)]


def test_a_batch_has_at_most_so_many_rows_and_tokens():
    model = reft()
    shapes = forwards(model)
    Scorer(model, batch_size=3).score([Pair((5, 6), (k, 7)) for k in range(10, 17)])
    assert [rows for rows, _ in shapes] == [1, 3, 1, 3, 1], (
        "a context, three of its rows; the last alone"
    )
    shapes.clear()
    Scorer(model, batch_size=99, batch_tokens=20).score([Pair(c, (20,)) for c in CONTEXTS])
    assert shapes == [(1, 14), (2, 9), (2, 4)]
    with pytest.raises(ReftConfigError, match="batch_size=0"):
        Scorer(model, batch_size=0)


def test_only_logits_that_are_read_are_computed():
    model = reft()
    kept = []
    head = model.get_base_model().lm_head
    head.register_forward_pre_hook(lambda module, args: kept.append(args[0].shape[1]))
    Scorer(model).score([Pair(tuple(range(3, 80)), (20, 21))])
    assert kept == [2]


def test_every_score_is_told_as_soon_as_it_is_known():
    model = reft()
    heard: dict[int, Likelihood] = {}
    found = Scorer(model, 2).score(PAIRS, heard.__setitem__)
    assert [heard[i] for i in range(len(PAIRS))] == found


def test_the_left_of_a_context_is_cut():
    pair = Pair(tuple(range(10)), (20, 21))
    assert pair.cut(11) == pair, "the last token does not go in"
    assert pair.cut(5) == Pair((6, 7, 8, 9), (20, 21))
    assert pair.cut(2) == Pair((9,), (20, 21))
    with pytest.raises(DataError, match="2 tokens does not fit a model that takes 1"):
        pair.cut(1)
    cut = Pair(tuple(range(10)), (20, 21), has_prompt=False).cut(5)
    assert not cut.has_prompt
    with pytest.raises(DataError, match="context of 0"):
        Pair((), (1,))


def test_a_model_in_bfloat16_is_scored_in_the_dtype_that_is_asked_for():
    model = tiny_llama().to(torch.bfloat16)
    rough, fine = (Scorer(model, dtype=dtype).score(PAIRS) for dtype in (None, torch.float32))
    assert any(r.logprob != f.logprob for r, f in zip(rough, fine, strict=True))
    logprobs = [f.logprob for f in fine]
    expected = [alone(tiny_llama(), pair).logprob for pair in PAIRS]
    assert logprobs == pytest.approx(expected, rel=0.1)
    assert all(math.isfinite(value) for value in logprobs)


def test_strength_0_is_the_base():
    from reftune import set_strength

    model = get_peft_model(tiny_llama(), config(positions="f2+l3"))
    set_strength(model, 0.0)
    assert_same(Scorer(model, 4).score(PAIRS), [alone(tiny_llama(), pair) for pair in PAIRS])
