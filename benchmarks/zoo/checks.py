"""What it means that ReFT works with a model: properties, each told without ReFT.

Every check answers "yes", "base: ..." where the base model itself does not have the property, or
"no: ...".
"""

from __future__ import annotations

import contextlib
import copy
import functools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from reftune import ReftConfig, options, reft_layers
from reftune.layers import find_targets
from zoo.shrink import quiet, tiny_config, tiny_model

LENGTH, PROMPT, NEW_TOKENS = 12, 9, 4
PREFIX, SUFFIX = 2, 3
FIRST_ID, LAST_ID, EOS = 8, 99, 2
CLOSE = {"atol": 5e-4, "rtol": 1e-3}
TEXT = ("input_ids", "attention_mask")
OUTPUTS = ("logits", "last_hidden_state", "prediction_logits", "start_logits")


@dataclass(frozen=True)
class Subject:
    """A class of transformers, tiny.

    Attributes:
        kind: of the model: "causal", "seq-cls", "seq2seq", "image" or "image-text".
        layers_path: for a class whose layers have to be named.
    """

    kind: str
    model_type: str
    model_class: str
    layers_path: str | None = None

    @property
    def generates(self) -> bool:
        """Return whether the model continues its prompt, token by token."""
        return self.kind in ("causal", "image-text") or (
            # Models that hear are among transformers' encoder-decoders, and most are decoders.
            self.kind == "seq2seq" and not _model(self).config.is_encoder_decoder
        )

    @property
    def is_seq2seq(self) -> bool:
        """Return whether an encoder reads the prompt."""
        return self.kind == "seq2seq" and not self.generates

    def config(self) -> Any:
        """Return the tiny configuration."""
        config = tiny_config(self.model_type, self.model_class)
        if self.kind == "causal" and not config.is_encoder_decoder:
            for flag in ("is_decoder", "causal"):  # BERT's family and XLM attend to both sides
                if flag in vars(config):
                    setattr(config, flag, True)
        if self.kind == "seq-cls" and config.is_encoder_decoder:
            config.eos_token_id = EOS  # where BART's classifiers read
        if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
            config.decoder_start_token_id = 2
        return config

    def base(self) -> Any:
        """Return the base model, the same one each time."""
        return copy.deepcopy(_model(self))

    def adapted(self, **settings: Any) -> PeftModel:
        """Return the base with a random ReFT, the same one each time."""
        given = {"r": 4, "positions": f"f{PREFIX}+l{SUFFIX}", "layers_path": self.layers_path}
        torch.manual_seed(1)
        model = get_peft_model(self.base(), ReftConfig(**{**given, **settings})).eval()
        return model

    def inputs(self, batch: int = 2) -> dict[str, Tensor]:
        """Return random inputs: prompts of LENGTH tokens, or images."""
        g = torch.Generator().manual_seed(0)
        if self.kind == "image":
            return {"pixel_values": torch.randn(batch, *_image_shape(self.config()), generator=g)}
        ids = torch.randint(FIRST_ID, LAST_ID, (batch, LENGTH), generator=g)
        ids[:, PROMPT - 1] = EOS if self.kind == "seq-cls" else ids[:, PROMPT - 1]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.is_seq2seq:
            inputs["decoder_input_ids"] = torch.randint(FIRST_ID, LAST_ID, (batch, 4), generator=g)
        return inputs


@functools.lru_cache(maxsize=1)
def _model(s: Subject) -> Any:
    return tiny_model(s.model_class, s.config())


def _image_shape(config: Any) -> tuple[int, int, int]:
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", None) or 32
    height, width = (size, size) if isinstance(size, int) else size
    return getattr(config, "num_channels", 3), height, width


