"""R stays orthonormal, cheaply, and learns as well as torch's parametrization."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from reftune import METHODS, ReftConfig, options, orthonormal, reft_layers
from reftune.interventions import Intervention, retract
from reftune.layer import ReftLayer
from tiny import tiny_llama

# PEFT 0.21 asks a model for a property that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

ORTHONORMAL = [name for name, cls in METHODS.items() if cls.orthonormal]
IDS = torch.arange(3, 27).view(2, 12)
LABELS = IDS.masked_fill(torch.arange(12) < 8, -100)

Make = Callable[[list[nn.Parameter]], Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0),
    "adamw, weight decay": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),  # the Trainer's default
    "adamw, one by one": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "sgd, large steps": lambda p: torch.optim.SGD(p, lr=2.0),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


def adapted(**settings: Any) -> PeftModel:
    torch.manual_seed(0)
    settings = {"r": 4, "task_type": "CAUSAL_LM", **settings}
    if settings.get("method") == "reft_r1":
        settings["r"] = 1
    return get_peft_model(tiny_llama(), ReftConfig(**settings))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def every_R(model: nn.Module) -> list[Tensor]:
    phis = [layer.phi("default") for layer in reft_layers(model).values()]
    return [rotation(phi) for phi in phis]


def rotation(phi: Intervention) -> Tensor:
    """Return R as the formula takes it, (G, r, d)."""
    return phi.tensors()["R"].detach()


def error_of(R: Tensor) -> float:
    return float((R @ R.mT - torch.eye(R.shape[-2])).abs().max())


def step(model: nn.Module, optimizer: Optimizer, forwards: int = 1) -> None:
    for _ in range(forwards):
        (model(input_ids=IDS, labels=LABELS).loss / forwards).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", ORTHONORMAL)
def test_orthonormal_in_each_forward(method: str, optimizer: str) -> None:
    model = adapted(method=method, tied="sides")
    steps = OPTIMIZERS[optimizer](trainable(model))
    before = [R.clone() for R in every_R(model)]
    for _ in range(5):
        step(model, steps)
        model(input_ids=IDS)
        assert max(error_of(R) for R in every_R(model)) < 1e-5
    moved = [(R - old).abs().max() for R, old in zip(every_R(model), before, strict=True)]
    assert max(moved) > 1e-3, "R learns"


def toy_layer(seed: int = 0, d: int = 24, r: int = 4, **settings: Any) -> ReftLayer:
    torch.manual_seed(seed)
    layer = ReftLayer(d)
    layer.add("default", ReftConfig(r=r, positions="all", **settings), None)
    return layer


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_orthonormal_after_a_thousand_steps(optimizer: str) -> None:
    layer = toy_layer()
    phi = layer.phi("default")
    steps = OPTIMIZERS[optimizer]([*layer.parameters()])
    h, target = torch.randn(2, 1, 8, 24, generator=torch.Generator().manual_seed(0))
    for _ in range(1000):
        retract([phi])
        (layer(h) - target).square().mean().backward()
        steps.step()
        steps.zero_grad()
    retract([phi])
    assert error_of(rotation(phi)) < 1e-5
    assert all(p.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5])
def test_ill_conditioned_rows_become_orthonormal(condition: float) -> None:
    """A step far too large leaves rows of very different lengths, nearly parallel."""
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(20, 8, 8, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(20, 64, 8, generator=generator))
    sizes = torch.logspace(0, -math.log10(condition), 8)
    R = orthonormal.orthonormalise(left * sizes @ right.mT)
    assert error_of(R) < 1e-5


def test_rounding_by_autocast_does_not_reach_R() -> None:
    R = torch.linalg.qr(torch.randn(3, 64, 8, generator=torch.Generator().manual_seed(0)))[0].mT
    moved = R + 0.01 * torch.randn(R.shape, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        found = orthonormal.orthonormalise(moved)
        assert orthonormal.is_orthonormal(found)
        assert not orthonormal.is_orthonormal(R + 1e-4)
    assert found.dtype == torch.float32
    assert error_of(found) < 1e-6


class Counter:
    """Count the calls of a function and note the shapes it was called with."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, A: Tensor) -> Tensor:
        self.shapes.append(tuple(A.shape))
        return self.function(A)


