"""Runs on two processes: the losses of one, resumed on any number, nothing of the base saved."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from processes import run_together
from reftune import run as run_module
from reftune.callbacks import Progress, last_checkpoint
from reftune.plots import read_log
from reftune.run import Silent, execute
from reftune.settings import RunConfig, parse_config
from runs import ROWS, tiny_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    # transformers' Trainer pins memory by a function that torch deprecates
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
]

KILLED, AT = 9, 5  # at a step after the checkpoint of step 4, within the second epoch
# 13 examples of steps of 6: the last of each epoch has one, and a process has none of it.
EXAMPLES = [*ROWS, {"prompt": "say z", "completion": "zz!"}]


def config(folder: Path, **train: Any) -> RunConfig:
    run = tiny_run(
        folder,
        adapter={"r": 2, "positions": "f2+l2", "tied": "sides"},
        train={"batch_size": 3, "gradient_accumulation_steps": 2, "epochs": 3} | train,
        data={"heldout": str(folder / "train.jsonl"), "cache_dir": None},
    )
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in EXAMPLES))
    return run


class DieAt(Silent):
    """End the process at a step, as a kill does."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def training(self, progress: Progress) -> None:
        if progress.step == self.step:
            os._exit(KILLED)


def work(recipe: str, resume: bool, die_at: int | None = None) -> dict[str, Any]:
    run = parse_config(yaml.safe_load(recipe), "the test's")
    run_module.Silent = lambda: DieAt(die_at)  # which tells the others than the first one
    return execute(run, resume=resume, reporter=DieAt(die_at))


def losses(run: RunConfig) -> list[float]:
    return [row["loss"] for row in read_log(run.directory / "log.jsonl") if "loss" in row]


def adapter(run: RunConfig) -> dict[str, torch.Tensor]:
    return load_file(run.directory / "adapter" / "adapter_model.safetensors")


def assert_same_run(found: RunConfig, expected: RunConfig) -> None:
    assert losses(found) == pytest.approx(losses(expected), rel=1e-4)
    for name, value in adapter(expected).items():
        torch.testing.assert_close(adapter(found)[name], value, rtol=1e-3, atol=1e-5)
    one, other = (json.loads((r.directory / "results.json").read_text()) for r in (found, expected))
    assert one["heldout"] == pytest.approx(other["heldout"], rel=1e-4)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    run = config(tmp_path_factory.mktemp("one"))
    run_together(1, work, run.to_yaml(), False)
    assert len(losses(run)) == 9
    return run


@pytest.fixture(scope="module", params=[False, True], ids=["ddp", "fsdp"])
def killed(request: Any, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    run = config(tmp_path_factory.mktemp("killed"), fsdp=request.param)
    assert run_together(2, work, run.to_yaml(), False, AT) == [KILLED, KILLED]
    checkpoint = last_checkpoint(run.directory)
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-4"
    return run


@pytest.mark.parametrize(
    "train",
    [
        {},
        {"fsdp": True},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "fsdp": True},
    ],
    ids=str,
)
def test_two_processes_make_the_run_that_one_makes(whole, tmp_path, train):
    run = config(tmp_path, **train)
    first, _ = run_together(2, work, run.to_yaml(), False)
    assert first["train"]["steps"] == 9
    assert_same_run(run, whole)


@pytest.mark.parametrize("count", [1, 2])
def test_a_killed_run_goes_on_with_any_number_of_processes(whole, killed, tmp_path, count):
    copy = killed.model_copy(update={"output_dir": str(tmp_path / "runs")})
    shutil.copytree(killed.output_dir, copy.output_dir)
    run_together(count, work, copy.to_yaml(), True)
    assert_same_run(copy, whole)


def test_a_checkpoint_has_nothing_of_the_base(killed):
    checkpoint = last_checkpoint(killed.directory)
    assert checkpoint is not None
    tensors = load_file(checkpoint / "adapter_model.safetensors")
    assert tensors
    assert all(".reft." in name for name in tensors)
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    shapes = sorted(tuple(own["exp_avg"].shape) for own in state["state"].values())
    assert shapes == sorted(tuple(t.shape) for t in tensors.values())
    listed = {path.name for path in checkpoint.rglob("*") if path.is_file()}
    assert listed == {
        *("adapter_config.json", "adapter_model.safetensors", "README.md", "optimizer.pt"),
        *("scheduler.pt", "trainer_state.json", "training_args.bin"),
        *("rng_state_0.pth", "rng_state_1.pth"),
    }


def test_the_example_prints_the_same_losses_under_torchrun(tmp_path):
    example = Path(__file__).parent.parent / "examples" / "distributed.py"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    printed = []
    for count in (1, 2):
        start = [sys.executable, *([*torchrun, str(count)] if count > 1 else [])]
        done = subprocess.run(
            [*start, str(example), "--tiny", "--cpu", "--out", str(tmp_path / str(count))],
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stdout.splitlines() if "losses" in line]
        assert len(lines) == 1, done.stdout
        printed.append(json.loads(lines[0].partition("losses ")[2]))
    assert printed[0] == pytest.approx(printed[1], rel=1e-3)
    saved = load_file(tmp_path / "2" / "adapter" / "adapter_model.safetensors")
    assert all(".reft." in name for name in saved)
