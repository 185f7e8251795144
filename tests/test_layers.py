"""Which modules are edited: layers that cannot be told, options that name them, heads, towers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import PretrainedConfig, SwinConfig, SwinModel

from architectures import ARCHITECTURES, DEPTH, LENGTH
from reftune import (
    AdapterMismatchError,
    LayersNotFoundError,
    ReftConfig,
    ReftConfigError,
    options,
    reft_layers,
)
from reftune.layers import find_targets

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")

LLAMA, BERT = ARCHITECTURES["llama"], ARCHITECTURES["bert"]
LENGTHS = (11, 7, 4)


def adapt(model: nn.Module, **settings: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(model, ReftConfig(**{"r": 4, "positions": "f1+l2", **settings})).eval()


def edit_all(h: Tensor, phi: Any) -> Tensor:
    """Return h + R^T (W h + b - R h) for every row of h."""
    R, W, bias = phi.R[0], phi.W[0], phi.bias[0]
    return h + (h @ W.T + bias - h @ R.T) @ R


def right_padded() -> dict[str, Tensor]:
    inputs = LLAMA.inputs(batch=3)
    keep = torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None]
    return {"input_ids": inputs["input_ids"] * keep, "attention_mask": keep.long()}


class Output(NamedTuple):
    states: Tensor
    rest: str


class TwoLists(nn.Module):
    """A model with two lists of layers and nothing that says which is meant."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.right = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.left, *self.right):
            x = layer(x)
        return x


def test_layers_that_cannot_be_told_are_listed_with_the_option() -> None:
    with pytest.raises(LayersNotFoundError) as error:
        adapt(TwoLists())
    for words in ("TwoLists", "'left' (2 modules)", "'right' (3 modules)", "layers_path"):
        assert words in str(error.value)


def test_a_model_without_a_list_says_how_to_name_modules() -> None:
    with pytest.raises(LayersNotFoundError, match=r"none\. .*target_modules"):
        adapt(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))


def test_layers_path_names_the_list() -> None:
    model = adapt(TwoLists(), layers_path="right", layers=[0, 2])
    assert [n.removeprefix("base_model.model.") for n in reft_layers(model)] == [
        "right.0.reft",
        "right.2.reft",
    ]
    x = torch.randn(2, 5, 8)
    with options(strength=0.0):
        base = model(x)
    assert (model(x) - base).abs().amax(-1).gt(1e-3).tolist() == [
        [True, False, False, True, True]
    ] * 2


@pytest.mark.parametrize("path", ["middle", "right.0", ""])
def test_a_layers_path_that_is_no_list_is_refused_with_the_lists(path: str) -> None:
    if path == "":
        path = "left.0.weight"
    with pytest.raises(LayersNotFoundError, match=r"\['left', 'right'\]"):
        adapt(TwoLists(), layers_path=path)


@pytest.mark.parametrize("layers", ["1;3", [9], [-1]])
def test_layer_numbers_that_do_not_exist_are_refused(layers: str | list[int]) -> None:
    with pytest.raises(LayersNotFoundError, match=f"layers 0 to {DEPTH - 1} .* counted from 0"):
        adapt(LLAMA.make(), layers=layers)


