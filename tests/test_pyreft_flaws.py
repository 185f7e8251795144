"""The flaws of pyreft, one test each; docs/pyreft-flaws.md has the list.

Those of training are in test_pyreft_flaws_training.py.
"""

import copy
import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LlamaForCausalLM,
)

import reftune
from adapted_tiny import (
    assert_orthonormal,
    batch,
    config,
    edited_columns,
    logits,
    optimise,
    phis,
    prompts,
    reft,
    strong,
    trainable,
)
from reftune import METHODS, orthonormal, spans
from tiny import tiny_llama

# PEFT asks for it by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

ORTHONORMAL = [name for name, method in METHODS.items() if method.orthonormal]
every_method = pytest.mark.parametrize("method", METHODS)


class Renamed(LlamaForCausalLM):
    """A class that no table of architectures knows."""


@pytest.mark.parametrize("method", ORTHONORMAL)
def test_flaw_01_weight_decay_does_not_erase_the_rotation(method: str) -> None:
    model = reft(method)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-3, weight_decay=0.5)
    for _ in range(3):
        optimise(model, optimizer, 1)
        assert_orthonormal(model)
    with torch.no_grad(), model.disable_adapter():
        base = model(**batch()).logits
    assert (logits(model) - base).abs().max() > 0.1


@pytest.mark.parametrize("method", ORTHONORMAL)
def test_flaw_03_training_goes_on_after_a_load(method: str, tmp_path: Path) -> None:
    """With SGD, which has no state, 5 steps + a load + 5 steps are 10 steps."""
    whole, first = reft(method), reft(method)
    optimise(whole, torch.optim.SGD(trainable(whole).values(), lr=0.02), 10)
    optimise(first, torch.optim.SGD(trainable(first).values(), lr=0.02), 5)
    first.save_pretrained(tmp_path)
    second = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    optimise(second, torch.optim.SGD(trainable(second).values(), lr=0.02), 5)
    assert_orthonormal(second)
    torch.testing.assert_close(logits(second), logits(whole), rtol=0, atol=1e-4)


@pytest.mark.parametrize("edit_generated", [False, True])
def test_flaw_04_generate_leaves_nothing_behind(edit_generated: bool) -> None:
    model = reft(edit_generated=edit_generated)
    before = logits(model)
    for settings in ({}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}):
        model.generate(**prompts(), max_new_tokens=3, **settings)
        model.generate(torch.tensor([[1, 5]]), max_new_tokens=2)
        assert torch.equal(logits(model), before)
        assert spans.current_span().owner is None, "what one call is about ends with it"


def test_flaw_05_dropout_ends_with_eval_and_spares_the_state() -> None:
    """In training an element of the edit is dropped, or scaled up; h itself is neither."""
    model = reft("lobireft", dropout=0.5, layers=[0])
    layer = model.get_base_model().model.layers[0]
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda *args: seen.append(args[2].detach()))
    with torch.no_grad(), model.disable_adapter():
        model(**batch())
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))
    base, edited, *_, dropped = seen
    edit, kept = edited - base, (dropped - base).abs() > 1e-6
    torch.testing.assert_close(dropped - base, torch.where(kept, 2 * edit, 0), atol=1e-5, rtol=0)
    assert kept.any()
    model.eval()
    assert torch.equal(logits(model), logits(model))


@pytest.mark.parametrize(
    "settings",
    [
        {"act_fn": "relu", "tied": "none"},
        {"dropout": 0.25, "dropout_on": "output", "short_prompts": "pyreft"},
        {"dtype": "float64", "init": "noop"},
        {"edit_generated": True, "tied": "sides", "layers": [1]},
    ],
)
def test_flaw_06_a_load_gives_back_the_function(settings: dict[str, Any], tmp_path: Path) -> None:
    model = reft(**settings)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    saved_config = loaded.peft_config["default"]
    assert {name: getattr(saved_config, name) for name in settings} == settings
    dtype = getattr(torch, settings.get("dtype", "float32"))
    assert {p.dtype for phi in phis(loaded) for p in phi.parameters()} == {dtype}
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("tied", ["all", "sides", "none"])
@pytest.mark.parametrize("layers", [[0], [0, 1]])
def test_flaw_07_positions_are_the_prompts_in_training_and_generation(
    layers: list[int], tied: str
) -> None:
    """The last prompt token is the last, an answer token is never edited, whatever the layers."""
    expected = {"l1": ([4], [2]), "f3+l3": ([0, 1, 2, 3, 4], [0, 1, 2]), "f1": ([0], [0])}
    for positions, columns in expected.items():
        model = reft(positions=positions, layers=layers, tied=tied)
        assert edited_columns(model, batch()) == list(columns)
        left = [columns[0], [2 + column for column in columns[1]]]
        assert edited_columns(model, prompts()) == left
        model.generate(torch.tensor([[1, 5]]), max_new_tokens=2)


def test_flaw_09_each_layer_edits_its_own_state() -> None:
    """Two layers with the same numbers are the formula applied twice, and listed once each."""
    model = reft(positions="all", task_type=None)
    first, second = phis(model)
    second.load_state_dict(first.state_dict())
    assert len(list(first.parameters())) + len(list(second.parameters())) == len(trainable(model))
    R, W, b = (first.get_parameter(name).detach()[0] for name in ("R", "W", "bias"))
    plain = tiny_llama()
    for layer in plain.model.layers:
        layer.register_forward_hook(lambda _m, _a, h: h + (h @ W.T + b - h @ R.T) @ R)
    ids = batch()["input_ids"]
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=1e-4, rtol=1e-4)


