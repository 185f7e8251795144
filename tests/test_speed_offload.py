"""The frozen base on the host: weights visit layer by layer, and what is learned is the same."""

import json
import weakref
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from reftune import train
from reftune.errors import ReftConfigError
from reftune.run import execute
from reftune.speed import offload
from reftune.speed.offload import left_where_they_are, offloading
from runs import tiny_run
from tiny import tiny_llama

# PEFT reads transformers' old name for it.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
CPU = torch.device("cpu")


def losses(directory: Path) -> list[float]:
    lines = (directory / "log.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def test_a_run_with_the_base_offloaded_learns_the_same(tmp_path: Path) -> None:
    plain = tiny_run(tmp_path / "a", train={"gradient_checkpointing": True})
    offloaded = tiny_run(
        tmp_path / "b", train={"gradient_checkpointing": True, "offload_base": True}
    )
    execute(plain)
    execute(offloaded)
    assert losses(offloaded.directory) == pytest.approx(losses(plain.directory), abs=1e-5)


def test_one_layer_at_a_time_is_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama().train()
    visitors: list[weakref.ref[Any]] = []
    most = 0
    visitor = offload._visitor

    def counted(parameter: torch.nn.Parameter, device: torch.device) -> torch.nn.Parameter:
        nonlocal most
        copy = visitor(parameter, device)
        visitors.append(weakref.ref(copy))
        most = max(most, sum(one() is not None for one in visitors))
        return copy

    monkeypatch.setattr(offload, "_visitor", counted)
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)  # so that a backward goes through all layers
    model.activation_checkpointing_enable({"use_reentrant": False})
    per_layer = sum(1 for _ in model.model.layers[0].parameters())
    with offloading(model.model.layers, CPU):
        ids = torch.arange(5, 17).view(2, 6)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert len(visitors) == 2 * 2 * per_layer  # two layers, forward and recomputation
    assert most <= 2 * per_layer
    assert sum(one() is not None for one in visitors) == 0


def test_weights_are_the_models_own_again_after_an_error() -> None:
    model = tiny_llama().requires_grad_(False)
    before = dict(model.named_parameters())
    with pytest.raises(RuntimeError, match="stop"), offloading(model.model.layers, CPU):
        raise RuntimeError("stop")
    after = dict(model.named_parameters())
    assert all(after[name] is p for name, p in before.items())
    assert "forward" not in vars(model.model.layers[0])


def test_moving_the_model_leaves_offloaded_weights_behind() -> None:
    model = tiny_llama().requires_grad_(False)
    with left_where_they_are(model.model.layers):
        model.to(torch.float64)  # moves as `.to(device)` does
    assert model.lm_head.weight.dtype is torch.float64
    assert {p.dtype for p in model.model.layers.parameters()} == {torch.float32}


@pytest.mark.parametrize("shortcuts", [True, False])
def test_nothing_that_training_calls_moves_the_offloaded_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shortcuts: bool
) -> None:
    moved: list[set[str]] = []
    to = torch.nn.Module.to

    def spy(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        moved.append({name for name, p in module.named_parameters() if not p.requires_grad})
        return to(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "to", spy)
    reunited: list[int] = []
    monkeypatch.setattr(offload, "reunite", lambda model, device: reunited.append(len(moved)))
    wanted = {"gradient_checkpointing": True, "offload_base": True, "shortcuts": shortcuts}
    results = execute(tiny_run(tmp_path, train=wanted))
    assert "offload_base" in results["train"]["shortcuts"]
    whole = [names for names in moved[: reunited[0]] if any("embed_tokens" in n for n in names)]
    assert len(whole) >= 3, "before the trial, by the Trainer, and by accelerate"
    assert not any(".layers." in name for names in whole for name in names)


def test_a_model_is_brought_together_after_an_error_in_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reunite = Mock(side_effect=RuntimeError("CUDA error"))  # which is not why training ended
    monkeypatch.setattr(offload, "reunite", reunite)
    monkeypatch.setattr(train, "_trainer", Mock(side_effect=RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        execute(tiny_run(tmp_path, train={"gradient_checkpointing": True, "offload_base": True}))
    reunite.assert_called_once()


def test_a_model_that_does_not_fit_is_evaluated_on_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    def too_large(model: torch.nn.Module, device: torch.device) -> None:
        asked.append(device.type)
        if device.type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(offload, "place", too_large)
    offload.reunite(tiny_llama(), torch.device("cuda"))
    assert asked == ["cuda", "cpu"]


def test_offloading_without_checkpointing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReftConfigError, match="gradient_checkpointing: true"):
        tiny_run(tmp_path, train={"offload_base": True})
