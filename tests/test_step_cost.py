"""What a forward with an adapter does besides the model's own work: counted, not timed."""

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from adapted_tiny import batch, reft, strong
from reftune import METHODS, Intervention, ReftConfig, mixed, reft_layers
from reftune.layer import ReftLayer
from tiny import tiny_llama

# PEFT 0.21 asks a model for a property that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

LAYERS = 2
IDS = torch.randint(3, 259, (2, 9), generator=torch.Generator().manual_seed(0))
GREEDY = {"do_sample": False, "min_new_tokens": 6, "max_new_tokens": 6}
STATIC = {"cache_implementation": "static", "disable_compile": True}


def config(**settings: Any) -> ReftConfig:
    return ReftConfig(**({"positions": "f2+l2", "task_type": "CAUSAL_LM"} | settings))


def adapted(*configs: ReftConfig) -> PeftModel:
    """Return a model with the adapters a0, a1, ..., far from the identity; a0 is active."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), configs[0], adapter_name="a0")
    for number, one in enumerate(configs[1:], 1):
        model.add_adapter(f"a{number}", one)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "reft_phi" in name and name.endswith((".W", ".bias", ".scale")):
                parameter.copy_(torch.randn(parameter.shape))
    return model.eval()


def counting(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """Let a function note its first argument each time it is called."""
    calls: list[Any] = []
    real = vars(owner)[name]
    function = real.fget if isinstance(real, property) else real

    def noting(first: Any, *args: Any) -> Any:
        calls.append(first)
        return function(first, *args)

    monkeypatch.setattr(owner, name, property(noting) if isinstance(real, property) else noting)
    return calls


@pytest.mark.parametrize(
    "settings",
    [{}, STATIC, {"adapter_names": ["a0", "a1"]}, {"prefill_chunk_size": 4}, {"num_beams": 2}],
    ids=str,
)
def test_at_decode_no_layer_is_asked(settings, monkeypatch):
    model = adapted(config(), config(r=4))
    layers = counting(monkeypatch, ReftLayer, "forward")
    checks = counting(monkeypatch, Intervention, "needs_retraction")
    model.generate(IDS, **GREEDY, **settings)
    prefills = 3 if "prefill_chunk_size" in settings else 1
    assert len(layers) == LAYERS * prefills
    assert len(checks) == LAYERS * prefills * len(settings.get("adapter_names", ["a0"]))


@pytest.mark.parametrize("order", [["never", "always"], ["always", "never"]])
def test_an_adapter_that_edits_generated_tokens_does_so_beside_others(order):
    configs = {"never": config(), "always": config(edit_generated=True)}
    both, alone = adapted(*(configs[name] for name in order)), adapted(configs["always"])
    name = f"a{order.index('always')}"
    both.set_adapter(name)
    values = {key.replace(f".{name}.", ".a0."): t for key, t in both.state_dict().items()}
    alone.load_state_dict({key: values[key] for key in alone.state_dict()})
    expected = alone.generate(IDS, **GREEDY)
    assert torch.equal(both.generate(IDS, **GREEDY), expected)
    only_prompt = adapted(configs["never"])
    only_prompt.load_state_dict(alone.state_dict())
    assert not torch.equal(only_prompt.generate(IDS, **GREEDY), expected)


def test_adapters_are_grouped_once_for_all_layers(monkeypatch):
    model = adapted(config(), config(r=4), config(layers=[1]))
    calls = counting(monkeypatch, mixed, "_group")
    ids = torch.cat([IDS, IDS])
    model(ids, adapter_names=["a0", "a1", "__base__", "a1"])
    assert len(calls) == 1
    model(ids, adapter_names=["a2", "a1", "__base__", "a1"])
    assert len(calls) == 1 + 2  # the layers do not have the same adapters


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not func.is_view and func is not torch.ops.aten._unsafe_view.default:
            self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def operations(model: nn.Module) -> Counter[str]:
    with Operations() as counted:
        model(input_ids=IDS, labels=IDS.masked_fill(torch.arange(9) < 5, -100)).loss.backward()
    return counted.count


@pytest.mark.parametrize(("tied", "most"), [("all", 31), ("sides", 58)])
def test_an_edit_is_few_operations_forward_and_backward(tied, most):
    """On an accelerator each is a kernel. The second layer's: the first finds the rows.

    Nothing sorts the rows (index_put), and no group's gradient is spread over zeros
    (select_backward).
    """
    both = operations(adapted(config(tied=tied)).train())
    edit = both - operations(adapted(config(tied=tied, layers=[0])).train())
    assert 10 < edit.total() <= most, edit
    assert not {"index_put", "_index_put_impl_", "select_backward"} & set(edit), edit


# --- packed rows whose ends are known -----------------------------------------------------------

LENGTHS = [5, 2, 9, 1]


def packed(ends: bool) -> dict[str, Any]:
    flat = torch.randint(3, 259, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    labels = [torch.arange(n).ge(n - n // 3) for n in LENGTHS]
    batch: dict[str, Any] = {
        "input_ids": flat,
        "labels": torch.where(torch.cat(labels)[None], flat, -100),
        "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None],
        "use_cache": False,
    }
    if ends:
        batch["cu_seq_lens_q"] = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    return batch


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def each_alone(model: nn.Module, batch: dict[str, Any]) -> list[dict[str, Tensor]]:
    split = {name: batch[name].split(LENGTHS, dim=1) for name in ("input_ids", "labels")}
    return [dict(zip(split, one, strict=True)) for one in zip(*split.values(), strict=True)]


EVERY = [  # all but what a configuration or a packed batch refuses
    (method, positions, tied)
    for method, cls in METHODS.items()
    for positions in ("f2+l2", "l3", "all")
    for tied in ("all", "sides", "none")
    if positions != "all" or not (cls.pools_tokens or tied == "none")
    if tied != "none" or not cls.pools_tokens
]


@pytest.mark.parametrize(("method", "positions", "tied"), EVERY)
def test_packed_sequences_with_known_ends_are_each_alone(method, positions, tied):
    model = adapted(config(method=method, positions=positions, tied=tied))
    batch = packed(ends=True)
    together = model(**batch).logits
    alone = torch.cat([model(**one).logits for one in each_alone(model, batch)], dim=1)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    weights = torch.randn(together.shape, generator=torch.Generator().manual_seed(2))
    expected = gradients(model, (alone * weights).sum())
    for name, got in gradients(model, (together * weights).sum()).items():
        torch.testing.assert_close(got, expected[name], atol=1e-2, rtol=1e-3, msg=name)


def largest(run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> int:
    """Return how many rows an intervention was given at most."""
    sizes: list[int] = []
    real = METHODS["loreft"].__mro__[1].forward

    def noting(self: Any, h: Tensor, *args: Any) -> Tensor:
        sizes.append(h.shape[:-1].numel())
        out: Tensor = real(self, h, *args)
        return out

    monkeypatch.setattr(METHODS["loreft"].__mro__[1], "forward", noting)
    run()
    monkeypatch.undo()
    return max(sizes)


def test_of_packed_sequences_with_known_ends_only_their_rows_are_computed(monkeypatch):
    model = adapted(config(positions="f1+l1"))
    assert largest(lambda: model(**packed(ends=True)), monkeypatch) == 2 * len(LENGTHS)
    assert largest(lambda: model(**packed(ends=False)), monkeypatch) == sum(LENGTHS)


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"prompt_lengths": torch.tensor([4, 3])},
        {"subspaces": [["a"], ["b"]]},
        {"adapter_names": ["other", "default"]},
    ],
    ids=lambda told: next(iter(told), "labels"),
)
def test_no_number_is_copied_to_the_device(
    told: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy waits for the device: what a forward counts is made there (see `test_gpu.py`)."""
    model = reft(subspaces={"a": [0, 2], "b": [1, 3]})
    model.add_adapter("other", config(r=4, positions="all"))
    strong(model).eval()
    for layer in reft_layers(model).values():
        layer.strength["other"] = 0.5
    expected = model(**batch(), **told).loss

    def made_here(name: str) -> Any:
        make = getattr(torch, name)

        def checked(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
            own = sys._getframe(1).f_globals["__name__"].startswith("reftune.")
            assert device is None or not own, f"torch.{name}(..., device=...) copies and waits"
            return make(*args, device=device, **kwargs)

        return checked

    for name in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, made_here(name))
    assert torch.equal(model(**batch(), **told).loss, expected)