def test_flaw_10_hooks_of_others_stay() -> None:
    model = reft()
    model.enable_input_require_grads()
    calls: list[int] = []
    layer = model.get_base_model().model.layers[1]
    layer.register_forward_hook(lambda *_: calls.append(1))

    def count() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    hooks = 0
    for n in (1, 2, 3):
        states = model(**batch(), output_hidden_states=True).hidden_states
        hooks = hooks or count()  # transformers adds its own in the first such call
        assert len(states) == 3
        assert states[0].requires_grad
        assert len(calls) == n
    model.generate(**prompts(), max_new_tokens=2)
    assert count() == hooks, "none added, none taken away by a call"


@pytest.mark.parametrize("edit_generated", [False, True])
def test_flaw_11_beams_and_sequences_have_rows_of_their_own(edit_generated: bool) -> None:
    model = reft(edit_generated=edit_generated)
    settings = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4, "pad_token_id": 0}
    together = model.generate(**prompts(), **settings)[:, 5:]
    rows = [torch.tensor([[1, 10, 11, 12, 13]]), torch.tensor([[1, 20, 21]])]
    alone = [model.generate(row, **settings)[:, row.shape[1] :] for row in rows]
    assert torch.equal(together, torch.cat(alone))
    repeated = {name: t.repeat_interleave(2, 0) for name, t in prompts().items()}
    sampling = {"do_sample": True, "max_new_tokens": 4, "pad_token_id": 0}
    torch.manual_seed(0)
    two = model.generate(**prompts(), **sampling, num_return_sequences=2)
    torch.manual_seed(0)
    assert torch.equal(two, model.generate(**repeated, **sampling))
    assert not torch.equal(two[0], two[1])


@every_method
def test_flaw_13_every_method_loads_and_15_states_its_rank_once(
    method: str, tmp_path: Path
) -> None:
    model = reft(method)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    saved = loaded.peft_config["default"].to_dict()
    assert [name for name in saved if name == "r" or "rank" in name] == ["r"]


def test_flaw_14_a_model_in_no_table_loads(tmp_path: Path) -> None:
    def renamed() -> Renamed:
        model = Renamed(tiny_llama().config)
        model.load_state_dict(tiny_llama().state_dict())
        return model.eval()

    model = strong(get_peft_model(renamed(), config()))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(renamed(), tmp_path)), logits(model))


def test_flaw_19_every_module_imports_and_a_model_prints() -> None:
    assert "loreft, hidden_size=32, rank=4" in str(reft())
    for module in pkgutil.walk_packages(reftune.__path__, "reftune."):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:  # an extra that is not installed
            if str(error.name).startswith("reftune"):
                raise


def test_flaw_20_the_base_is_neither_moved_nor_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_llama().to(torch.bfloat16)
    before = {name: (p.data_ptr(), p.dtype) for name, p in base.named_parameters()}
    monkeypatch.setattr(base, "to", lambda *_a, **_k: pytest.fail("the base was moved"))
    get_peft_model(base, config())
    after = dict(base.named_parameters())
    assert all((after[name].data_ptr(), after[name].dtype) == old for name, old in before.items())


def test_flaw_23_inference_orthonormalises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = reft()
    logits(model)
    monkeypatch.setattr(orthonormal, "orthonormalise", lambda _: pytest.fail("R was recomputed"))
    logits(model)
    copy.deepcopy(model)
    model.generate(**prompts(), max_new_tokens=3)


class Syncs(TorchDispatchMode):
    """Count the operations that a device would have to be waited for."""

    names = ("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in self.names
        if func is torch.ops.aten.index.Tensor:
            self.count += any(t is not None and t.dtype == torch.bool for t in args[1])
        return func(*args, **(kwargs or {}))


def run_forward(model: nn.Module) -> None:
    model(**batch())


def run_backward(model: nn.Module) -> None:
    embedded = model.get_input_embeddings()(batch()["input_ids"]).detach().requires_grad_()
    labels = {name: t for name, t in batch().items() if name != "input_ids"}
    model(inputs_embeds=embedded, **labels).loss.backward()


def run_generate(model: nn.Module) -> None:
    model.generate(**prompts(), max_new_tokens=3, min_new_tokens=3)


@pytest.mark.parametrize("run", [run_forward, run_backward, run_generate])
@pytest.mark.parametrize("positions", ["f1+l2", "all"])
@every_method
def test_flaw_24_an_edit_waits_for_no_device(
    method: str, positions: str, run: Callable[[nn.Module], None]
) -> None:
    """Not once more than the base model does (transformers' generate asks whether it is done)."""
    counts = []
    for model in (tiny_llama(), reft(method, positions=positions)):
        run(model)
        with Syncs() as syncs:
            run(model)
        counts.append(syncs.count)
    assert counts[1] == counts[0]


def test_flaw_24_rows_are_found_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = spans.slots_to_rows
    monkeypatch.setattr(spans, "slots_to_rows", lambda *a: calls.append(1) or real(*a))
    logits(reft())
    assert len(calls) == 1


@every_method
def test_flaw_25_a_decode_step_calls_no_intervention(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    real = METHODS[method].forward
    monkeypatch.setattr(METHODS[method], "forward", lambda *a: calls.append(1) or real(*a))
    model = reft(method)
    model.generate(**prompts(), max_new_tokens=6, min_new_tokens=6)
    assert len(calls) == len(phis(model)) == 2
