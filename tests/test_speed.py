"""Training with shortcuts finds the model's own loss and gradients, or notices and does without."""

import contextvars
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import reftune
from architectures import ARCHITECTURES, COMMON, EXPERTS, GROUPED, Architecture
from reftune import METHODS
from reftune.data import Collator
from reftune.errors import PositionError
from reftune.speed import attention, loss, products, training
from reftune.speed.batches import CausalBatches
from reftune.speed.patch import forward_replaced
from reftune.speed.plan import Shortcuts, can_reuse, describe, examples_to_try
from reftune.speed.training import difference, settle, taking
from reftune.train import TrainSettings
from reftune.train import shortcuts as shortcuts_of_a_run
from speed_tiny import (
    COLLATOR,
    SHAPES,
    VOCAB,
    Found,
    adapted,
    assert_same,
    dataset,
    described,
    frozen,
    nothing_left,
    oracle,
    rows,
    stepped,
    taken,
    ways,
)

pytestmark = [
    # PEFT 0.21 asks a model for a property that transformers 5.23 deprecates.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
]

ROWS = rows()
SETTINGS = TrainSettings(device="cpu", reuse=True, compile=False)


def _architecture(family: str, **settings: Any) -> Architecture:
    return Architecture(
        f"{family}ForCausalLM", f"{family}Config", {**COMMON, **settings}, "model.layers"
    )


# More than the matrix has: logits that are scaled or capped, and layers that return tuples.
CAUSAL = {name: a for name, a in ARCHITECTURES.items() if a.generates} | {
    "gemma2": _architecture(
        "Gemma2",
        **GROUPED,
        query_pre_attn_scalar=8,
        sliding_window=6,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=2.0,
    ),
    "granite": _architecture("Granite", **GROUPED, logits_scaling=3.0, residual_multiplier=0.5),
    "cohere2": _architecture("Cohere2", num_key_value_heads=2, logit_scale=0.5, sliding_window=6),
    "gpt-oss": _architecture("GptOss", **GROUPED, **EXPERTS, sliding_window=6),
    "llama4": _architecture(
        "Llama4",
        num_key_value_heads=2,
        head_dim=8,
        **EXPERTS,
        intermediate_size_mlp=64,
        attention_chunk_size=6,
    ),
    "bamba": _architecture(
        "Bamba",
        num_key_value_heads=2,
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_n_groups=1,
        mamba_chunk_size=4,
        attn_layer_indices=[1],
    ),
}
CAUSAL["llama4"] = replace(CAUSAL["llama4"], config="Llama4TextConfig")

# What an architecture cannot do, and why: a difference is noticed, and training does without.
RECURRENT = {"qwen3-next", "falcon-h1", "mamba", "mamba2", "jamba", "bamba"}
CANNOT = {
    # A state runs from one example into the next, or attention is not told where examples end.
    "packed": RECURRENT | {"falcon", "bloom", "gpt-oss", "llama4"},
    # What is kept of a beginning is not only keys and values.
    "heads": RECURRENT,
    # The MLP takes or returns more than the states of tokens.
    "padding": {"bloom", "gpt-oss"},
    "unread": {"bloom", "gpt-oss"},
}
WAYS = (
    "labels only",
    "unread",
    "padding",
    "sharing",
    "packed",
    "packed, unread",
    "reuse",
    "heads",
    "reuse, heads",
    "reuse, heads, disk",
    "everything",
)


@cache
def model_of(name: str) -> PeftModel:
    """Return an adapted model, shared by the tests that leave it as it was."""
    return adapted(CAUSAL[name].make())


@cache
def expected_of(name: str) -> Found:
    return oracle(model_of(name), ROWS)


def can(name: str, shortcuts: Shortcuts) -> bool:
    return not any(getattr(shortcuts, what) and name in names for what, names in CANNOT.items())


# --- every architecture, every shortcut ---------------------------------------------------------


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("way", WAYS)
def test_a_shortcut_is_exact_or_noticed(name: str, way: str, tmp_path: Path) -> None:
    model = model_of(name)
    with nothing_left(model):
        chosen = ways(model, tmp_path)[way]
        reason = difference(described(model), chosen, model, COLLATOR, ROWS)
        assert (reason is None) == can(name, chosen), reason
        if reason is None:
            for result in taken(model, chosen, ROWS):
                assert_same(result, expected_of(name))


