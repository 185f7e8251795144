"""What only shows far from the examples that training's shortcuts are tried on.

Before a run they are compared with the model on a few short examples. Here the batch that counts
is another one: longer, with beginnings in common, of another data set.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from architectures import ARCHITECTURES, COMMON, EXPERTS, Architecture
from reftune.data import TokenDataset
from reftune.heldout import heldout_cross_entropy
from reftune.prompts import Encoded
from reftune.speed import attention, products
from reftune.speed.frozen import Store
from reftune.speed.plan import Shortcuts
from reftune.speed.training import taking
from reftune.train import TrainSettings, shortcuts
from speed_tiny import (
    COLLATOR,
    VOCAB,
    GiB,
    adapted,
    assert_same,
    dataset,
    described,
    frozen,
    nothing_left,
    oracle,
    rows,
    stepped,
)

pytestmark = [
    # PEFT 0.21 asks a model for a property that transformers 5.23 deprecates.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
]

SETTINGS = TrainSettings(device="cpu", compile=False)
TRIED = [(3, 2), (4, 3), (2, 2), (2, 1)]
"""Prompts and completions that a run tries its shortcuts on: the shortest ones."""
TEMPLATE = 12
"""Tokens that the examples of a batch begin with."""


def alike(shapes: Sequence[tuple[int, int]], seed: int = 7) -> list[Encoded]:
    """Return examples that begin alike; shapes count the tokens that follow, and completions."""
    g = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(6, VOCAB, (count,), generator=g).tolist()

    beginning = draw(TEMPLATE)
    return [Encoded(beginning + draw(p) + draw(c), TEMPLATE + p) for p, c in shapes]


def tried_and(examples: Sequence[Encoded]) -> tuple[TokenDataset, list[Any]]:
    """Return a data set that begins with `TRIED`, and the batch of the others."""
    g = torch.Generator().manual_seed(0)
    ids = [torch.randint(6, VOCAB, (p + c,), generator=g).tolist() for p, c in TRIED]
    short = [Encoded(one, p) for one, (p, _) in zip(ids, TRIED, strict=True)]
    data = TokenDataset([*short, *examples])
    return data, [data[i] for i in range(len(short), len(data))]


def check(
    model: PeftModel, shapes: Sequence[tuple[int, int]], folder: Path, **settings: Any
) -> Any:
    """Check a run's shortcuts, tried on short examples, on a batch of longer ones."""
    data, batch = tried_and(alike(shapes))
    expected = oracle(model, batch)
    given = SETTINGS.model_copy(update=settings)
    with nothing_left(model), shortcuts(model, data, COLLATOR, given, folder) as step:
        assert step.collate is not COLLATOR
        for _ in range(2):
            assert_same(stepped(model, step, batch), expected)
        return step


SHAPES = [(2, 3), (7, 4), (12, 2)]


def make(family: str, **settings: Any) -> Any:
    merged = {**COMMON, "eos_token_id": 2, **settings}
    return Architecture(f"{family}ForCausalLM", f"{family}Config", merged, "").make()


