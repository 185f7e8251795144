"""Every architecture of the matrix: layers found by structure, and edits that mean the formula."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from architectures import ARCHITECTURES, LENGTH, Architecture
from reftune import ReftConfig, options, reft_layers
from reftune.layers import find_targets

# Newer releases of transformers rename these; PEFT, and older releases, know the old names.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is:FutureWarning"),
]

PREFIX, SUFFIX = 2, 3
NEW_TOKENS = 5
WIDTHS = ("out_features", "nf")  # of torch's and of GPT-2's linear layers
EVERY = sorted(ARCHITECTURES)
TEXT = [name for name in EVERY if ARCHITECTURES[name].reads_text]
GENERATING = [name for name in TEXT if ARCHITECTURES[name].kind != "encoder"]

every_architecture = pytest.mark.parametrize("name", EVERY)
text_architecture = pytest.mark.parametrize("name", TEXT)
generating_architecture = pytest.mark.parametrize("name", GENERATING)
padding_side = pytest.mark.parametrize("side", ["right", "left"])


def adapt(arch: Architecture, **settings: Any) -> PeftModel:
    config = ReftConfig(r=4, positions=f"f{PREFIX}+l{SUFFIX}", **{"tied": "sides", **settings})
    torch.manual_seed(1)
    return get_peft_model(arch.make(), config).eval()


def output_of(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        out = model(**inputs)
    return out.logits if "logits" in out else out.last_hidden_state


def padded(arch: Architecture, side: str, lengths: Sequence[int] = (11, 8, 7)) -> dict[str, Tensor]:
    """Return a batch whose prompts have `lengths` tokens of the eleven, the rest is padding."""
    inputs = arch.inputs(batch=len(lengths))
    if not arch.reads_text:
        return inputs
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if key in inputs:
            inputs[key] = torch.stack(
                [_pad(row[:n], side) for row, n in zip(inputs[key], lengths, strict=True)]
            )
    if side == "left" and arch.kind == "decoder" and arch.takes_position_ids:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return inputs


def _pad(row: Tensor, side: str) -> Tensor:
    missing = LENGTH - row.shape[0]
    return nn.functional.pad(row, (missing, 0) if side == "left" else (0, missing))


def prompt_rows(mask: Tensor) -> list[tuple[int, int]]:
    """Return the (row, group) that are edited of one prompt, by the paper's words."""
    tokens = [i for i, attended in enumerate(mask.tolist()) if attended]
    p, s, n = PREFIX, SUFFIX, len(tokens)
    if n < p + s:
        p, s = min(p, n // 2), min(s, (n + 1) // 2)
    return [(i, 0) for i in tokens[:p]] + [(i, 1) for i in tokens[n - s :]]


@contextmanager
def naive_hooks(
    base: nn.Module, arch: Architecture, adapted: nn.Module, masks: Tensor | None
) -> Iterator[list[Tensor]]:
    """Edit the base model with a loop over examples and rows; yields the states of each layer.

    `masks` are the prompts' (None: every token).
    """
    states: list[Tensor] = [torch.empty(0)] * arch.depth

    def hook(i: int, phi: Any, output: Any) -> Any:
        h = (output[0] if isinstance(output, tuple) else output).clone()
        every = torch.ones(h.shape[:2]) if masks is None else masks
        for b in range(h.shape[0]):
            for row, group in prompt_rows(every[b]):
                R, W, bias = phi.R[group], phi.W[group], phi.bias[group]
                x = h[b, row].clone()
                h[b, row] = x + R.T @ (W @ x + bias - R @ x)
        states[i] = h
        return (h, *output[1:]) if isinstance(output, tuple) else h

    layers = reft_layers(adapted)
    handles = []
    for i in range(arch.depth):
        phi = layers[f"base_model.model.{arch.layers}.{i}.reft"].phi("default")
        module = base.get_submodule(f"{arch.layers}.{i}")
        handles.append(module.register_forward_hook(lambda m, a, o, i=i, p=phi: hook(i, p, o)))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def loss_of(arch: Architecture, model: nn.Module) -> Tensor:
    """Return a loss: of a completion of four tokens, or a sum over an encoder's outputs."""
    inputs = arch.inputs()
    if arch.generates:
        labels = inputs["input_ids"].clone()
        labels[:, :7] = -100
        return model(**inputs, labels=labels).loss
    if arch.kind == "seq2seq":
        labels = inputs.pop("decoder_input_ids")
        return model(**inputs, labels=labels).loss
    return model(**inputs).last_hidden_state.square()[..., ::2].sum()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None for g in found.values())
    return {n: g.clone() for n, g in found.items() if g is not None}