@pytest.mark.parametrize("name", CAUSAL)
def test_a_run_takes_what_its_model_can(name: str, tmp_path: Path) -> None:
    model, data = model_of(name), dataset()
    with nothing_left(model):
        everything = ways(model, tmp_path)["everything"]
        kept = settle(described(model), everything, model, COLLATOR, ROWS)
        for what in ("unread", "padding", "heads"):
            assert getattr(kept, what) == (name not in CANNOT[what]), what
        assert kept.frozen is everything.frozen
        with shortcuts_of_a_run(model, data, COLLATOR, SETTINGS, tmp_path) as step:
            for _ in range(2):
                assert_same(stepped(model, step, ROWS), expected_of(name))


@pytest.mark.parametrize("name", ["llama", "gemma2", "falcon-h1", "gpt2", "mixtral"])
@pytest.mark.parametrize("way", ["labels only", "everything", "packed, unread"])
def test_in_bfloat16_shortcuts_are_as_near_the_truth_as_the_model(name, way, tmp_path) -> None:
    arch = CAUSAL[name]
    half = adapted(arch.make().bfloat16())
    whole = adapted(arch.make().bfloat16().float())
    whole.load_state_dict(half.state_dict())
    chosen = ways(half, tmp_path)[way]
    if name == "falcon-h1":
        chosen = replace(chosen, heads=False, packed=False)
    exact, own = oracle(whole, ROWS), oracle(half, ROWS)
    assert difference(described(half), chosen, half, COLLATOR, ROWS) is None

    def error(result: Found) -> float:
        both = [(result[1][n] - g).norm() ** 2 for n, g in exact[1].items()]
        return float(sum(both)) ** 0.5

    for result in taken(half, chosen, ROWS):
        assert result[0].dtype is torch.float32
        torch.testing.assert_close(result[0], exact[0], rtol=0.005, atol=0.0)
        assert error(result) <= 1.5 * error(own)


@pytest.mark.parametrize("name", ["llama", "gemma2", "falcon-h1", "jamba", "gpt-oss", "mixtral"])
def test_in_bfloat16_the_same_shortcuts_are_taken(name, tmp_path, monkeypatch) -> None:
    """Rounding neither hides a difference (packed falcon-h1's is 0.08) nor looks like one."""
    monkeypatch.setitem(training._TOLERANCE, torch.bfloat16, 0.0)
    half = adapted(CAUSAL[name].make().bfloat16())
    before = {n: t.clone() for n, t in half.state_dict().items()}
    for way in ("everything", "packed"):
        with nothing_left(half):
            kept = settle(described(half), ways(half, tmp_path)[way], half, COLLATOR, ROWS)
        assert kept.on
        wanted = [n for n in CANNOT if getattr(ways(half, tmp_path)[way], n)]
        assert [n for n in wanted if getattr(kept, n)] == [
            n for n in wanted if name not in CANNOT[n]
        ]
    for n, t in half.state_dict().items():
        assert t.dtype == before[n].dtype, n
        assert torch.equal(t, before[n]), n


def test_a_difference_of_packing_does_not_hide_in_rounding(tmp_path) -> None:
    half = adapted(CAUSAL["falcon-h1"].make().bfloat16())
    packed = ways(half, tmp_path)["packed"]
    assert difference(described(half), packed, half, COLLATOR, ROWS) is None  # the tolerance is 0.1
    assert not settle(described(half), packed, half, COLLATOR, ROWS).packed


def test_what_fails_in_bfloat16_alone_is_not_taken(tmp_path) -> None:
    """transformers' Mamba without its kernels: "expected m1 and m2 to have the same dtype"."""
    half = adapted(CAUSAL["mamba"].make().bfloat16())
    everything = ways(half, tmp_path)["everything"]
    assert not settle(described(half), everything, half, COLLATOR, ROWS).on


def test_without_room_bfloat16_is_compared_in_bfloat16(tmp_path, monkeypatch, caplog) -> None:
    half = adapted(CAUSAL["llama"].make().bfloat16())
    everything = ways(half, tmp_path)["everything"]
    monkeypatch.setattr(training, "free_memory", lambda share: 0)
    assert settle(described(half), everything, half, COLLATOR, ROWS) == everything
    monkeypatch.setitem(training._TOLERANCE, torch.bfloat16, 0.0)
    assert not settle(described(half), everything, half, COLLATOR, ROWS).on
    assert "takes no shortcuts" in caplog.text