def test_computed_once_per_step_and_batched_over_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    counter = Counter(orthonormal.orthonormalise)
    monkeypatch.setattr(orthonormal, "orthonormalise", counter)
    steps = torch.optim.AdamW(trainable(model), lr=1e-2)
    model(input_ids=IDS)
    assert counter.shapes == [], "it starts orthonormal"
    for n in range(1, 4):
        step(model, steps, forwards=3)
        model(input_ids=IDS)
        assert counter.shapes == [(2, 1, 4, 32)] * n, "two layers in one call"


def test_checkpointed_and_interleaved_forwards_share_one_retraction() -> None:
    model = adapted().train()
    steps = torch.optim.AdamW(trainable(model), lr=1e-2)
    step(model, steps)
    first = model(input_ids=IDS, labels=LABELS).loss
    other = nn.Linear(2, 2)
    other(torch.ones(2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()  # of another model: no reason to retract
    second = model(input_ids=IDS, labels=LABELS).loss
    (first + second).backward()  # an R changed in between would be an error of autograd
    plain = [p.grad.clone() / 2 for p in trainable(model)]
    steps.zero_grad()
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
    model(input_ids=IDS, labels=LABELS).loss.backward()
    for p, grad in zip(trainable(model), plain, strict=True):
        torch.testing.assert_close(p.grad, grad)


class LargestTensor(TorchDispatchMode):
    """Note the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


@pytest.mark.parametrize("method", ORTHONORMAL)
def test_no_tensor_has_width_squared_elements(method: str, tmp_path: Path) -> None:
    d = 257
    config = ReftConfig(method=method, r=1 if METHODS[method].fixed_rank else 4, hidden_size=d)
    with LargestTensor() as largest:
        layer = ReftLayer(d)
        layer.add("default", config, None)
        optimizer = torch.optim.AdamW(layer.parameters())
        for _ in range(2):
            retract([layer.phi("default")])
            layer(torch.randn(2, 9, d)).sum().backward()
            optimizer.step()
        state = layer.state_dict()
    assert largest.numel < d * d / 4
    assert sum(t.numel() for t in state.values()) == sum(p.numel() for p in layer.parameters())
    assert not list(layer.buffers())


def test_saving_makes_and_stores_no_square(tmp_path: Path) -> None:
    d = 257 * 2
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=d,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        head_dim=8,
    )
    model = get_peft_model(LlamaForCausalLM(config), ReftConfig(r=4))
    with LargestTensor() as largest:
        model.save_pretrained(tmp_path)
    assert largest.numel < d * d / 4
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in stored.values()) == 2 * 4 * d + 4


@pytest.mark.parametrize("method", ORTHONORMAL)
def test_saved_right_after_a_step_and_trained_further(method: str, tmp_path: Path) -> None:
    model = adapted(method=method)
    step(model, torch.optim.SGD(trainable(model), lr=1.0))
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    rotations = {key: t for key, t in stored.items() if key.endswith(".R")}
    assert len(rotations) == 2
    assert max(error_of(R) for R in rotations.values()) < 1e-5

    again = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    for loaded, R in zip(every_R(again), rotations.values(), strict=True):
        torch.testing.assert_close(loaded, R)
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    steps = torch.optim.AdamW(trainable(again), lr=1e-2)
    for _ in range(3):
        step(again, steps)
    again(input_ids=IDS)
    assert max(error_of(R) for R in every_R(again)) < 1e-5


def test_what_is_written_through_data_is_saved_as_it_will_be_loaded(tmp_path: Path) -> None:
    model = adapted()
    step(model, torch.optim.AdamW(trainable(model), lr=1e-2))
    for layer in reft_layers(model).values():
        R = layer.phi("default").raw_R()
        R.data.add_(0.1 * torch.randn_like(R))  # a moving average's copy, for instance
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    rotations = [t for name, t in saved.items() if name.endswith(".R")]
    assert rotations
    for R in rotations:
        assert error_of(R) < 1e-5
    for R in every_R(model):
        assert error_of(R) < 1e-5


class Sharded(Optimizer):
    """As ZeroRedundancyOptimizer: steps what it owns, and is sent the rest."""

    def __init__(self, owned: list[nn.Parameter], sent: dict[nn.Parameter, Tensor]) -> None:
        super().__init__([*owned, *sent], {})
        self.optim, self.sent = torch.optim.SGD(owned, lr=0.1), sent

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optim.step()
        for parameter, value in self.sent.items():
            parameter.data.copy_(value)


def test_what_other_processes_stepped_is_not_moved_twice() -> None:
    owner, here = toy_layer(), toy_layer()
    there, R = owner.phi("default").raw_R(), here.phi("default").raw_R()
    there.grad = torch.randn(there.shape, generator=torch.Generator().manual_seed(1))
    torch.optim.SGD([there], lr=0.1).step()
    assert (there - R).abs().max() > 0.01
    others = [p for p in here.parameters() if p is not R]
    for parameter in others:
        parameter.grad = torch.zeros_like(parameter)
    Sharded(others, {R: there.detach().clone()}).step()
    torch.testing.assert_close(R.detach(), there.detach(), rtol=0, atol=1e-6)


def test_loaded_rotation_that_is_not_orthonormal_is_made_so() -> None:
    layer = toy_layer()
    state = layer.state_dict()
    key = next(key for key in state if key.endswith("R"))
    layer.load_state_dict({**state, key: 3.0 * state[key]})
    phi = layer.phi("default")
    assert retract([phi]) == 0, "it was made so at once"
    torch.testing.assert_close(rotation(phi), state[key])
    assert retract([phi]) == 0


def test_weight_decay_shrinks_W_and_leaves_R() -> None:
    results = {}
    for decay in (0.0, 0.1):
        layer = toy_layer()
        phi = layer.phi("default")
        steps = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=decay)
        for p in layer.parameters():
            p.grad = torch.zeros_like(p)
        for _ in range(100):
            steps.step()
            retract([phi])
        results[decay] = {k: p.detach().clone() for k, p in phi.named_parameters()}
    torch.testing.assert_close(results[0.1]["R"], results[0.0]["R"], atol=1e-4, rtol=0.0)
    for name in ("W", "bias"):
        expected = results[0.0][name] * (1 - 0.1 * 0.1) ** 100
        torch.testing.assert_close(results[0.1][name], expected)


def polar(A: Tensor) -> Tensor:
    """Return the orthonormal rows that are nearest to those of A: (A A^T)^(-1/2) A."""
    values, vectors = torch.linalg.eigh(A @ A.mT)
    return vectors @ torch.diag(values.rsqrt()) @ vectors.mT @ A


def edit_through(phi: Intervention, R: Tensor, h: Tensor, weights: Tensor) -> Tensor:
    tensors = {**dict(phi.named_parameters()), "R": R}
    valid = torch.ones(h.shape[:-1], dtype=torch.bool)
    one = {name: t[0] for name, t in tensors.items()}
    return (phi(h, one, valid) * weights).sum()


@pytest.mark.parametrize("method", ORTHONORMAL)
def test_gradient_of_R_is_that_of_a_polar_retraction(method: str) -> None:
    torch.manual_seed(0)
    config = ReftConfig(method=method, r=1 if METHODS[method].fixed_rank else 3, dtype="float64")
    phi = config.build(7)
    stored = phi.get_parameter("R")
    with torch.no_grad():  # orthonormal in float64, with rows of the length that it is stored with
        stored.copy_(polar(stored[0])[None] * round(stored.norm(dim=-1).mean().item(), 3))
    h, weights = torch.randn(2, 2, 5, 7, dtype=torch.float64)
    edit_through(phi, phi.tensors()["R"], h, weights).backward()
    R, gradient = stored.detach()[0], stored.grad[0]

    tangent = gradient @ R.mT
    torch.testing.assert_close(tangent, -tangent.mT)

    A = R.clone().requires_grad_()
    edit_through(phi, polar(A)[None], h, weights).backward()
    if len(R) == 1:  # eigh of a 1 x 1 matrix, whose gradient is exact
        torch.testing.assert_close(gradient, A.grad)
    differences, eps = torch.zeros_like(R), 1e-6
    for i in range(R.shape[0]):
        for j in range(R.shape[1]):
            moved = torch.zeros_like(R)
            moved[i, j] = eps
            up, down = (
                edit_through(phi, polar(R + sign * moved)[None], h, weights) for sign in (1, -1)
            )
            differences[i, j] = (up - down).detach() / (2 * eps)
    torch.testing.assert_close(gradient, differences, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("tied", ["all", "sides", "none"])
@pytest.mark.parametrize("method", METHODS)
def test_gradcheck(method: str, tied: str) -> None:
    if tied == "none" and METHODS[method].pools_tokens:
        tied = "all"
    torch.manual_seed(0)
    config = ReftConfig(method=method, positions="f2+l1", tied=tied, dtype="float64")
    layer = ReftLayer(9)
    layer.add("default", config, None)
    phi = layer.phi("default")
    free = [name for name, _ in phi.named_parameters() if name != "R" or not phi.orthonormal]
    h = torch.randn(2, 6, 9, dtype=torch.float64, requires_grad=True)
    values = [phi.get_parameter(name).detach().clone().requires_grad_() for name in free]
    parameters = {f"reft_phi.default.{name}": v for name, v in zip(free, values, strict=True)}

    def forward(h: Tensor, *values: Tensor) -> Tensor:
        given = dict(zip(parameters, values, strict=True))
        with options(prompt_lengths=torch.tensor([5, 2])):
            out: Tensor = torch.func.functional_call(layer, given, (h,))
        return out

    assert torch.autograd.gradcheck(forward, (h, *parameters.values()))


def test_deep_copies_are_independent() -> None:
    model = adapted()
    step(model, torch.optim.AdamW(trainable(model), lr=1e-2))
    copied = copy.deepcopy(model)
    expected = model(input_ids=IDS).logits
    step(copied, torch.optim.AdamW(trainable(copied), lr=1e-1))
    copied(input_ids=IDS)
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, atol=1e-4, rtol=1e-4)
    assert max(error_of(R) for R in every_R(copied)) < 1e-5


class TorchLoReft(nn.Module):
    """LoReFT as the paper's code has it: torch's orthogonal parametrization, with its buffer."""

    def __init__(self, d: int, r: int) -> None:
        super().__init__()
        rotation = nn.Linear(d, r, bias=False)
        nn.init.orthogonal_(rotation.weight)
        self.rotation = orthogonal(rotation)
        self.source = nn.Linear(d, r)

    def forward(self, h: Tensor) -> Tensor:
        R = self.rotation.weight
        return h + (self.source(h) - h @ R.mT) @ R


def fit(module: nn.Module, seed: int, before_forward: Callable[[], Any]) -> float:
    """Return the final loss at a map of a random subspace, where noise leaves 0.01."""
    generator = torch.Generator().manual_seed(seed)
    teacher, _ = torch.linalg.qr(torch.randn(24, 4, generator=generator))
    source = torch.randn(24, 4, generator=generator) / math.sqrt(24)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 300)
    losses = []
    for _ in range(300):
        h = torch.randn(1, 64, 24, generator=generator)
        target = h + (h @ source - h @ teacher) @ teacher.mT
        target = target + 0.1 * torch.randn(target.shape, generator=generator)
        before_forward()
        loss = (module(h) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


def test_learns_as_well_as_the_parametrization_of_torch() -> None:
    ours = torchs = 0.0
    for seed in range(3):
        torch.manual_seed(seed)
        reference = TorchLoReft(24, 4)
        layer = toy_layer(seed)
        phi = layer.phi("default")
        R, source = reference.rotation.weight, reference.source
        start = {"R": R, "W": source.weight, "bias": source.bias}
        phi.load_state_dict({name: value.detach()[None] for name, value in start.items()})
        ours += fit(layer, seed, lambda phi=phi: retract([phi])) / 3
        torchs += fit(reference, seed, lambda: None) / 3
    assert torchs < 0.011, "the task can be learned: it starts at about 0.3"
    assert ours < 1.02 * torchs
