"""What only a GPU shows: where models are put, and that training there is training here."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from reftune import trainer
from reftune.orthonormal import is_orthonormal, orthonormalise
from reftune.run import execute, load_adapter
from reftune.settings import RunConfig
from reftune_cli import app
from runs import tiny_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
]

HELDOUT = {"heldout_fraction": 0.25, "template": "none"}
ASKED = {"tasks": ["demo"], "limit": 2}


def losses(config: RunConfig) -> list[float]:
    lines = (config.directory / "log.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"shortcuts": False},
        {"reuse": True, "epochs": 4},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "offload_base": True},
        {"gradient_checkpointing": True, "offload_base": True, "shortcuts": False},
    ],
)
def test_a_run_learns_what_it_learns_on_a_cpu(tmp_path: Path, settings: dict[str, Any]) -> None:
    sections: dict[str, Any] = {"data": HELDOUT, "evaluate": ASKED}
    there = tiny_run(tmp_path / "gpu", train={**settings, "device": "auto"}, **sections)
    here = tiny_run(tmp_path / "cpu", train=settings, **sections)
    found, expected = execute(there), execute(here)
    assert losses(there) == pytest.approx(losses(here), rel=1e-3)
    assert found["heldout"]["adapter"] == pytest.approx(expected["heldout"]["adapter"], rel=1e-3)
    assert found["tasks"]["demo"]["adapter"]["n"] == 2
    assert found["train"]["shortcuts"] == expected["train"]["shortcuts"]
    assert "cpu_seconds" in expected["train"]
    assert "cpu_seconds" not in found["train"]


def test_an_offloaded_base_is_not_on_the_gpu_while_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where: list[set[str]] = []
    compute = trainer.ReftTrainer.compute_loss

    def spy(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        frozen = {n: p.device.type for n, p in model.named_parameters() if not p.requires_grad}
        where.append({device for name, device in frozen.items() if ".layers." in name})
        return compute(self, model, *args, **kwargs)

    monkeypatch.setattr(trainer.ReftTrainer, "compute_loss", spy)
    wanted = {"device": "auto", "gradient_checkpointing": True, "offload_base": True}
    execute(tiny_run(tmp_path, train=wanted, data=HELDOUT))
    assert where
    assert all(devices == {"cpu"} for devices in where)


def test_a_loaded_adapter_is_used_on_the_gpu(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, train={"device": "auto"})
    execute(config)
    loaded = load_adapter(config.directory)
    assert {p.device.type for p in loaded.model.parameters()} == {"cuda"}
    on_cpu = load_adapter(config.directory, device="cpu")
    ids = torch.arange(3, 15)[None]
    with torch.inference_mode():
        found, expected = loaded.model(ids.cuda()).logits.cpu(), on_cpu.model(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    result = CliRunner().invoke(app, ["generate", str(config.directory), "say aa"])
    assert result.exit_code == 0, result.output


def test_retraction_is_exact_where_products_are_rounded() -> None:
    R = torch.nn.init.orthogonal_(torch.empty(8, 576, device="cuda"))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        found = orthonormalise(R + 1e-3 * torch.randn_like(R))
        assert is_orthonormal(found)
    finally:
        torch.set_float32_matmul_precision(before)
    gram = found.double() @ found.double().mT
    assert (gram - torch.eye(8, dtype=gram.dtype, device="cuda")).abs().max() < 1e-6