def test_what_cannot_run_in_float32_is_compared_in_bfloat16(tmp_path, monkeypatch) -> None:
    half = adapted(CAUSAL["llama"].make().bfloat16())

    def flash(module: nn.Module, args: tuple[Any, ...]) -> None:
        if module.weight.dtype == torch.float32:
            raise RuntimeError("only fp16 and bf16 data type")

    projection = described(half).layers[0].self_attn.q_proj
    handle = projection.register_forward_pre_hook(flash)
    everything = ways(half, tmp_path)["everything"]
    assert settle(described(half), everything, half, COLLATOR, ROWS) == everything
    handle.remove()


# --- every method and position, every kind of example -------------------------------------------

EVERY = [
    (method, positions, tied)
    for method, cls in METHODS.items()
    for positions in ("f2", "l3", "f1+l2", "all")
    for tied in ("all", "sides", "none")
    if positions == "f1+l2" or tied == "all"
    if tied != "none" or not cls.pools_tokens
]


def llama(method: str = "loreft", **settings: Any) -> PeftModel:
    return adapted(CAUSAL["llama"].make(), method, **settings)


def check(
    model: PeftModel, tmp_path: Path, examples: list[Any], *names: str, **kwargs: Any
) -> None:
    expected = oracle(model, examples, **kwargs)
    for name, chosen in ways(model, tmp_path).items():
        if names and name not in names:
            continue
        if described(model).config.intervention.pools_tokens:
            chosen = replace(chosen, unread=False)  # as `choose` says
        for result in taken(model, chosen, examples, **kwargs):
            assert_same(result, expected)


@pytest.mark.parametrize(("method", "positions", "tied"), EVERY)
def test_every_method(method, positions, tied, tmp_path) -> None:
    model = llama(method, positions=positions, tied=tied)
    pools = METHODS[method].pools_tokens and positions == "all"
    check(model, tmp_path, ROWS, "everything", *([] if pools else ["packed, unread"]))


def test_pooling_over_packed_examples_is_noticed(tmp_path) -> None:
    model = llama("reft_r1", positions="all")
    packed = ways(model, tmp_path)["packed"]
    assert "PositionError" in str(difference(described(model), packed, model, COLLATOR, ROWS))


@pytest.mark.parametrize(
    "settings",
    [
        {"short_prompts": "pyreft"},
        {"short_prompts": "pyreft", "positions": "f2+l2"},
        {"edit_generated": True},
        {"edit_generated": True, "positions": "f1"},
        {"layers": [0]},
        {"layers": [2]},
        {"layers": "all", "positions": "l9"},
        {"layers": [0, 2], "tied": "none"},
    ],
    ids=str,
)
def test_every_setting(settings, tmp_path) -> None:
    names = ["packed, unread", "reuse", "heads", "reuse, heads, disk", "everything"]
    check(llama(**settings), tmp_path, ROWS, *names)


def labelled(example: dict[str, Any], *columns: int) -> dict[str, Any]:
    labels = torch.full_like(example["labels"], -100)
    labels[list(columns)] = example["input_ids"][list(columns)]
    return {**example, "labels": labels}


EXAMPLES = {
    "one-token prompts": rows([(1, 3), (1, 1), (1, 7)]),
    "a batch of one": rows([(9, 4)]),
    "a batch of one short one": rows([(1, 1)]),
    "no padding": rows([(4, 3), (3, 4), (5, 2)]),
    "a shared beginning": [
        {**one, "input_ids": torch.cat([rows([(9, 9)])[0]["input_ids"][:5], one["input_ids"][5:]])}
        for one in rows([(9, 2), (6, 6), (12, 4)])
    ],
    "a shared beginning of all but one": [*rows([(9, 2)]), *rows([(9, 4)]), *rows([(2, 4)])],
    "no label in some": [labelled(ROWS[1]), *ROWS[:1], labelled(ROWS[3])],
    "labels in between": [labelled(ROWS[3], 8, 9, 15, 20), labelled(ROWS[1], 3, 12), ROWS[0]],
}


@pytest.mark.parametrize("settings", [{}, {"short_prompts": "pyreft"}, {"positions": "f1+l1"}])
@pytest.mark.parametrize("kind", EXAMPLES)
def test_every_kind_of_example(kind, settings, tmp_path) -> None:
    examples = [{**one, "index": i} for i, one in enumerate(EXAMPLES[kind])]
    check(llama(**settings), tmp_path, examples)