def output_of(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Return the first of a model's outputs that is what it computes."""
    with torch.no_grad():
        out = model(**inputs)
    return next(out[k] for k in OUTPUTS if k in out)


@contextlib.contextmanager
def edited_by_a_loop(base: nn.Module, adapted: nn.Module, prompts: Tensor | None) -> Iterator[None]:
    """Edit the base model's layers row by row, with the formula and the adapter's numbers."""

    def hook(phi: Any, output: Any) -> Any:
        given = output[0] if isinstance(output, tuple | list) else output
        h = given.clone()
        if h.dim() == 4:  # several residual streams
            h = h.movedim(axis, 2).flatten(2)
        rows = h if h.dim() == 3 else h.view(-1, LENGTH, h.shape[-1])
        for b in range(rows.shape[0]):
            attended = range(rows.shape[1])
            if prompts is not None:
                attended = prompts[b].nonzero().flatten().tolist()
            for row in [*attended[:PREFIX], *attended[-SUFFIX:]]:
                x = rows[b, row].clone()
                rows[b, row] = x + phi.R[0].T @ (phi.W[0] @ x + phi.bias[0] - phi.R[0] @ x)
        if given.dim() == 4:
            h = h.unflatten(-1, (-1, given.shape[-1])).movedim(2, axis)
        if isinstance(output, tuple | list):
            return getattr(type(output), "_make", type(output))([h, *output[1:]])
        return h

    axis = 0 if hasattr(base.config, "altup_num_inputs") else 2
    handles = []
    for name, layer in reft_layers(adapted).items():
        module = base.get_submodule(name.removeprefix("base_model.model.").removesuffix(".reft"))
        phi = layer.phi("default")
        handles.append(module.register_forward_hook(lambda m, a, o, p=phi: hook(p, o)))
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


# --- the checks -----------------------------------------------------------------------------------


def layers(s: Subject) -> str:
    """Every layer that the configuration counts is edited."""
    base = s.base()
    found = find_targets(base, ReftConfig(layers_path=s.layers_path))
    stated = stated_depths(s)
    if len(found) in stated:
        return "yes"
    calls: list[str] = []
    for name in found:
        base.get_submodule(name).register_forward_hook(lambda *_, n=name: calls.append(n))
    output_of(base, s.inputs())
    if len(calls) in stated:
        return "yes (shared: the same at each pass)"
    return f"no: {len(found)} layers, the config says {', '.join(map(str, stated)) or 'nothing'}"


def noop(s: Subject) -> str:
    """A ReFT that starts as the identity computes what the base computes."""
    inputs = s.inputs()
    return _same(output_of(s.adapted(init="noop"), inputs), output_of(s.base(), inputs))


def formula(s: Subject) -> str:
    """The edits are the formula on the prompt's tokens, written as a loop."""
    inputs, model, base = s.inputs(), s.adapted(), s.base()
    with edited_by_a_loop(base, model, None):
        expected = output_of(base, inputs)
    return _same(output_of(model, inputs), expected)


def every_layer(s: Subject) -> str:
    """The edit of each layer alone changes the output."""
    inputs, model = s.inputs(), s.adapted()
    base = output_of(s.base(), inputs)
    edited = reft_layers(model)
    silent = []
    for name, chosen in edited.items():
        for layer in edited.values():
            layer.strength["default"] = float(layer is chosen)
        if not (output_of(model, inputs) - base).abs().max() > 1e-6:
            silent.append(name.split(".")[-2])
    return f"no: nothing reads the edit of layer {', '.join(silent)}" if silent else "yes"


def causal(s: Subject) -> str:
    """Outputs change from the first edited token on, and not before it."""
    inputs, base = s.inputs(), s.base()
    first = PROMPT - SUFFIX
    expected, other = output_of(base, inputs), dict(inputs)
    other["input_ids"] = inputs["input_ids"].clone()
    other["input_ids"][:, first] = inputs["input_ids"][:, first] - 7
    if not torch.allclose(output_of(base, other)[:, :first], expected[:, :first], **CLOSE):
        return "base: attends to later tokens"
    with options(prompt_lengths=torch.tensor([PROMPT] * 2)):
        got = output_of(s.adapted(positions=f"l{SUFFIX}"), inputs)
    changed = (got - expected).abs().flatten(2).amax(-1) > 1e-6
    if changed[:, :first].any():
        return "no: an output before the first edited token changed"
    return "yes" if changed[:, first:PROMPT].all() else "no: an edited token's output did not"


def generate(s: Subject) -> str:
    """Generated logits, with a cache and without, are those of one edited forward of the whole."""
    base = s.base()
    agrees, positions = {}, False
    for positions in (False, True):
        for use_cache in (True, False):
            sequences, logits = _generated(s, base, use_cache)
            whole = output_of(base, _continued(s, sequences, positions))[:, -logits.shape[1] :]
            agrees[use_cache] = _same(logits, whole) == "yes"
        if any(agrees.values()):
            break
    if not any(agrees.values()):
        return "base: its generation is not its forward"
    model, reference = s.adapted(), s.base()
    for use_cache in (c for c in agrees if agrees[c]):
        sequences, logits = _generated(s, model, use_cache)
        inputs = _continued(s, sequences, positions)
        with edited_by_a_loop(reference, model, _prompt_rows(s, inputs)):
            expected = output_of(reference, inputs)[:, -logits.shape[1] :]
        if (found := _same(logits, expected)) != "yes":
            return found if use_cache else f"{found} (without a cache)"
    return "yes" if all(agrees.values()) else "yes (the base differs with a cache)"


def padding(s: Subject) -> str:
    """A prompt in a padded batch computes what it computes alone."""
    for side in ("left", "right"):
        if _is_as_alone(s, s.base(), side) is None:
            wrong = _is_as_alone(s, s.adapted(), side)
            return wrong or ("yes" if side == "left" else "yes (right)")
    return "base: padding changes its outputs"


def gradients(s: Subject) -> str:
    """A loss gives every tensor of the adapter a gradient."""
    model = s.adapted()
    loss = _loss(s, model)
    if not loss.requires_grad:
        return "no: the loss is not differentiable by what is between the layers"
    loss.backward()
    wrong = [
        name.replace("base_model.model.", "").replace(".reft.reft_phi.default", "")
        for name, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not 0 < float(p.grad.norm()) < float("inf"))
    ]
    if wrong:
        return f"no: {len(wrong)} without, as {wrong[0]}"
    return "yes" if not s.generates or _loss_is_shifted(s, s.inputs()) else "yes (labels shifted)"