def deepseek() -> Any:
    """Return a model that masks the keys which an indexer leaves out, for "sdpa" and "eager".

    With fewer heads some keys have the same score, and which is taken is arbitrary.
    """
    sizes = dict.fromkeys(["qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "index_topk"], 8)
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "index_n_heads": 16, "index_head_dim": 16}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    return make(
        "DeepseekV32",
        **sizes,
        **ranks,
        **experts,
        num_key_value_heads=4,
        first_k_dense_replace=1,
        moe_intermediate_size=16,
        n_shared_experts=1,
    )


def llama4(**settings: Any) -> Any:
    return Architecture(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**COMMON, **EXPERTS, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size_mlp": 64},
        "",
    ).make(**settings)


def gpt_neo() -> Any:
    return make(
        "GPTNeo",
        num_layers=3,
        num_heads=4,
        attention_types=[[["local"], 3]],
        window_size=8,
        resid_dropout=0.0,
        embed_dropout=0.0,
    )


def mpt() -> Any:
    """Return a model whose attention counts columns, and whose config has no longest input."""
    config = transformers.MptConfig(
        vocab_size=VOCAB, d_model=32, n_layers=3, n_heads=4, expansion_ratio=2, max_seq_len=64
    )
    config.initializer_range, config.pad_token_id = 0.2, 0
    torch.manual_seed(0)
    return transformers.MptForCausalLM(config).eval()


MODELS = {
    "an indexer of keys": deepseek,
    "attention in chunks shorter than the beginning": lambda: llama4(attention_chunk_size=6),
    "attention in chunks longer than the beginning": lambda: llama4(attention_chunk_size=16),
    "a local window": gpt_neo,
    "biases by column": mpt,
}


@pytest.mark.parametrize("kind", MODELS)
def test_attention_that_sees_less_in_longer_examples(kind: str, tmp_path: Path) -> None:
    check(adapted(MODELS[kind]()), SHAPES, tmp_path)


def test_a_config_that_does_not_say_how_long_inputs_may_be(tmp_path) -> None:
    settings = {k: v for k, v in COMMON.items() if k != "max_position_embeddings"}
    bloom = Architecture("BloomForCausalLM", "BloomConfig", settings, "").make()
    check(adapted(bloom), SHAPES, tmp_path)


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "factor": 4.0,
    "original_max_position_embeddings": 20,
    "rope_theta": 1e4,
}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize("adapter", [{}, {"layers": "all", "positions": "f1+l1"}])
def test_a_rotary_embedding_that_grows_with_the_batch(adapter, tmp_path) -> None:
    base = ARCHITECTURES["llama"].make(rope_parameters=DYNAMIC, max_position_embeddings=16)
    check(adapted(base, **adapter), SHAPES, tmp_path)


@pytest.mark.parametrize("longest", [19, 20, 21, 22, 26])
@pytest.mark.parametrize("packing", [False, True])
def test_a_rotary_embedding_that_is_another_beyond_a_length(longest, packing, tmp_path) -> None:
    base = ARCHITECTURES["llama"].make(rope_parameters=LONG)
    step = check(adapted(base), [(3, 2), (4, longest - 16)], tmp_path, packing=packing)
    assert (step.frozen is None) == (packing or longest > 20)


def test_a_rotary_embedding_of_each_kind_of_layer(tmp_path) -> None:
    base = ARCHITECTURES["gemma3"].make(
        sliding_window=64,
        rope_parameters={"full_attention": LONG, "sliding_attention": PLAIN},
    )
    step = check(adapted(base), SHAPES, tmp_path)
    assert step.frozen is None


# --- numbers of examples that are given twice -----------------------------------------------------


def reusing(model: PeftModel) -> Shortcuts:
    return Shortcuts(on=True, frozen=frozen(model, Store(GiB)), heads=True)


def test_another_example_of_the_same_number_and_length_is_another_one() -> None:
    """A data set may draw its examples anew, or be two that are numbered alike."""
    model = adapted(ARCHITECTURES["llama"].make())
    first, second = rows(seed=1), rows(seed=2)
    with taking(described(model), reusing(model), COLLATOR) as step:
        for examples in (first, first, second, second, first):
            assert_same(stepped(model, step, examples), oracle(model, examples))
        assert step.frozen is not None
        assert step.frozen.hits == 2


def test_two_examples_of_one_number_in_a_batch() -> None:
    model = adapted(ARCHITECTURES["llama"].make())
    (one,), (other,) = rows([(9, 4)], seed=1), rows([(9, 4)], seed=2)
    with taking(described(model), reusing(model), COLLATOR) as step:
        for examples in ([one, other], [one, other], [other, one], [other], [one]):
            assert_same(stepped(model, step, examples), oracle(model, examples))


# --- attention ------------------------------------------------------------------------------------