def test_a_label_on_the_first_token_leaves_no_prompt(tmp_path) -> None:
    """The model's own forward refuses it, unless it is told so, as shortcuts tell themselves."""
    model = llama()
    examples = [labelled(ROWS[1], 0, 5, 6), labelled(ROWS[3], 0, 20), ROWS[0]]
    with pytest.raises(PositionError, match="labels begin at the first token"):
        oracle(model, examples)
    prompts = torch.tensor([int(one["labels"].ne(-100).nonzero()[0]) for one in examples])
    with reftune.options(prompt_lengths=prompts):
        expected = oracle(model, examples)
    for chosen in ways(model, tmp_path).values():
        numbered = [{**one, "index": i} for i, one in enumerate(examples)]
        for result in taken(model, chosen, numbered):
            assert_same(result, expected)


def test_a_batch_without_a_label_adds_nothing_to_an_accumulated_loss(tmp_path) -> None:
    model, examples = llama(), [labelled(ROWS[1]), labelled(ROWS[3])]
    assert oracle(model, examples)[0].isnan()
    for chosen in ways(model, tmp_path).values():
        assert taken(model, chosen, examples)[0][0].isnan()
        loss, grads = taken(model, chosen, examples, num_items_in_batch=torch.tensor(5))[1]
        assert loss == 0
        assert not any(g.any() for g in grads.values())


@pytest.mark.parametrize("count", [7, torch.tensor(7)])
@pytest.mark.parametrize("name", ["llama", "granite"])
def test_the_loss_is_over_the_number_that_the_trainer_counts(count, name, tmp_path) -> None:
    model = adapted(CAUSAL[name].make())
    check(model, tmp_path, ROWS, "labels only", "packed", "everything", num_items_in_batch=count)


def test_the_trainer_is_told_the_same_of_a_replaced_forward() -> None:
    """It passes `num_items_in_batch` to a model whose forward takes any argument."""
    from inspect import Parameter, signature

    class Strict(type(CAUSAL["llama"].make())):  # type: ignore[misc]
        def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None):
            return super().forward(input_ids, attention_mask=attention_mask, labels=labels)

    strict = llama()
    strict.get_base_model().__class__ = Strict
    for model, expected in ((llama(), True), (strict, False)):
        with taking(described(model), Shortcuts(on=True), COLLATOR):
            taken_for = signature(model.get_base_model().forward).parameters.values()
        assert any(p.kind is Parameter.VAR_KEYWORD for p in taken_for) == expected


# --- what else may be in a model ----------------------------------------------------------------


def test_only_the_active_of_several_adapters_counts(tmp_path) -> None:
    from adapted_tiny import config, strong

    model = llama()
    model.add_adapter("other", config(layers=[0], positions="f1+l1"))
    strong(model, seed=2)
    for name, edited in (("default", (1, 2)), ("other", (0,))):
        model.set_adapter(name)
        assert described(model).edited == edited
        check(model, tmp_path, ROWS, "packed, unread", "reuse, heads", "everything")
    model.base_model.set_adapter(["default", "other"])
    assert describe(model) is None
    with shortcuts_of_a_run(model, dataset(), COLLATOR, TrainSettings(), tmp_path) as step:
        assert_same(stepped(model, step, ROWS), oracle(model, ROWS))


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"]])
def test_other_modules_that_are_trained(saved, tmp_path) -> None:
    model = llama(modules_to_save=saved)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and p.dim() == 2:
                p.add_(0.01)
    assert not can_reuse(described(model), model)
    check(model, tmp_path, ROWS, "labels only", "unread", "padding", "packed, unread")


def test_a_bias_of_the_head_that_is_trained(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(loss, "CHUNK", 4)
    model = adapted(CAUSAL["phi"].make())
    model.get_base_model().lm_head.bias.requires_grad_()
    check(model, tmp_path, ROWS, "labels only", "packed, unread")


# PEFT says that a model with two kinds of adapters is a special thing, and it is.
@pytest.mark.filterwarnings("ignore:Already found a .peft_config.:UserWarning")
def test_a_lora_beside_the_reft(tmp_path) -> None:
    model = llama()
    inject_adapter_in_model(
        LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
        model.get_base_model(),
        "x",
    )
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name or p.requires_grad)
    assert not can_reuse(described(model), model)
    check(model, tmp_path, ROWS, "labels only", "unread", "padding", "packed, unread")