@every_architecture
def test_layers_are_found_by_structure(name: str) -> None:
    arch = ARCHITECTURES[name]
    found = find_targets(arch.make(), ReftConfig())
    assert found == {f"{arch.layers}.{i}": 32 for i in range(arch.depth)}


@every_architecture
def test_every_layer_changes_the_output_and_strength_0_is_the_base(name: str) -> None:
    arch = ARCHITECTURES[name]
    inputs, model = arch.inputs(), adapt(arch)
    base = output_of(arch.make().requires_grad_(False), inputs)
    layers = list(reft_layers(model).values())
    for chosen in layers:
        for layer in layers:
            layer.strength["default"] = float(layer is chosen)
        assert (output_of(model, inputs) - base).abs().max() > 1e-2
        with options(strength=0.0):
            assert torch.equal(output_of(model, inputs), base)


@padding_side
@every_architecture
def test_edit_is_the_formula_on_the_prompt_rows(name: str, side: str) -> None:
    arch = ARCHITECTURES[name]
    inputs, model, base = padded(arch, side), adapt(arch), arch.make()
    with naive_hooks(base, arch, model, inputs.get("attention_mask")):
        expected = output_of(base, inputs)
    torch.testing.assert_close(output_of(model, inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [n for n in TEXT if ARCHITECTURES[n].images is None])
def test_short_prompts_shrink_by_the_papers_rule(name: str) -> None:
    arch = ARCHITECTURES[name]
    inputs, model, base = padded(arch, "right", (4, 3, 2)), adapt(arch), arch.make()
    with naive_hooks(base, arch, model, inputs["attention_mask"]):
        expected = output_of(base, inputs)
    torch.testing.assert_close(output_of(model, inputs), expected, atol=1e-5, rtol=1e-5)


@every_architecture
def test_gradient_reaches_every_tensor(name: str) -> None:
    arch = ARCHITECTURES[name]
    model = adapt(arch)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loss_of(arch, model).backward()
    optimizer.step()
    optimizer.zero_grad()
    loss_of(arch, model).backward()
    found = gradients(model)
    assert len(found) == 3 * arch.depth
    for key, grad in found.items():
        sizes = grad.flatten(1).norm(dim=-1)
        assert sizes.isfinite().all()
        if arch.generates and f".{arch.depth - 1}.reft." in key:
            # What the last layer writes at the first tokens is read by no later layer, and the loss
            # is taken from the prompt's last token on.
            assert sizes[0] == 0
            sizes = sizes[1:]
        assert (sizes > 0).all(), key


@every_architecture
def test_saved_and_loaded_is_the_same(name: str, tmp_path: Path) -> None:
    arch = ARCHITECTURES[name]
    model, inputs = adapt(arch), arch.inputs()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(arch.make(), tmp_path).eval()
    torch.testing.assert_close(
        output_of(loaded, inputs), output_of(model, inputs), atol=1e-5, rtol=1e-5
    )
    # torch picks its matrix product by requires_grad: with it as it was, not a bit differs.
    loaded = PeftModel.from_pretrained(arch.make(), tmp_path, is_trainable=True).eval()
    assert torch.equal(output_of(loaded, inputs), output_of(model, inputs))


@padding_side
@text_architecture
def test_padding_does_not_matter_where_it_does_not_to_the_base(name: str, side: str) -> None:
    arch = ARCHITECTURES[name]
    lengths = (11, 8, 7)
    batch = padded(arch, side, lengths)

    def is_as_alone(model: nn.Module) -> bool:
        together = output_of(model, batch)
        for i, n in enumerate(lengths):
            alone = {k: v[i : i + 1] for k, v in padded(arch, "right", lengths).items()}
            if "image_grid_thw" in alone:  # its patches are of all examples, one after another
                alone["pixel_values"] = arch.inputs(batch=3)["pixel_values"].chunk(3)[i]
            text = {"input_ids", "attention_mask", "mm_token_type_ids"}
            alone = {k: v[:, :n] if k in text else v for k, v in alone.items()}
            expected = output_of(model, alone)[0]
            got = together[i]
            if arch.kind != "seq2seq":
                got = got[LENGTH - n :] if side == "left" else got[:n]
            if not torch.allclose(got, expected, atol=1e-4, rtol=1e-4):
                return False
        return True

    base_agrees = is_as_alone(arch.make())
    assert base_agrees == (side in arch.pads), "the matrix says something else of the base model"
    if base_agrees:
        assert is_as_alone(adapt(arch))


@generating_architecture
def test_generation_edits_the_prompt_alone_cached_or_not(name: str) -> None:
    arch = ARCHITECTURES[name]
    side = "left" if "left" in arch.pads else "right"
    lengths = (11, 8, 7) if "left" in arch.pads else (11, 11, 11)
    inputs = padded(arch, side, lengths)
    for key in ("decoder_input_ids", "position_ids"):
        inputs.pop(key, None)  # generate makes its own
    model, base = adapt(arch), arch.make()
    given = {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    cached, uncached = (model.generate(**inputs, **given, use_cache=c) for c in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    logits = torch.stack(cached.logits, dim=1)
    assert logits.shape[1] == NEW_TOKENS
    torch.testing.assert_close(logits, torch.stack(uncached.logits, dim=1), atol=1e-4, rtol=1e-4)
    # The same sequences through the base model at once, the rows of the prompt edited by a loop.
    full = _whole(arch, inputs, cached.sequences)
    with naive_hooks(base, arch, model, inputs["attention_mask"]):
        expected = output_of(base, full)[:, -NEW_TOKENS:]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def _whole(arch: Architecture, inputs: dict[str, Tensor], sequences: Tensor) -> dict[str, Tensor]:
    """Return inputs that hold the prompts and all generated tokens but the last."""
    if arch.kind == "seq2seq":
        return {**inputs, "decoder_input_ids": sequences[:, :-1]}
    full = {**inputs, "input_ids": sequences[:, :-1]}
    full["attention_mask"] = nn.functional.pad(
        inputs["attention_mask"], (0, NEW_TOKENS - 1), value=1
    )
    if "mm_token_type_ids" in full:
        full["mm_token_type_ids"] = nn.functional.pad(
            full["mm_token_type_ids"], (0, NEW_TOKENS - 1)
        )
    if arch.kind == "decoder" and arch.takes_position_ids:
        full["position_ids"] = (full["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return full


@every_architecture
def test_hidden_states_are_the_edited_ones(name: str) -> None:
    arch = ARCHITECTURES[name]
    inputs, model, base = arch.inputs(), adapt(arch), arch.make()
    with naive_hooks(base, arch, model, inputs.get("attention_mask")) as expected:
        output_of(base, inputs)
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
    states = out.encoder_hidden_states if arch.kind == "seq2seq" else out.hidden_states
    states = states[1:] if arch.embeddings_first else states
    for i in range(arch.depth - 1):  # what comes last has gone through the final norm
        torch.testing.assert_close(states[i], expected[i], atol=1e-5, rtol=1e-5)


@every_architecture
@pytest.mark.parametrize("inside", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(name: str, inside: bool) -> None:
    """Also where what is edited lies inside of what is recomputed."""
    arch = ARCHITECTURES[name]
    if not arch.make().supports_gradient_checkpointing:
        pytest.skip("transformers does not checkpoint this architecture")
    path = f"{arch.layers}.1"
    layer = arch.make().get_submodule(path)
    leaf = next(n for n, m in layer.named_modules() if not list(m.children()))
    wide = [n for n, m in layer.named_modules() if 32 in (getattr(m, a, 0) for a in WIDTHS)]
    settings = {"target_modules": [f"{path}.{wide[0]}"]} if inside else {}
    plain, model = adapt(arch, **settings).train(), adapt(arch, **settings).train()
    loss_of(arch, plain).backward()
    model.gradient_checkpointing_enable()
    calls: list[object] = []
    module = model.base_model.model.get_submodule(f"{path}.{leaf}")
    module.register_forward_pre_hook(lambda *_: calls.append(None))
    loss_of(arch, model).backward()
    assert len(calls) == 2, "the layer was not recomputed"
    for (key, expected), got in zip(
        gradients(plain).items(), gradients(model).values(), strict=True
    ):
        torch.testing.assert_close(
            got, expected, atol=1e-5, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}"
        )