def saved(s: Subject) -> str:
    """Saved and loaded into a fresh base it computes the same."""
    model, inputs = s.adapted(), s.inputs()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(s.base(), folder).eval()
        return _same(output_of(loaded, inputs), output_of(model, inputs))


CHECKS: dict[str, Callable[[Subject], str]] = {
    f.__name__: f
    for f in (layers, noop, formula, every_layer, causal, generate, padding, gradients, saved)
}
OF_KIND: dict[str, tuple[str, ...]] = {
    "causal": tuple(CHECKS),
    "image-text": tuple(CHECKS),
    "seq2seq": tuple(c for c in CHECKS if c != "causal"),
    "seq-cls": tuple(c for c in CHECKS if c not in ("causal", "generate")),
    "image": tuple(c for c in CHECKS if c not in ("causal", "generate", "padding")),
}


def checks_of(s: Subject) -> tuple[str, ...]:
    """Return which checks are made of a class."""
    return OF_KIND["image-text" if s.generates else s.kind]


# --- their parts ----------------------------------------------------------------------------------


def stated_depths(s: Subject) -> list[int]:
    """Return how many layers the configuration says the tower that reads the prompt has."""
    config = s.config()
    if s.kind == "image" and (depths := getattr(config, "depths", None)):
        return [sum(depths)]
    if config.is_encoder_decoder:
        config = getattr(config, "encoder", config)  # of those that have one for each side
        names = ("encoder_layers", "num_encoder_layers")
        found = [n for k in names if isinstance(n := getattr(config, k, None), int)]
        if found:
            return found
    if s.kind == "image":
        config = getattr(config, "vision_config", config)
    else:
        config = config.get_text_config()
    names = ("num_hidden_layers", "decoder_layers", "num_layers", "num_layers_per_stack")
    return sorted({n for k in names if isinstance(n := getattr(config, k, None), int)})