@pytest.mark.parametrize(
    ("name", "random"),
    [
        ("llama", {"attention_dropout": 0.1}),
        ("gpt2", {"resid_pdrop": 0.1}),
        ("gpt2", {"attn_pdrop": 0.1}),
        ("opt", {"layerdrop": 0.1}),
        ("mixtral", {"router_jitter_noise": 0.1}),
    ],
)
def test_a_base_with_dropout_is_not_reused(name, random, tmp_path) -> None:
    model = adapted(CAUSAL[name].make(**random))
    assert not can_reuse(described(model), model)
    with shortcuts_of_a_run(model, dataset(), COLLATOR, SETTINGS, tmp_path) as step:
        assert step.frozen is None
    assert can_reuse(described(adapted(CAUSAL[name].make())), model_of(name))


@pytest.mark.parametrize("dropout_on", ["edit", "output"])
def test_dropout_of_the_edit_is_drawn_as_without_shortcuts(dropout_on, tmp_path) -> None:
    model = llama(dropout=0.3, dropout_on=dropout_on)
    assert can_reuse(described(model), model)
    torch.manual_seed(5)
    expected = oracle(model, ROWS)
    for chosen in ways(model, tmp_path).values():
        with taking(described(model), chosen, COLLATOR) as step:
            for _ in range(2):
                torch.manual_seed(5)
                assert_same(stepped(model, step, ROWS), expected)


def untold() -> PeftModel:
    base = CAUSAL["llama"].make()
    del base.model.layers[2]
    base.model.also = nn.ModuleList(nn.Identity() for _ in range(2))
    base.get_decoder = lambda: base
    return adapted(base, layers_path="model.layers", layers=[1])


