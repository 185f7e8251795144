"""What was found by trying to break it."""

import copy
import logging
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    GenerationConfig,
    LongformerConfig,
    LongformerForSequenceClassification,
)

import reftune
from adapted_tiny import config, logits, phis, reft, strong, trainable
from reftune import AdapterMismatchError, ReftConfig, ReftConfigError
from reftune.generate import Sampling, stream
from reftune.settings import parse_config
from tiny import tiny_llama, tiny_tokenizer

IDS = torch.tensor([[10, 11, 12, 13, 14, 15]])
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def batch() -> dict[str, torch.Tensor]:
    labels = IDS.clone()
    labels[:, :4] = -100
    return {"input_ids": IDS, "labels": labels}


def test_training_without_labels_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    model = reft().train()
    with caplog.at_level(logging.WARNING, logger="reftune"):
        model(**batch())
        assert caplog.messages == []
        for _ in range(2):
            model(input_ids=IDS)
    assert len(caplog.messages) == 1
    assert "prompt_mask" in caplog.messages[0]


class Flat(nn.Module):
    """A module of a model that works on (B*S, d), as mixtures of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        flat: torch.Tensor = self.inner(h.reshape(-1, 32))
        return flat.view_as(h)


def test_modules_on_flattened_tokens_are_edited_at_their_positions() -> None:
    base = tiny_llama()
    base.model.layers[0].mlp = Flat()
    settings = ReftConfig(
        r=2, positions="f1", target_modules=["mlp.inner"], hidden_size=32, task_type="CAUSAL_LM"
    )
    model = strong(get_peft_model(base, settings)).eval()
    states = []
    inner = model.get_submodule("base_model.model.model.layers.0.mlp.inner")
    inner.register_forward_hook(lambda _m, _a, out: states.append(out.detach()))
    ids = torch.cat([IDS, IDS + 1])
    model(input_ids=ids)
    with model.disable_adapter():
        model(input_ids=ids)
    changed = (states[0] != states[1]).any(-1).view(2, 6)
    assert changed.tolist() == [[True] + [False] * 5] * 2


@pytest.mark.parametrize("lengths", [None, [13, 7]])
def test_a_model_that_pads_by_itself_is_edited_at_the_end_of_its_tokens(
    lengths: list[int] | None,
) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    about = LongformerConfig(
        vocab_size=64, num_hidden_layers=2, attention_window=8, pad_token_id=0, **sizes
    )
    base = LongformerForSequenceClassification(about).eval()
    settings = ReftConfig(r=2, positions="l2", layers=[0], task_type="SEQ_CLS")
    model = strong(get_peft_model(base, settings)).eval()
    states: list[torch.Tensor] = []
    layer = next(iter(reftune.reft_layers(model)))
    model.get_submodule(layer).register_forward_hook(lambda _m, _a, out: states.append(out))
    inner = model.get_submodule(layer.rpartition(".")[0])
    ids = torch.randint(3, 64, (2, 13), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids}
    if lengths is not None:
        given["attention_mask"] = (torch.arange(13) < torch.tensor(lengths)[:, None]).long()
    with torch.no_grad():
        model(**given)
        edited = states.pop()
        with model.disable_adapter():
            hook = inner.register_forward_hook(
                lambda _m, _a, out: states.append(out[0] if isinstance(out, tuple) else out)
            )
            model(**given)
            hook.remove()
    edited = edited[0] if isinstance(edited, tuple) else edited
    assert edited.shape[1] == 16, "two windows"
    changed = (edited != states[-1]).any(-1).nonzero().tolist()
    ends = lengths or [13, 13]
    assert changed == [[b, n - k] for b, n in enumerate(ends) for k in (2, 1)]


def test_a_stream_has_the_options_of_where_it_was_asked_for() -> None:
    model, tokenizer, ids = reft(), tiny_tokenizer(), IDS[0].tolist()
    sampling = Sampling(max_new_tokens=8)
    with model.disable_adapter():
        base = "".join(stream(model, tokenizer, ids, sampling))
    with reftune.options(strength=0.0):
        pieces = stream(model, tokenizer, ids, sampling)
    assert "".join(pieces) == base
    assert "".join(stream(model, tokenizer, ids, sampling)) != base


def test_a_step_of_no_length_does_not_move_r_wherever_r_came_from() -> None:
    model = reft().train()
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.0)
    model(**batch()).loss.backward()
    phi = phis(model)[0]
    other = torch.linalg.qr(torch.randn(32, phi.shape.rank)).Q.T[None]
    with torch.no_grad():
        phi.raw_R().copy_(other)
    optimizer.step()
    torch.testing.assert_close(phi.raw_R().detach(), other, atol=1e-6, rtol=0)


def test_the_first_step_of_an_unfrozen_adapter_is_as_long_as_any() -> None:
    moved = []
    for frozen in (True, False):
        model = reft().train()
        phi = phis(model)[0]
        before = phi.raw_R().detach().clone()
        for p in trainable(model).values():
            p.requires_grad_(not frozen)
        model.set_requires_grad("default", True)
        optimizer = torch.optim.SGD([phi.raw_R()], lr=1e-3)
        model(**batch()).loss.backward()
        optimizer.step()
        moved.append((phi.raw_R() - before).norm())
    torch.testing.assert_close(moved[0], moved[1])
    assert moved[0] > 0


def test_a_copied_model_is_orthonormal_after_its_steps() -> None:
    model = copy.deepcopy(reft().train())
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    for _ in range(3):
        model(**batch()).loss.backward()
        optimizer.step()
        for phi in phis(model):
            R = phi.raw_R().detach()
            torch.testing.assert_close(R @ R.mT, torch.eye(R.shape[-2])[None], atol=1e-5, rtol=0)


def test_another_optimizers_step_between_two_forwards_is_harmless() -> None:
    model, other = reft().train(), nn.Parameter(torch.ones(2))
    stranger = torch.optim.SGD([other], lr=0.1)
    first = model(**batch()).loss
    other.grad = torch.ones(2)
    stranger.step()
    (first + model(**batch()).loss).backward()
    assert all(p.grad is not None for p in trainable(model).values())


@pytest.mark.parametrize("name", ["..", ".", "-x"])
def test_a_run_is_never_named_like_another_directory(name: str) -> None:
    with pytest.raises(ReftConfigError, match="name is"):
        parse_config({"name": name, "data": {"train": "demo"}}, "here")


def test_generate_takes_its_config_by_position() -> None:
    model = reft()
    settings = GenerationConfig(max_new_tokens=4, do_sample=False)
    inner = model.get_base_model()
    assert torch.equal(
        inner.generate(IDS, settings), inner.generate(IDS, generation_config=settings)
    )


def test_decode_steps_of_a_static_cache_edit_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, lengths = reft(), []
    for phi in phis(model):
        phi.register_forward_hook(lambda _m, args, _o: lengths.append(args[0].shape))
    expected = model.generate(IDS, max_new_tokens=6, do_sample=False)
    calls = len(lengths)
    static = model.generate(
        IDS, max_new_tokens=6, do_sample=False, cache_implementation="static", disable_compile=True
    )
    assert torch.equal(static, expected)
    assert len(lengths) == 2 * calls == 2 * len(phis(model))


def broken(tmp_path: Path, change: str) -> Path:
    reft().save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if k.endswith(".R"))
    if change == "missing file":
        path.unlink()
        return tmp_path
    tensors[key] = torch.zeros_like(tensors[key])
    if change == "integers":
        tensors[key] = tensors[key].int()
    save_file(tensors, path)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("missing file", "no adapter_model.safetensors"),
        ("zero R", "rows that are zero"),
        ("integers", "dtype torch.int32"),
    ],
)
def test_an_unsound_checkpoint_is_refused_and_nothing_changes(
    tmp_path: Path, change: str, says: str
) -> None:
    path = broken(tmp_path, change)
    base = tiny_llama()
    names, before = list(base.state_dict()), logits(base)
    with pytest.raises(AdapterMismatchError, match=says):
        PeftModel.from_pretrained(base, str(path))
    assert list(base.state_dict()) == names
    assert torch.equal(logits(base), before)
    model = get_peft_model(base, config())
    with pytest.raises(AdapterMismatchError, match=says):
        model.load_adapter(str(path), "other")
    assert list(model.peft_config) == ["default"]