def _same(got: Tensor, expected: Tensor) -> str:
    if not bool(expected.isfinite().all()):
        return "base: its outputs are not finite"
    if got.shape != expected.shape:
        return f"no: shapes {tuple(got.shape)} and {tuple(expected.shape)}"
    size = max(1.0, float(expected.abs().max()))  # rounding is relative to what is added up
    if torch.allclose(got / size, expected / size, **CLOSE):
        return "yes"
    return f"no: differs by {float((got - expected).abs().max()):.2g}"


def _prompts(s: Subject) -> dict[str, Tensor]:
    inputs = s.inputs()
    inputs.pop("decoder_input_ids", None)
    if s.is_seq2seq:
        return inputs
    return {k: v[:, :PROMPT] if k in TEXT else v for k, v in inputs.items()}


def _generated(s: Subject, model: Any, use_cache: bool) -> tuple[Tensor, Tensor]:
    model.generation_config.forced_eos_token_id = None
    with quiet():
        out = model.generate(
            **_prompts(s),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            num_beams=1,
            use_cache=use_cache,
            # A padding token among the new ones would count as padding where ids tell it.
            suppress_tokens=list(range(FIRST_ID)),
            return_dict_in_generate=True,
            output_logits=True,
        )
    return out.sequences, torch.stack(out.logits, dim=1)


def _continued(s: Subject, sequences: Tensor, positions: bool) -> dict[str, Tensor]:
    """Return inputs that hold the prompts and all generated tokens but the last.

    `positions`: counted from 0, as `generate` counts them; some models by themselves do not.
    """
    if s.is_seq2seq:
        return {**_prompts(s), "decoder_input_ids": sequences[:, :-1]}
    ids = sequences[:, :-1]
    inputs = {**_prompts(s), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if positions:
        inputs["position_ids"] = torch.arange(ids.shape[1]).expand(ids.shape)
    return inputs


def _prompt_rows(s: Subject, inputs: dict[str, Tensor]) -> Tensor | None:
    if s.is_seq2seq:
        return None
    rows = torch.zeros_like(inputs["input_ids"])
    rows[:, :PROMPT] = 1
    return rows


def _is_as_alone(s: Subject, model: nn.Module, side: str) -> str | None:
    """Return None where a padded prompt computes what it computes alone, or what is wrong."""
    inputs, n = s.inputs(), PROMPT
    missing = LENGTH - n
    pad = (missing, 0) if side == "left" else (0, missing)
    alone = {k: v[1:, :n] if k in TEXT else v[1:] for k, v in inputs.items()}
    batch = dict(inputs)
    for key in TEXT:
        padded = nn.functional.pad(inputs[key][1, :n], pad)
        batch[key] = torch.stack([inputs[key][0], padded])
    takes = signature(getattr(model, "get_base_model", lambda: model)().forward).parameters
    if s.generates and side == "left" and "position_ids" in takes:
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    got, expected = output_of(model, batch)[1], output_of(model, alone)[0]
    if s.generates:
        got = got[missing:] if side == "left" else got[:n]
    wrong = _same(got, expected)
    return None if wrong == "yes" else wrong


def _loss_is_shifted(s: Subject, inputs: dict[str, Tensor]) -> bool:
    """Return whether the base predicts each label from the token before it."""
    labels = inputs["input_ids"].clone()
    labels[:, :PROMPT] = -100
    with torch.no_grad():
        out = s.base()(**inputs, labels=labels)
    loss = nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
    return not torch.allclose(out.loss, loss, **CLOSE)


def _loss(s: Subject, model: nn.Module) -> Tensor:
    inputs = s.inputs()
    if s.generates:
        labels = inputs["input_ids"].clone()
        labels[:, :PROMPT] = -100
        if not _loss_is_shifted(s, inputs):
            # Decoders cut off encoder-decoders want the next token as the label of each.
            labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
            with options(prompt_lengths=torch.tensor([PROMPT] * 2)):
                unshifted: Tensor = model(**inputs, labels=labels).loss
            return unshifted
    elif s.is_seq2seq:
        labels = inputs.pop("decoder_input_ids")
    else:
        labels = torch.tensor([0, 1])
    loss: Tensor = model(**inputs, labels=labels).loss
    return loss