def of_both(ours: Any, theirs: Any, *tensors: torch.Tensor) -> None:
    """Check that two functions have the same values and gradients."""
    found = []
    for run in (ours, theirs):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = run(*leaves)
        torch.manual_seed(3)
        weights = torch.randn(out.shape, dtype=out.dtype)  # whatever the layout of out in memory
        found.append([out, *torch.autograd.grad((out * weights).sum(), leaves)])
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("S", [*range(2, 6), 31, 32, 33, 63, 64, 65, 255, 257, 290])
def test_causal_attention_at_the_ends_of_blocks(S: int) -> None:
    torch.manual_seed(S)
    q, k, v = (torch.randn(1, heads, S, 4, dtype=torch.float64) for heads in (4, 2, 2))
    of_both(
        lambda *t: products.attention(*t, None, True, 0.5),
        lambda *t: scaled_dot_product_attention(*t, is_causal=True, scale=0.5, enable_gqa=True),
        q,
        k,
        v,
    )


def test_an_added_mask_of_minus_infinity_spoils_nothing() -> None:
    """A row that may attend to nothing has no softmax."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 5, 4, dtype=torch.float64) for _ in range(3))
    mask = torch.zeros(2, 1, 5, 5, dtype=torch.float64).masked_fill_(
        torch.ones(5, 5).triu(1).bool(), -torch.inf
    )
    mask[0, :, 2] = -torch.inf
    read = torch.ones(2, 1, 5, 1, dtype=torch.float64)
    read[0, :, 2] = 0.0
    of_both(
        lambda *t: products.attention(*t, mask, False, 0.5) * read,
        lambda *t: scaled_dot_product_attention(*t, mask, scale=0.5) * read,
        q,
        k,
        v,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 10.0, 20.0])
def test_scores_with_an_offset_lose_no_digits(offset: float, dtype: torch.dtype) -> None:
    """Keys with a large bias, as Qwen2's have, next to which scores differ little."""
    torch.manual_seed(0)
    u = torch.nn.functional.normalize(torch.randn(64), dim=0)
    q, k, v = (torch.randn(2, 3, 50, 64) for _ in range(3))
    tensors = [(q + offset * u).to(dtype), (k + 3 * offset * u).to(dtype), v.to(dtype)]

    def found(run: Any, exact: bool = False) -> list[torch.Tensor]:
        leaves = [(t.double() if exact else t.clone()).requires_grad_() for t in tensors]
        out = run(*leaves)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        return [out, *torch.autograd.grad((out * weights.to(out.dtype)).sum(), leaves)]

    def torchs(*t: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(*t, is_causal=True, scale=0.125)

    exact = found(torchs, exact=True)
    ours = found(lambda *t: products.attention(*t, None, True, 0.125))
    for got, wanted in zip(ours, exact, strict=True):
        # 0.15 in bfloat16 where the keys are taken as they are
        assert (got.double() - wanted).norm() <= 1.3 * torch.finfo(dtype).eps * wanted.norm()


def test_a_mask_that_is_learned_and_queries_for_all_examples_are_left_to_transformers() -> None:
    q, k, v = (torch.randn(2, 4, 6, 4) for _ in range(3))
    learned = torch.zeros(1, 1, 6, 6, requires_grad=True)
    assert attention._short(nn.Module(), q, k, v, learned, {}) is None
    assert attention._short(nn.Module(), q[:1], k, v, learned.detach(), {}) is None
    assert attention._short(nn.Module(), q, k, v, learned.detach(), {}) == 0.5
    out, _ = attention.attention(nn.Module(), q[:1], k, v, learned)
    assert out.shape == (2, 6, 4, 4)
    assert torch.autograd.grad(out.square().sum(), learned)[0].any()


# --- the held-out loss ----------------------------------------------------------------------------


def test_examples_without_a_label_do_not_decide_how_the_others_are_computed() -> None:
    model = adapted(ARCHITECTURES["llama"].make())
    data = dataset([(1, 0), (2, 0), (9, 4), (14, 9)])
    given = []
    head = model.get_base_model().get_output_embeddings()
    with torch.no_grad():
        losses = [float(model(**COLLATOR([data[i]])).loss) for i in (2, 3)]
    expected = (losses[0] * 4 + losses[1] * 9) / 13
    head.register_forward_hook(lambda _, args, out: given.append(out[..., 0].numel()))
    assert heldout_cross_entropy(model, data, COLLATOR, 1) == pytest.approx(expected, rel=1e-5)
    assert given == [4, 13, 4, 9]  # the first that has labels is computed both ways
