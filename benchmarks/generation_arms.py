"""The arms of generation.py: how each library generates, and a check that it does so rightly."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor

from reftune import ReftConfig, options, reft_layers
from reftune.models import load_model, resolve

HERE = Path(__file__).resolve().parent
MIXED = 32  # prompts in a batch of mixed adapters
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
TEXT = (
    "A river begins where rain and melting snow gather in small streams high in the hills. It "
    "carries sand and stones down to the plain, grows slow and wide there, and ends in the sea. "
    "People have built their towns beside rivers since they first grew corn: the water turned "
    "their mills, carried their boats and watered their fields. Floods took some of those towns "
    "away again, and left black soil that was better than before. "
)
STARTUP = {
    "import peft": ("-c", "import peft"),
    "import reftune": ("-c", "import reftune"),
    "reftune --help": ("-m", "reftune_cli", "--help"),
}


@dataclass(frozen=True)
class Cell:
    """What is measured side by side; the first arm is what the others are compared with."""

    arms: tuple[str, ...]
    batch: int = 0
    new_tokens: int = 0


@dataclass(frozen=True)
class Batch:
    """Prompts padded on the left, (B, T)."""

    ids: Tensor
    mask: Tensor
    pad: int


def prompts(tokenizer: Any, count: int, device: str) -> Batch:
    """Return prompts of 52 to 67 tokens."""
    tokens = tokenizer(TEXT * 2)["input_ids"]
    starts = [3 * i % (len(tokens) // 2) for i in range(count)]
    lengths = [52 + 5 * i % 16 for i in range(count)]
    rows = [tokens[start : start + n] for start, n in zip(starts, lengths, strict=True)]
    longest = max(lengths)
    pad = int(tokenizer.pad_token_id)
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths], device=device)
    return Batch(ids, mask, pad)


def greedy(model: Any, batch: Batch, new: int, **more: Any) -> Tensor:
    """Return the new tokens (B, `new`)."""
    sequences: Tensor = model.generate(
        input_ids=batch.ids,
        attention_mask=batch.mask,
        do_sample=False,
        min_new_tokens=new,
        max_new_tokens=new,
        pad_token_id=batch.pad,
        **more,
    )
    return sequences[:, batch.ids.shape[1] :]


class Models:
    """The models of the arms, each loaded when it is first needed."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._loaded: dict[str, Any] = {}
        self.adapters = max(args.adapters)

    def tokenizer(self) -> Any:
        return self._load()[1]

    def __getitem__(self, name: str) -> Any:
        if name not in self._loaded:
            self._loaded[name] = self._build(name)
        return self._loaded[name]

    def names(self, k: int) -> list[str]:
        """Return an adapter for each of the prompts of a mixed batch, K different ones."""
        return [f"a{i % k}" for i in range(MIXED)]

    def _load(self) -> Any:
        args = self._args
        return load_model(args.model, dtype=args.dtype, device=args.device)

    def _build(self, name: str) -> Any:
        model = self._load()[0].eval()
        if name == "bare":
            return model
        torch.manual_seed(0)
        kind, _, mixed = name.partition(" ")
        made = get_peft_model(model, adapter_config(kind), adapter_name="a0")
        for i in range(1, self.adapters if mixed == "mixed" else 1):
            made.add_adapter(f"a{i}", adapter_config(kind))
        made.requires_grad_(False)
        if kind == "lora":
            shrink(made)
        return made.merge_and_unload() if mixed == "merged" else made.eval()


def adapter_config(kind: str) -> Any:
    """Return a fresh configuration: an adapter that changes what the model generates."""
    if kind == "reftune":
        return ReftConfig(task_type="CAUSAL_LM")
    return LoraConfig(
        r=32, lora_alpha=64, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM"
    )