@pytest.mark.parametrize("target", [["mlp"], r".*\.mlp"])
def test_target_modules_edits_the_output_of_these_modules(target: list[str] | str) -> None:
    model, base, inputs = (
        adapt(LLAMA.make(), target_modules=target, positions="all"),
        LLAMA.make(),
        LLAMA.inputs(),
    )
    layers = reft_layers(model)
    assert len(layers) == DEPTH
    for i in range(DEPTH):
        phi = layers[f"base_model.model.model.layers.{i}.mlp.reft"].phi("default")
        base.model.layers[i].mlp.register_forward_hook(
            lambda m, a, out, phi=phi: edit_all(out, phi)
        )
    torch.testing.assert_close(model(**inputs).logits, base(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_target_modules_that_match_nothing_are_refused() -> None:
    with pytest.raises(LayersNotFoundError, match="matches no module of LlamaForCausalLM"):
        adapt(LLAMA.make(), target_modules=["ffn"])


def test_a_plain_stack_of_linear_layers() -> None:
    torch.manual_seed(0)
    stack = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(5, 8)
    model = adapt(stack, target_modules=["0", "2"], positions="l1")
    phis = [layer.phi("default") for layer in reft_layers(model).values()]
    assert [phi.shape.hidden_size for phi in phis] == [16, 4]
    h = torch.relu(edit_all(nn.functional.linear(x, stack[0].weight, stack[0].bias), phis[0]))
    expected = edit_all(nn.functional.linear(h, stack[2].weight, stack[2].bias), phis[1])
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def test_a_layer_may_return_a_named_tuple() -> None:
    class Layer(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return Output(super().forward(x), "rest")

    torch.manual_seed(0)
    layer, x = Layer(8, 8), torch.randn(2, 5, 8)
    out = adapt(nn.ModuleDict({"layer": layer}), target_modules=["layer"], positions="all")
    got = out.base_model.model["layer"](x)
    phi = next(iter(reft_layers(out).values())).phi("default")
    assert type(got) is Output
    assert got.rest == "rest"
    torch.testing.assert_close(
        got.states, edit_all(nn.functional.linear(x, layer.weight, layer.bias), phi)
    )


def test_stages_of_different_widths_are_refused_in_words() -> None:
    config = SwinConfig(
        image_size=16,
        patch_size=2,
        embed_dim=8,
        depths=[1, 1, 1],
        num_heads=[1, 2, 4],
        window_size=2,
    )
    images = {"pixel_values": torch.randn(2, 3, 16, 16)}
    with pytest.raises(ReftConfigError, match=r"expected \(batch, tokens, \d+\).*hidden_size"):
        adapt(SwinModel(config))(**images)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_the_decoder_of_an_encoder_decoder_holds_no_prompt(name: str) -> None:
    arch = ARCHITECTURES[name]
    path = arch.layers.replace("encoder", "decoder")
    with pytest.raises(ReftConfigError, match=r"tokens are generated.*edit_generated=True"):
        adapt(arch.make(), layers_path=path)
    with pytest.raises(ReftConfigError, match=r"tokens are generated.*edit_generated=True"):
        adapt(arch.make(), target_modules=[path.rpartition(".")[2] + ".0"])


HEADS = {
    ("bert", "BertForSequenceClassification"): TaskType.SEQ_CLS,
    ("bert", "BertForTokenClassification"): TaskType.TOKEN_CLS,
    ("bert", "BertForQuestionAnswering"): TaskType.QUESTION_ANS,
    ("bert", "BertModel"): TaskType.FEATURE_EXTRACTION,
    ("roberta", "RobertaForSequenceClassification"): TaskType.SEQ_CLS,
    ("llama", "LlamaForSequenceClassification"): TaskType.SEQ_CLS,
    ("llama", "LlamaForTokenClassification"): TaskType.TOKEN_CLS,
    ("llama", "LlamaForQuestionAnswering"): TaskType.QUESTION_ANS,
    ("llama", "LlamaModel"): TaskType.FEATURE_EXTRACTION,
    ("t5", "T5ForSequenceClassification"): TaskType.SEQ_CLS,
}
every_head = pytest.mark.parametrize(
    ("name", "head", "task"),
    [(*key, task) for key, task in HEADS.items()],
    ids=[k[1] for k in HEADS],
)


def first_output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out = model(**inputs)
    names = ("logits", "start_logits", "last_hidden_state")
    return next(out[name] for name in names if name in out)


def head_inputs(name: str) -> dict[str, Tensor]:
    inputs = right_padded()
    if name == "t5":  # its classifier reads the state at the last </s>
        inputs["input_ids"][:, 3] = 2
    return inputs


@every_head
def test_heads_are_edited_and_saved(name: str, head: str, task: TaskType, tmp_path: Path) -> None:
    arch, inputs = ARCHITECTURES[name], head_inputs(name)
    settings, saved = {}, None
    if name == "t5":  # PEFT knows heads named `classifier` and `score`
        settings, saved = {"eos_token_id": 2}, ["classification_head"]
    model = adapt(arch.make(model=head, **settings), task_type=task, modules_to_save=saved)
    got = first_output(model, inputs)
    with options(strength=0.0):
        assert (first_output(model, inputs) - got).abs().max() > 1e-3
    trained = [n for n, p in model.named_parameters() if p.requires_grad and ".reft." not in n]
    has_head = task in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS, TaskType.QUESTION_ANS)
    assert bool(trained) == has_head  # the head is new: PEFT trains and saves it in full
    for p in (p for n, p in model.named_parameters() if n in trained):
        nn.init.normal_(p)
    expected = first_output(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(arch.make(model=head, **settings), tmp_path).eval()
    torch.testing.assert_close(first_output(loaded, inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_labels_of_tokens_do_not_move_the_prompt(name: str) -> None:
    head = {"bert": "BertForTokenClassification", "llama": "LlamaForTokenClassification"}[name]
    inputs = right_padded()
    labels = torch.ones(3, LENGTH, dtype=torch.long)
    labels[:, :3] = -100
    model = adapt(ARCHITECTURES[name].make(model=head), task_type=TaskType.TOKEN_CLS)
    got = first_output(model, {**inputs, "labels": labels})
    assert torch.equal(got, first_output(model, inputs))
    # while those of a causal language model do
    model = adapt(LLAMA.make(), task_type=TaskType.CAUSAL_LM)
    got = first_output(model, {**inputs, "labels": labels})
    assert not torch.allclose(got, first_output(model, inputs), atol=1e-3)


def test_choices_are_edited_as_if_each_were_alone() -> None:
    model = adapt(BERT.make(model="BertForMultipleChoice"))
    flat = right_padded()
    together = first_output(model, {k: v[None] for k, v in flat.items()})[0]
    for i, n in enumerate(LENGTHS):
        alone = first_output(model, {k: v[None, i : i + 1, :n] for k, v in flat.items()})
        torch.testing.assert_close(together[i], alone[0, 0], atol=1e-5, rtol=1e-5)


def test_an_adapter_does_not_load_where_layers_have_other_names(tmp_path: Path) -> None:
    adapt(LLAMA.make()).save_pretrained(tmp_path)
    with pytest.raises(AdapterMismatchError, match=r"missing tensors layers\.0"):
        PeftModel.from_pretrained(LLAMA.make(model="LlamaModel"), tmp_path)


@pytest.mark.parametrize("tied", ["all", "sides"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_decoder_is_edited_at_every_token_if_asked(name: str, tied: str) -> None:
    arch = ARCHITECTURES[name]
    path = arch.layers.replace("encoder", "decoder")
    settings = {"layers_path": path, "edit_generated": True, "tied": tied}
    model, base, inputs = adapt(arch.make(), **settings), arch.make(), right_padded()
    given = {"max_new_tokens": 14, "do_sample": False}
    cached, uncached = (model.generate(**inputs, **given, use_cache=c) for c in (True, False))
    assert torch.equal(cached, uncached)
    phis = [layer.phi("default") for layer in reft_layers(model).values()]
    for i, phi in enumerate(phis):
        base.get_submodule(f"{path}.{i}").register_forward_hook(
            lambda m, a, out, phi=phi: _edit_output(out, phi)
        )
    full = {**inputs, "decoder_input_ids": cached}
    expected = base(**full).logits
    torch.testing.assert_close(model(**full).logits, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(expected[:, :-1].argmax(-1), cached[:, 1:])


def _edit_output(out: Any, phi: Any) -> Any:
    """Apply the Phi of the suffix, the last one, to every row."""
    h = out[0] if isinstance(out, tuple) else out
    R, W, bias = phi.R[-1], phi.W[-1], phi.bias[-1]
    h = h + (h @ W.T + bias - h @ R.T) @ R
    return (h, *out[1:]) if isinstance(out, tuple) else h


# --- several residual streams ---------------------------------------------------------------------

STREAMS, WIDTH = 3, 8


class StreamsConfig(PretrainedConfig):
    def __init__(self, **settings: Any) -> None:
        super().__init__(num_hidden_layers=2, hidden_size=WIDTH, **settings)


class Streams(nn.Module):
    """A model whose layers pass on three residual streams, counted by `axis` of their states."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.config = StreamsConfig(**{{0: "altup_num_inputs", 2: "hc_mult"}[axis]: STREAMS})
        self.axis = axis
        self.layers = nn.ModuleList([nn.Sequential(nn.Identity()) for _ in range(2)])

    def forward(self, input_ids: Tensor) -> Tensor:
        h = torch.stack([torch.sin(input_ids[..., None] * (k + 1.0)) for k in range(STREAMS)], 2)
        h = (h * torch.arange(1.0, WIDTH + 1)).movedim(2, self.axis)
        for layer in self.layers:
            h = layer(h)
        return h.movedim(self.axis, 2)


@pytest.mark.parametrize("axis", [0, 2])
def test_of_several_residual_streams_the_state_is_all_of_them(axis: int) -> None:
    """As many streams as examples and tokens: only what the config says tells the axes apart."""
    ids = torch.arange(9).view(3, 3)
    model = adapt(Streams(axis), positions="l1", layers=[1])
    phi = reft_layers(model)["base_model.model.layers.1.reft"].phi("default")
    assert phi.R.shape[-1] == STREAMS * WIDTH
    with torch.no_grad():
        expected, got = Streams(axis)(ids), model(input_ids=ids)
        assert torch.equal(got[:, :2], expected[:, :2])
        edited = edit_all(expected[:, 2].flatten(1), phi).view(3, STREAMS, WIDTH)
        torch.testing.assert_close(got[:, 2], edited)
        assert (got[:, 2] - expected[:, 2]).abs().max() > 0.1


class SameDepth(nn.Module):
    """A model that sees and reads, whose towers have as many layers, and a list of projections."""

    def __init__(self) -> None:
        super().__init__()
        self.config = StreamsConfig()
        self.image = nn.Module()
        self.image.config = StreamsConfig()
        self.image.layers = nn.ModuleList([nn.Sequential(nn.Identity()) for _ in range(2)])
        self.text = nn.ModuleList([nn.Sequential(nn.Identity()) for _ in range(2)])
        self.projections = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])


def test_of_lists_of_one_length_the_one_of_layers_that_read_text_is_meant() -> None:
    assert list(find_targets(SameDepth(), ReftConfig())) == ["text.0", "text.1"]


class TokensFirst(nn.Module):
    """A model whose layers' states are (tokens, batch, width), as XLNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.config = StreamsConfig()
        self.layers = nn.ModuleList([nn.Sequential(nn.Identity()) for _ in range(2)])

    def forward(self, input_ids: Tensor) -> Tensor:
        h = torch.sin(input_ids[..., None] * torch.arange(1.0, WIDTH + 1)).transpose(0, 1)
        for layer in self.layers:
            h = layer(h)
        return h


def test_states_with_their_tokens_first_are_refused() -> None:
    with pytest.raises(ReftConfigError, match="tokens, batch, width"):
        adapt(TokensFirst())(input_ids=torch.arange(8).view(2, 4))


class ListOfLists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleList([nn.Linear(8, 8)]) for _ in range(2)])


def test_lists_of_lists_are_refused() -> None:
    with pytest.raises(LayersNotFoundError, match="'blocks.0' of ListOfLists is a list"):
        find_targets(ListOfLists(), ReftConfig())