UNKNOWN = {
    "inside a layer": lambda: llama(target_modules=r"model\.layers\.\d\.mlp", layers="all"),
    "below the layers": lambda: llama(target_modules=["embed_tokens"], layers="all"),
    "which layers is not told": untold,
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_is_not_known_takes_no_shortcut(kind, tmp_path) -> None:
    model = UNKNOWN[kind]()
    assert describe(model) is None
    with shortcuts_of_a_run(model, dataset(), COLLATOR, SETTINGS, tmp_path) as step:
        assert step.collate is COLLATOR
        assert_same(stepped(model, step, ROWS), oracle(model, ROWS))


def test_encoder_decoders_are_not_known() -> None:
    t5 = adapted(ARCHITECTURES["t5"].make(), layers=[1], task_type="SEQ_2_SEQ_LM")
    assert describe(t5) is None


def test_a_model_without_peft_around_it(tmp_path) -> None:
    model = llama().base_model.model
    check(model, tmp_path, ROWS, "packed, unread", "everything")


def test_another_collator_takes_no_shortcut(tmp_path) -> None:
    """What it does to a batch, a shortcut's batch would not have."""

    class Masking:
        pad_token_id = 0

        def __call__(self, examples: Any) -> dict[str, Tensor]:
            batch = COLLATOR(examples)
            first = batch["labels"].ne(-100).int().argmax(-1)
            batch["labels"][torch.arange(len(first)), first] = -100
            return batch

    model = llama()
    with shortcuts_of_a_run(model, dataset(), Masking(), SETTINGS, tmp_path) as step:
        assert isinstance(step.collate, Masking)
    with shortcuts_of_a_run(model, dataset(), Collator(0), SETTINGS, tmp_path) as step:
        assert isinstance(step.collate, CausalBatches)


# --- what is tried before it is trusted ---------------------------------------------------------


def test_the_examples_tried_have_padding_and_heads() -> None:
    """The two shortest might be equally long, or too short for a token that is not edited."""
    model = described(llama(positions="l3"))
    lengths = torch.tensor([40, 5, 5, 5, 6, 9, 30, 12])
    prompts = torch.tensor([30, 3, 3, 3, 3, 3, 4, 11])
    chosen = examples_to_try(model, lengths, prompts)
    assert 1 in chosen  # the shortest
    assert 5 in chosen  # half as long again
    assert 7 in chosen  # the shortest with a head
    assert len(set(chosen)) == len(chosen) - 1 <= 4
    assert examples_to_try(model, lengths[:1], prompts[:1]) == [0, 0]
    same = torch.full((4,), 8)
    assert examples_to_try(model, same, same - 5) == [0, 0]


@pytest.mark.parametrize(
    ("positions", "parts"), [("f1+l2", {"real", "place"}), ("l2", {"real", "head_ids"})]
)
def test_the_examples_tried_are_a_batch_of_every_kind(positions, parts, tmp_path) -> None:
    model, data = llama(positions=positions), dataset([(6, 3)] * 9 + [(9, 4), (7, 7)])
    tried = examples_to_try(
        described(model), torch.tensor(data.lengths), torch.tensor(data.prompt_lengths)
    )
    with taking(described(model), ways(model, tmp_path)["everything"], COLLATOR) as step:
        assert parts <= step.collate([data[i] for i in tried]).keys()


class BrokenError(Exception):
    pass


@pytest.mark.parametrize("error", [BrokenError, AssertionError, OSError, MemoryError])
@pytest.mark.parametrize(
    "where",
    [
        "reftune.speed.training.CausalBatches.__call__",
        "reftune.speed.training.restricting",
        "reftune.speed.training.linear_cross_entropy",
    ],
)
def test_whatever_goes_wrong_in_a_trial_is_noticed_and_put_back(error, where, tmp_path) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error("no")

    model = llama()
    for chosen in ways(model, tmp_path).values():
        with nothing_left(model), pytest.MonkeyPatch.context() as patch:
            patch.setattr(where, fail)
            reason = difference(described(model), chosen, model, COLLATOR, ROWS)
        assert reason == f"{error.__name__}: no"


def test_ctrl_c_in_a_trial_is_no_difference(monkeypatch, tmp_path) -> None:
    model = llama()

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("reftune.speed.training.linear_cross_entropy", interrupt)
    everything = ways(model, tmp_path)["everything"]
    # torch runs a module's closing hooks after errors only: the span is left to this context.
    context = contextvars.copy_context()
    with nothing_left(model), pytest.raises(KeyboardInterrupt):
        context.run(difference, described(model), everything, model, COLLATOR, ROWS)


def test_a_trial_leaves_each_module_in_its_mode() -> None:
    model = llama()
    model.get_base_model().model.layers[0].eval()
    with nothing_left(model):
        assert difference(described(model), Shortcuts(on=True), model, COLLATOR, ROWS) is None


@pytest.mark.parametrize("scale", [1.001, float("nan")])
def test_a_model_that_does_something_unheard_of_is_noticed(scale, tmp_path, caplog) -> None:
    """It takes no shortcuts, and training says so."""
    model = llama()
    base = model.get_base_model()
    head = base.lm_head
    base.lm_head = nn.Sequential(head)  # as a model would that calls its head in its own way
    base.get_output_embeddings = lambda: head
    whole_forward = type(base).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = whole_forward(self, *args, **kwargs)
        return replace(out, loss=out.loss * scale) if out.loss is not None else out

    base.__class__ = type("Odd", (type(base),), {"forward": forward})
    with shortcuts_of_a_run(model, dataset(), COLLATOR, SETTINGS, tmp_path) as step:
        assert step.collate is COLLATOR
    assert "takes no shortcuts" in caplog.text


def test_attention_of_every_part_of_a_model_is_put_back() -> None:
    model = adapted(CAUSAL["llava"].make())
    config = model.get_base_model().config
    model.get_base_model().set_attn_implementation({"": "sdpa", "vision_config": "eager"})
    assert config.vision_config._attn_implementation == "eager"
    with nothing_left(model), attention.in_training(model.get_base_model()):
        assert config.text_config._attn_implementation == attention.NAME
        assert config.vision_config._attn_implementation == "eager"


def test_a_forward_is_put_back_of_a_module_that_comes_twice_or_fails() -> None:
    module = nn.Linear(2, 2)
    x = torch.ones(1, 2)
    with forward_replaced([module, module], lambda m: partial(_twice, m.forward)):
        assert torch.equal(module(x), 4 * type(module).forward(module, x))
    assert "forward" not in vars(module)

    def fail_at_second(m: nn.Module) -> Any:
        if m is not module:
            raise BrokenError
        return m.forward

    with pytest.raises(BrokenError), forward_replaced([module, nn.Identity()], fail_at_second):
        pass
    assert "forward" not in vars(module)


def _twice(forward: Any, x: Tensor) -> Tensor:
    return 2 * forward(x)


# --- what is not computed, or not kept for the backward -----------------------------------------


class Largest(TorchDispatchMode):
    """Notes the most elements that a tensor with a dimension of the vocabulary's size has."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab, self.numel = vocab, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        is_new = isinstance(out, Tensor) and not func.is_view
        if is_new and out.dim() > 1 and out.shape[-1] == self.vocab:
            self.numel = max(self.numel, out.numel())
        return out


def saved(run: Any, model: nn.Module | None = None) -> tuple[Any, list[Tensor]]:
    """Return what a function returns, and what autograd keeps for its backward, but for weights."""
    weights = {p.untyped_storage().data_ptr() for p in (model.parameters() if model else ())}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
    return out, list(kept.values())


@pytest.mark.parametrize("N", [1, 256, 257, 700])
@pytest.mark.parametrize("count", [None, 900, torch.tensor(900)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_cross_entropy(N, count, with_bias) -> None:
    g = torch.Generator().manual_seed(0)
    h = torch.randn(N, 16, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 16, generator=g, dtype=torch.float64)
    bias = torch.randn(50, generator=g, dtype=torch.float64) if with_bias else None
    target = torch.randint(50, (N,), generator=g)
    expected = F.cross_entropy(F.linear(h, weight, bias), target, reduction="sum")
    expected = expected / (N if count is None else 900)
    got = loss.linear_cross_entropy(h, weight, bias, target, count)
    torch.testing.assert_close(got, expected.float(), rtol=1e-6, atol=0.0)
    (gradient,) = torch.autograd.grad(3 * got, h)
    (of_expected,) = torch.autograd.grad(3 * expected, h)
    torch.testing.assert_close(gradient, of_expected, rtol=1e-5, atol=1e-7)


def test_linear_cross_entropy_holds_the_logits_of_a_chunk() -> None:
    N, d, V = 5 * loss.CHUNK, 8, 200
    h = torch.randn(N, d, requires_grad=True)
    with Largest(V) as largest:
        out, kept = saved(
            lambda: loss.linear_cross_entropy(h, torch.randn(V, d), None, torch.zeros(N).long(), N)
        )
        out.backward()
    assert largest.numel == loss.CHUNK * V
    assert sum(t.nbytes for t in kept) <= h.nbytes + 1000


@pytest.mark.parametrize("N", [200, 700])
def test_linear_cross_entropy_of_bfloat16_is_a_float32_number(N) -> None:
    """Its gradient is as near the exact one as that of transformers' loss."""
    g = torch.Generator().manual_seed(0)
    h = torch.randn(N, 64, generator=g).bfloat16().requires_grad_()
    weight, target = torch.randn(50, 64, generator=g).bfloat16(), torch.arange(N) % 50
    count = 777  # its inverse is no number of bfloat16
    exact = F.cross_entropy(h.double() @ weight.double().T, target, reduction="sum") / count
    own = F.cross_entropy((h @ weight.T).float(), target, reduction="sum") / count
    got = loss.linear_cross_entropy(h, weight, None, target, count)
    assert got.dtype is torch.float32
    torch.testing.assert_close(got, own, rtol=1e-6, atol=0.0)
    of_exact, of_own, of_got = (torch.autograd.grad(x, h)[0].double() for x in (exact, own, got))
    assert (of_got - of_exact).norm() <= 1.1 * (of_own - of_exact).norm()


def logits_of(model: PeftModel, shortcuts: Shortcuts) -> int:
    with taking(described(model), shortcuts, COLLATOR) as step, Largest(VOCAB) as largest:
        stepped(model, step, ROWS)
    return largest.numel // VOCAB


@pytest.mark.parametrize("name", ["llama", "granite", "gemma2", "falcon-h1"])
def test_logits_are_computed_where_there_is_a_label(name, tmp_path) -> None:
    model, labels = model_of(name), sum(c for _, c in SHAPES)
    with Largest(VOCAB) as largest:
        oracle(model, ROWS)
    assert largest.numel // VOCAB >= len(SHAPES) * max(map(sum, SHAPES))
    assert logits_of(model, Shortcuts(on=True)) == labels


def states_kept(model: PeftModel, run: Any) -> int:
    """Return of how many rows at most the states of a width of the model are kept."""
    text = model.config
    _, kept = saved(run, model)
    wide = [t for t in kept if t.shape[-1:] in ((text.hidden_size,), (text.intermediate_size,))]
    return max((t.shape[:-1].numel() for t in wide), default=0)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_nothing_is_kept_for_a_backward_below_the_first_edited_layer(first) -> None:
    model = llama(positions="l1", layers=[first])
    kept: dict[int, int] = {}

    def noting(forward: Any, number: int, *args: Any, **kwargs: Any) -> Any:
        out, tensors = saved(partial(forward, *args, **kwargs), model)
        kept[number] = len(tensors)
        return out

    layers = list(described(model).layers)
    with (
        forward_replaced(layers, lambda m: partial(noting, m.forward, layers.index(m))),
        taking(described(model), Shortcuts(on=True), COLLATOR) as step,
    ):
        stepped(model, step, ROWS)
    assert {number for number, count in kept.items() if count} == set(range(first + 1, 3))


def test_nothing_is_kept_for_a_backward_before_the_first_edited_token(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(products, "BLOCK", 1000)  # probabilities of 32 keys look like states of 32
    model, examples = llama(positions="l1", layers=[1]), rows([(40, 2), (38, 3)])
    with taking(described(model), Shortcuts(on=True), COLLATOR) as step:
        batch = step.collate(examples)
        assert states_kept(model, lambda: model(**batch).loss) == 2 * 41
    for way in ("heads", "reuse, heads"):
        with taking(described(model), ways(model, tmp_path)[way], COLLATOR) as step:
            for _ in range(2):
                given = step.before(step.collate(examples))
                assert states_kept(model, partial(_loss_of, model, given)) == 2 * 3
                step.after()


def _loss_of(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return model(**batch).loss


def rows_given(model: PeftModel, shortcuts: Shortcuts, examples: list[Any]) -> dict[str, set[int]]:
    """Return how many rows of hidden states each projection and MLP of the layers is given."""
    seen: dict[str, set[int]] = {}
    handles = []
    for number, layer in enumerate(described(model).layers):
        for name, module in layer.named_modules():
            if name in ("mlp.up_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj"):
                key = f"{number}.{name.rpartition('.')[2]}"

                def note(_: Any, weights: Any, key: str = key) -> None:
                    seen.setdefault(key, set()).add(weights[0].shape[:-1].numel())

                handles.append((module, note))
    replaced = [partial(_noting_rows, module.forward, note) for module, note in handles]
    lookup = {id(module): run for (module, _), run in zip(handles, replaced, strict=True)}
    with forward_replaced([module for module, _ in handles], lambda m: lookup[id(m)]):
        taken(model, shortcuts, examples, times=1)
    return seen


def _noting_rows(forward: Any, note: Any, x: Tensor) -> Tensor:
    note(None, (x,))
    return forward(x)


def test_padding_and_what_nothing_reads_are_not_computed(tmp_path) -> None:
    model = llama(positions="f1+l1", layers="all")
    inputs = sum(p + c - 1 for p, c in SHAPES)  # the last token predicts nothing
    labels = sum(c for _, c in SHAPES)
    columns = len(SHAPES) * (max(map(sum, SHAPES)) - 1)
    every = {f"{n}.{m}" for n in range(3) for m in ("up_proj", "q_proj", "k_proj", "o_proj")}
    read = {"2.up_proj", "2.q_proj", "2.o_proj"}
    expected = {
        "labels only": {key: {columns} for key in every},
        "padding": {key: {inputs} for key in every},
        "packed": {key: {inputs} for key in every},
        "unread": {key: {labels if key in read else columns} for key in every},
        "packed, unread": {key: {labels if key in read else inputs} for key in every},
        "everything": {key: {labels if key in read else inputs} for key in every},
    }
    for way, wanted in expected.items():
        assert rows_given(model, ways(model, tmp_path)[way], ROWS) == wanted, way


# --- compiled -----------------------------------------------------------------------------------


# Dynamo itself instantiates a Function to trace one, and looks at the gradient of what is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*Function.> should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("unread", [False, True])
def test_layers_are_compiled_once_for_all_batches(unread, monkeypatch) -> None:
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    model = llama()
    chosen = Shortcuts(on=True, compile=True, unread=unread, frozen=frozen(model, None))
    counts = []
    with nothing_left(model), taking(described(model), chosen, COLLATOR) as step:
        for seed, size in enumerate((5, 4, 5, 3, 2)):
            examples = [{**one, "index": i} for i, one in enumerate(rows(SHAPES[:size], seed))]
            assert_same(stepped(model, step, examples), oracle(model_of("llama"), examples))
            counts.append(len(graphs))
    assert counts[1] > 0
    assert counts[1] == counts[-1], counts
    torch._dynamo.reset()