def shrink(model: PeftModel) -> None:
    """Make a random LoRA small enough that the model still writes."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(0.1)


class Pyreft:
    """pyreft in a process of its own, with the adapter that reftune has."""

    def __init__(self, args: argparse.Namespace, model: PeftModel, folder: Path) -> None:
        adapter = folder / "adapter.safetensors"
        save_file(thin(model), adapter)
        positions = model.peft_config["a0"].parsed_positions
        path = os.pathsep.join([str(args.pyreft_checkout), str(args.pyvene_checkout)])
        numbers = [str(n) for n in (args.threads, positions.prefix, positions.suffix)]
        self._process = subprocess.Popen(
            [
                args.pyreft_python,
                str(HERE / "generation_pyreft.py"),
                resolve(args.model),
                str(adapter),
                args.dtype,
                args.device,
                *numbers,
            ],
            env=environment(args.threads) | {"PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def __call__(self, batch: Batch, new: int) -> dict[str, Any]:
        """Return the `seconds` a generation took, and its `tokens`."""
        ids, mask = batch.ids.tolist(), batch.mask.tolist()
        assert self._process.stdin is not None
        job = {"ids": ids, "mask": mask, "new": new, "pad": batch.pad}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # not what a library prints
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise SystemExit(f"pyreft's process ended with status {self._process.wait()}; see above")


def thin(model: PeftModel) -> dict[str, Tensor]:
    """Return the parameters of each layer of a tied adapter: "3.R", "3.W", "3.bias"."""
    found = {}
    for name, layer in reft_layers(model).items():
        number = name.split(".")[-2]
        for key, value in layer.phi("a0").named_parameters():
            found[f"{number}.{key}"] = value.detach()[0].cpu().contiguous()
    return found


def environment(threads: int) -> dict[str, str]:
    """Return the environment of other processes."""
    return os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(HERE.parent / "src"),
    }


class Arms:
    """Every arm, to be measured in any cell."""

    def __init__(self, args: argparse.Namespace, cells: Mapping[str, Cell], folder: Path) -> None:
        self.models, self._args, self._cells = Models(args), args, cells
        generating = [cell for cell in cells.values() if cell.batch]
        self.batches: dict[int, Batch] = {}
        if generating:
            tokenizer = self.models.tokenizer()
            sizes = {cell.batch for cell in generating}
            self.batches = {B: prompts(tokenizer, B, args.device) for B in sizes}
        self._warm: set[tuple[str, int, int]] = set()
        self.pyreft = None
        if any("pyreft" in cell.arms for cell in generating):
            self.pyreft = Pyreft(args, self.models["reftune"], folder)

    def measure(self, cell_name: str, arm: str) -> float:
        """Return how many seconds an arm takes in a cell."""
        cell = self._cells[cell_name]
        if arm in STARTUP:
            command = [sys.executable, *STARTUP[arm]]
            return timed(lambda: start(command, self._args.threads), "cpu")[1]
        batch = self.batches[cell.batch]
        # What a first call makes is not timed; a GPU loads kernels as caches grow.
        first = 2 if self._args.device == "cpu" else cell.new_tokens
        if (arm, cell.batch, first) not in self._warm:
            self.generate(arm, batch, first)
            self._warm.add((arm, cell.batch, first))
        if arm == "pyreft":
            assert self.pyreft is not None
            return float(self.pyreft(batch, cell.new_tokens)["seconds"])
        device = self._args.device
        return timed(lambda: self.generate(arm, batch, cell.new_tokens), device)[1]

    def generate(self, arm: str, batch: Batch, new: int) -> Tensor:
        """Return the tokens that an arm generates."""
        if arm == "pyreft":
            assert self.pyreft is not None
            return torch.tensor(self.pyreft(batch, new)["tokens"])
        kind, _, k = arm.partition(" x")
        if k:
            names = self.models.names(int(k))
            return greedy(self.models[f"{kind} mixed"], batch, new, adapter_names=names)
        return greedy(self.models[arm], batch, new).cpu()


def start(command: Sequence[str], threads: int) -> None:
    subprocess.run(command, env=environment(threads), check=True, stdout=subprocess.DEVNULL)


def timed(run: Callable[[], Any], device: str) -> tuple[Any, float]:
    """Return a result, and the seconds that it took."""
    if device != "cpu":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    result = run()
    if device != "cpu":
        torch.cuda.synchronize()
    return result, time.perf_counter() - begun


def check(arms: Arms, names: Sequence[str], dtype: str, new: int = 16) -> dict[str, bool]:
    """Return whether each arm generates what it should.

    Random adapters, so tokens differ for rounding now and then: of 16 new ones for each prompt at
    least 95% have to agree.
    """
    size = min(arms.batches)
    batch, models = arms.batches[size], arms.models
    tokens = {name: arms.generate(name, batch, new) for name in names if " x" not in name}
    bare, found = tokens.get("bare"), {}
    if "reftune" in tokens:
        with options(strength=0.0):
            found["reftune at strength 0 is bare"] = torch.equal(
                bare, greedy(models["reftune"], batch, new).cpu()
            )
    for name in ("reftune", "lora"):
        if name in tokens:
            found[f"{name} is not bare"] = agreement(tokens[name], bare) < 0.9
    if "pyreft" in tokens:
        found["pyreft is reftune"] = agreement(tokens["pyreft"], tokens["reftune"]) >= 0.95
    if "lora merged" in tokens:
        found["lora merged is lora"] = close(models["lora merged"], models["lora"], batch, dtype)
    for kind in sorted({name.partition(" x")[0] for name in names if " x" in name}):
        found[f"{kind} mixed is each alone"] = mixed_is_each_alone(arms, kind, dtype)
    return found


def agreement(one: Tensor, other: Tensor) -> float:
    """Return the share of tokens that are the same."""
    return float((one == other).float().mean())


def mixed_is_each_alone(arms: Arms, kind: str, dtype: str) -> bool:
    batch, k = arms.batches[MIXED], arms.models.adapters
    model, names = arms.models[f"{kind} mixed"], arms.models.names(k)
    together = last_logits(model, batch, adapter_names=names)
    for i in (0, k // 2, k - 1):
        model.set_adapter(names[i])
        row = Batch(batch.ids[i : i + 1], batch.mask[i : i + 1], batch.pad)
        if not is_close(last_logits(model, row)[0], together[i], dtype):
            return False
    return True


def close(model: Any, other: Any, batch: Batch, dtype: str) -> bool:
    return is_close(last_logits(model, batch), last_logits(other, batch), dtype)


@torch.no_grad()
def last_logits(model: Any, batch: Batch, **more: Any) -> Tensor:
    positions = (batch.mask.cumsum(-1) - 1).clamp(min=0)
    given = {"input_ids": batch.ids, "attention_mask": batch.mask, "position_ids": positions}
    logits: Tensor = model(**given, logits_to_keep=1, **more).logits[:, -1].float()
    return logits


def is_close(one: Tensor, other: Tensor, dtype: str) -> bool:
    error = (one - other).norm() / other.norm()
    return float(error) < (1e-3 if dtype == "float32" else 5e-2)
