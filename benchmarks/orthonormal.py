"""Is a thin R that is retracted once per step as good as torch's `orthogonal` parametrization?

Learning: LoReFT on every layer of a frozen random Llama memorises random completions of random
prompts; the same model, data, initial values and learning rate in each arm, three seeds.

    ours            reftune: a thin parameter, retracted after each step
    ours, R lr / 2  the same, R with half the learning rate
    torch           R = orthogonal(R), as pyreft has it: Householder vectors and a d x d buffer

A step of torch's vectors moves R about twice as far (a reflector is I - 2 v v^T), which an
optimizer that normalises gradients does not undo. Ours goes twice as far as the optimizer says for
the same effect; the middle arm is what the optimizer's own step would do.

Cost: memory of parameters and buffers, and time per step, of one intervention by width.

    python benchmarks/orthonormal.py [--steps 200] [--json benchmarks/results/orthonormal-cpu.json]

The last line of the output is the result as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal
from transformers import LlamaConfig, LlamaForCausalLM

from reftune import ReftConfig, reft_layers
from reftune.interventions import Intervention, LoReft, retract

ARMS = ("ours", "ours, R lr / 2", "torch")
WIDTHS = (512, 1024, 2048, 4096)
PROMPT, COMPLETION, EXAMPLES, LR, LAST = 12, 8, 64, 2e-3, 10


class Rotation(nn.Module):
    """R as pyreft has it, with the values of an intervention's own."""

    def __init__(self, R: Tensor) -> None:
        super().__init__()
        linear = nn.Linear(R.shape[1], R.shape[0], bias=False)
        with torch.no_grad():
            linear.weight.copy_(R)
        self.linear = orthogonal(linear)

    def forward(self) -> Tensor:
        weight: Tensor = self.linear.weight
        return weight


class TorchLoReft(Intervention):
    """The LoReFT of this package with torch's parametrization of R."""

    method = "loreft"

    def __init__(self, phi: LoReft) -> None:
        super().__init__(phi.shape)
        with torch.no_grad():
            self.get_parameter("W").copy_(phi.get_parameter("W"))
            self.get_parameter("bias").copy_(phi.get_parameter("bias"))
        self.formula = [phi]  # in a list: its parameters are not ours
        self.rotation = Rotation(phi.tensors()["R"][0].detach())

    def initial(self) -> dict[str, Tensor]:
        s = self.shape
        return {"W": torch.empty(1, s.rank, s.hidden_size), "bias": torch.empty(1, s.rank)}

    def tensors(self) -> dict[str, Tensor]:
        own = {name: self.get_parameter(name) for name in ("W", "bias")}
        return {**own, "R": self.rotation()[None]}

    def forward(self, h: Tensor, tensors: Any, valid: Tensor) -> Tensor:
        return self.formula[0].forward(h, tensors, valid)


def build(arm: str, seed: int, hidden_size: int) -> PeftModel:
    """Return the adapted model; the arms of one seed start as the same function."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=4,
        num_attention_heads=8,
        initializer_range=0.05,
    )
    reft = ReftConfig(r=4, positions="f2+l2", task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config), reft)
    if arm == "torch":
        for layer in reft_layers(model).values():
            phi = layer.phi("default")
            assert isinstance(phi, LoReft)
            layer.reft_phi["default"] = TorchLoReft(phi)
    return model


def optimizer_for(model: nn.Module, arm: str) -> torch.optim.Optimizer:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    factor = 0.5 if arm == "ours, R lr / 2" else 1.0
    groups = [
        {"params": [p for name, p in named if name.endswith(".R")], "lr": factor * LR},
        {"params": [p for name, p in named if not name.endswith(".R")], "lr": LR},
    ]
    # No fused kernel: the same arithmetic in each arm.
    return torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0, foreach=True)


def learn(arm: str, seed: int, steps: int, hidden_size: int) -> dict[str, float]:
    """Train and return the mean loss of the middle and of the last steps."""
    model = build(arm, seed, hidden_size)
    optimizer = optimizer_for(model, arm)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 256, (EXAMPLES, PROMPT + COMPLETION), generator=generator)
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    middle = steps // 2
    return {
        "first": losses[0],
        "middle": statistics.mean(losses[middle - LAST : middle]),
        "final": statistics.mean(losses[-LAST:]),
        "error_of_R": error_of_R(model),
    }


def error_of_R(model: nn.Module) -> float:
    phis = [layer.phi("default") for layer in reft_layers(model).values()]
    retract(phis)
    Rs = [phi.tensors()["R"].detach() for phi in phis]
    return max(float((R @ R.mT - torch.eye(R.shape[-2])).abs().max()) for R in Rs)


def cost(arm: str, width: int, repeats: int = 30) -> dict[str, float]:
    """Return the memory of one intervention (rank 8) and the median time of a step at 256 rows."""
    torch.manual_seed(0)
    phi: Intervention = ReftConfig(r=8).build(width)
    if arm == "torch":
        assert isinstance(phi, LoReft)
        phi = TorchLoReft(phi)
    optimizer = torch.optim.AdamW(phi.parameters(), lr=1e-4, foreach=True)
    h, valid = torch.randn(256, width), torch.ones(256, dtype=torch.bool)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        retract([phi])
        tensors = {name: t[0] for name, t in phi.tensors().items()}
        (h + phi(h, tensors, valid)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    held = [*phi.parameters(), *phi.buffers()]
    return {
        "mebibytes": sum(t.numel() * t.element_size() for t in held) / 2**20,
        "milliseconds": 1e3 * statistics.median(times[5:]),
    }


def machine() -> dict[str, Any]:
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {"cpu": model, "cpus": os.cpu_count(), "threads": torch.get_num_threads()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    args = parser.parse_args()
    # PEFT 0.21 asks a model for a property that transformers 5 deprecates.
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)

    learning = {
        arm: [learn(arm, s, args.steps, args.hidden_size) for s in args.seeds] for arm in ARMS
    }
    print(f"{'arm':16}{'first':>9}{'middle':>9}{'final':>9}   final of each seed")
    for arm, runs in learning.items():
        means = [statistics.mean(run[k] for run in runs) for k in ("first", "middle", "final")]
        each = ", ".join(f"{run['final']:.4f}" for run in runs)
        print(f"{arm:16}" + "".join(f"{m:9.4f}" for m in means) + f"   {each}")
    costs = {arm: {w: cost(arm, w) for w in WIDTHS} for arm in ("ours", "torch")}
    print(f"\n{'width':>6}{'ours MiB':>10}{'torch MiB':>11}{'ours ms':>9}{'torch ms':>10}")
    for w in WIDTHS:
        ours, torchs = costs["ours"][w], costs["torch"][w]
        print(
            f"{w:6}{ours['mebibytes']:10.2f}{torchs['mebibytes']:11.2f}"
            f"{ours['milliseconds']:9.2f}{torchs['milliseconds']:10.2f}"
        )
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
    settings = {k: v for k, v in vars(args).items() if k != "json"} | {"lr": LR}
    result = {
        "settings": settings,
        "learning": learning,
        "cost": costs,
        "versions": {"python": platform.python_version(), **versions},
        "machine": machine(),
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
