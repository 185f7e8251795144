"""A run from its config to its directory, and what happens when it is interrupted or broken."""

import importlib.metadata
import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from reftune import layer as layer_module
from reftune import run as run_module
from reftune import train as train_module
from reftune.callbacks import Memory, Progress, last_checkpoint
from reftune.errors import DataError, RunError
from reftune.plots import read_log
from reftune.run import execute, load_adapter, versions
from reftune.settings import RunConfig, load_config
from runs import InterruptAt, tiny_run

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    # transformers' Trainer pins memory by a function that torch deprecates
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
]


def losses(config: RunConfig) -> list[float]:
    return [row["loss"] for row in read_log(config.directory / "log.jsonl") if "loss" in row]


def adapter_tensors(config: RunConfig) -> dict[str, torch.Tensor]:
    return load_file(config.directory / "adapter" / "adapter_model.safetensors")


def test_a_run_leaves_everything_in_its_directory(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, data={"heldout_fraction": 0.25})
    results = execute(config)
    directory = config.directory
    for name in ("config.yaml", "log.jsonl", "results.json", "loss.png", "adapter/README.md"):
        assert (directory / name).stat().st_size > 0, name
    assert json.loads((directory / "results.json").read_text()) == results
    assert load_config(directory / "config.yaml") == config
    assert results["examples"] == 9
    assert results["dtype"] == "float32", "what auto came to"
    assert results["heldout"]["n"] == 3
    assert not list(directory.glob(".*")), "no temporary file is left behind"


def test_versions_are_of_all_that_a_score_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"torch": "2", "tokenizers": "3", "reasoning-gym": "4", "lm_eval": "5", "rich": "6"}

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    expected = {"reftune": "unknown", **installed}
    del expected["rich"]
    assert versions() == expected, "what is not installed is left out"
    installed |= dict.fromkeys(("datasets", "scikit-learn", "scipy", "vllm", "reftune"), "7")
    assert set(installed) - {"rich"} == set(versions())
    assert next(iter(versions().items())) == ("reftune", "7")


def test_training_lowers_the_loss_and_the_saved_adapter_is_the_trained_one(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, train={"epochs": 30})
    results = execute(config)
    assert losses(config)[-1] < losses(config)[0] - 0.5
    base = AutoModelForCausalLM.from_pretrained(config.model)
    model = PeftModel.from_pretrained(base, str(config.directory / "adapter"))
    loaded = load_adapter(config.directory, dtype="float32")
    ids = torch.arange(3, 15)[None]
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, loaded.model(ids).logits)
    assert results["train"]["steps"] == 60


def test_an_interrupted_run_resumes_and_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = tiny_run(tmp_path / "a", adapter={"dropout": 0.1})
    execute(whole)
    broken = tiny_run(tmp_path / "b", adapter={"dropout": 0.1})
    with pytest.raises(RunError, match="interrupted at step 3.*--resume"):
        execute(broken, reporter=InterruptAt(3))
    assert not (broken.directory / "adapter").exists()
    execute(broken, resume=True)
    assert losses(broken) == losses(whole)
    for name, tensor in adapter_tensors(whole).items():
        assert torch.equal(tensor, adapter_tensors(broken)[name]), name


def test_dropout_of_edits_may_end_after_some_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[float] = []
    dropout = F.dropout

    def counted(x: torch.Tensor, p: float) -> torch.Tensor:
        calls.append(p)
        return dropout(x, p)

    class Counting(InterruptAt):
        def training(self, progress: Progress) -> None:
            if progress.logged:
                seen.setdefault(progress.step, len(calls) > 0)  # the end is logged, too
                calls.clear()
            super().training(progress)

    monkeypatch.setattr(layer_module.F, "dropout", counted)
    for step in (-1, 1, 3):  # uninterrupted; in the first epoch of two steps, and after it
        seen: dict[int, bool] = {}
        config = tiny_run(
            tmp_path / str(step),
            adapter={"dropout": 0.5},
            train={"dropout_epochs": 1, "shortcuts": False},
        )
        if step > 0:
            with pytest.raises(RunError, match="interrupted"):
                execute(config, reporter=Counting(step))
        calls.clear()
        execute(config, resume=step > 0, reporter=Counting(-1))
        assert seen == {1: True, 2: True, 3: False, 4: False, 5: False, 6: False}


def test_memory_of_a_gpu_is_noted_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    reserved = iter([10, 30, 20])
    peaks = iter([11, 40, 40])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: next(reserved))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: next(peaks))
    for kind, numbers in (
        ("cpu", None),
        ("cuda", {"reserved_avg": 20, "reserved_99th": 30, "max": 40}),
    ):
        memory, args = Memory(), SimpleNamespace(device=torch.device(kind))
        memory.on_train_begin(args, None, None)  # type: ignore[arg-type]
        for _ in range(3):
            memory.on_step_end(args, None, None)  # type: ignore[arg-type]
        assert memory.numbers == numbers


def test_ctrl_c_is_the_users_again_after_training(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    execute(tiny_run(tmp_path))
    assert signal.getsignal(signal.SIGINT) is before


def test_a_torn_checkpoint_is_not_resumed_from(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    with pytest.raises(RunError):
        execute(config, reporter=InterruptAt(5))
    newest = last_checkpoint(config.directory)
    assert newest is not None
    assert newest.name == "checkpoint-5"
    weights = newest / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    older = last_checkpoint(config.directory)
    assert older is not None
    assert older.name == "checkpoint-4"
    execute(config, resume=True)
    assert len(losses(config)) == 6


def test_resuming_drops_log_lines_after_the_checkpoint(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    with pytest.raises(RunError):
        execute(config, reporter=InterruptAt(3))
    with (config.directory / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 99.0}\n{"step": 5, "lo')
    before = read_log(config.directory / "log.jsonl")[2]["cpu_seconds"]
    execute(config, resume=True)
    after = [row["cpu_seconds"] for row in read_log(config.directory / "log.jsonl")]
    assert after == sorted(after)
    assert after[3] > before > 0, "of all its parts"
    assert 99.0 not in losses(config)
    assert len(losses(config)) == 6


def test_a_loss_that_is_no_number_ends_the_run_and_saves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach = run_module._attach

    def broken(config: RunConfig) -> Any:
        loaded = attach(config)
        with torch.no_grad():
            next(p for p in loaded.model.parameters() if p.requires_grad).fill_(torch.nan)
        return loaded

    monkeypatch.setattr(run_module, "_attach", broken)
    config = tiny_run(tmp_path)
    with pytest.raises(RunError, match="loss is nan at step 1.*lower train.learning_rate"):
        execute(config)
    assert not (config.directory / "adapter").exists()
    assert not (config.directory / "results.json").exists()


def test_an_earlier_run_is_neither_skipped_nor_overwritten_unasked(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    execute(config)
    before = adapter_tensors(config)
    with pytest.raises(RunError, match="holds a run already"):
        execute(config)
    other = tiny_run(tmp_path, train={"learning_rate": 2e-2})
    with pytest.raises(RunError, match=r"other settings \(train.learning_rate\)"):
        execute(other, resume=True)
    execute(other, overwrite=True)
    assert any(not torch.equal(t, before[k]) for k, t in adapter_tensors(other).items())


@pytest.mark.parametrize(
    ("data", "evaluate", "named"),
    [
        ({"train": ["format/json"]}, {"split": "validation"}, r"evaluate\.split"),
        ({"leaks": "drop"}, {"tasks": ["demo", "format/json"]}, r"evaluate\.tasks"),
        ({}, {"tasks": ["demo", "format/json"]}, None),
    ],
)
def test_a_run_is_not_resumed_with_other_rows_left_out_of_training(
    tmp_path: Path, data: dict[str, Any], evaluate: dict[str, Any], named: str | None
) -> None:
    data |= {"template": "none", "limit": 12, "max_length": 512}
    asked = {"tasks": ["demo"], "limit": 1}
    config = tiny_run(tmp_path, data=data, evaluate=asked)
    with pytest.raises(RunError, match="interrupted"):
        execute(config, reporter=InterruptAt(1))
    other = tiny_run(tmp_path, data=data, evaluate=asked | evaluate)
    if named is None:
        execute(other, resume=True)
    else:
        with pytest.raises(RunError, match=named):
            execute(other, resume=True)


def test_a_key_that_an_earlier_version_did_not_have_does_not_stop_a_resume(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    with pytest.raises(RunError, match="interrupted"):
        execute(config, reporter=InterruptAt(3))
    path = config.directory / "config.yaml"
    values = yaml.safe_load(path.read_text())
    assert values["train"].pop("warmup_ratio") is not None
    path.write_text(yaml.safe_dump(values))
    other = tiny_run(tmp_path, train={"warmup_ratio": 0.5})
    with pytest.raises(RunError, match=r"other settings \(train\.warmup_ratio\)"):
        execute(other, resume=True)
    execute(config, resume=True)
    assert len(losses(config)) == 6


def test_what_a_run_that_never_began_leaves_is_in_nobodys_way(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, train={"max_steps": 1})
    config.directory.mkdir(parents=True)
    for name in ("error.txt", ".config.yaml.part"):
        (config.directory / name).write_text("the disk was full")
    execute(config)


def test_a_run_that_is_half_removed_does_not_bear_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(tmp_path, train={"max_steps": 1})
    execute(config)
    removed: list[Path] = []

    def killed(path: Path, **_: Any) -> None:
        removed.append(Path(path))
        if Path(path).exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        execute(config, overwrite=True)
    assert removed[-1] != config.directory
    assert not config.directory.exists()


def test_a_directory_that_is_no_run_is_never_replaced(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    config.directory.mkdir(parents=True)
    precious = config.directory / "thesis.tex"
    precious.write_text("years of work")
    with pytest.raises(RunError, match="no run of reftune"):
        execute(config, overwrite=True)
    assert precious.read_text() == "years of work"


def test_resume_without_a_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no whole checkpoint"):
        execute(tiny_run(tmp_path), resume=True)


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(tmp_path: Path) -> None:
    configs = [tiny_run(tmp_path / name) for name in "ab"]
    for config in configs:
        execute(config)
    first, second = (adapter_tensors(config) for config in configs)
    assert all(torch.equal(first[k], second[k]) for k in first)
    other = configs[1].model_copy(update={"seed": 7, "name": "other"})
    execute(other)
    assert not torch.equal(adapter_tensors(other)[next(iter(first))], next(iter(first.values())))


def test_wrong_inputs_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere.jsonl"):
        execute(tiny_run(tmp_path, data={"train": str(tmp_path / "nowhere.jsonl")}))
    shutil.rmtree(tmp_path / "runs")
    with pytest.raises(DataError, match=r"data\.data_dir, a folder that holds boolq/train\.json"):
        execute(tiny_run(tmp_path, data={"train": ["boolq"], "template": "commonsense"}))
    with pytest.raises(RunError, match="is no adapter"):
        load_adapter(tmp_path)


def test_evaluation_compares_base_and_adapter_on_the_same_prompts(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, data={"template": "none"}, evaluate={"tasks": ["demo"], "limit": 2})
    results = execute(config)
    assert set(results["tasks"]["demo"]) == {"base", "adapter"}
    texts = []
    for who in ("base", "adapter"):
        lines = (config.directory / "samples" / who / "demo.jsonl").read_text().splitlines()
        texts.append([json.loads(line) for line in lines[1:]])
    base, ours = texts
    assert [row["prompt"] for row in base] == [row["prompt"] for row in ours]
    assert [row["completion"] for row in base] != [row["completion"] for row in ours]


def test_a_finished_run_is_not_resumed_into_another(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, train={"save_steps": 100})
    execute(config)
    before = {p: p.read_bytes() for p in config.directory.rglob("*") if p.is_file()}
    with pytest.raises(RunError, match="is finished"):
        execute(config, resume=True)
    assert {p: p.read_bytes() for p in config.directory.rglob("*") if p.is_file()} == before


def test_a_run_killed_in_its_evaluation_resumes_without_training(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    results = execute(config)
    weights = adapter_tensors(config)
    for name in ("results.json", "loss.png"):
        (config.directory / name).unlink()
    shutil.rmtree(config.directory / "adapter")
    again = execute(config, resume=True)
    assert again["train"]["steps"] == results["train"]["steps"]
    assert again["train"]["loss"] == results["train"]["loss"]
    assert all(torch.equal(t, weights[k]) for k, t in adapter_tensors(config).items())


def test_the_adapter_is_saved_before_the_heldout_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which may need more memory than there is, after hours of training."""

    def out_of_memory(*_: Any) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    config = tiny_run(tmp_path, data={"heldout_fraction": 0.25})
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "heldout_cross_entropy", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            execute(config)
    before = adapter_tensors(config)
    shutil.rmtree(config.directory / "adapter")
    results = execute(config, resume=True)
    assert results["heldout"]["adapter"] > 0
    assert all(torch.equal(t, before[k]) for k, t in adapter_tensors(config).items())


def test_the_mean_loss_of_a_resumed_run_is_that_of_all_its_steps(tmp_path: Path) -> None:
    whole, broken = tiny_run(tmp_path / "a"), tiny_run(tmp_path / "b")
    expected = execute(whole)["train"]["loss"]
    with pytest.raises(RunError):
        execute(broken, reporter=InterruptAt(3))
    assert execute(broken, resume=True)["train"]["loss"] == expected


def test_a_run_that_never_began_does_not_hold_its_name(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    data = Path(str(config.data.train))
    good = data.read_text()
    data.write_text(good + "{bad\n")
    with pytest.raises(DataError, match=r"train\.jsonl:13"):
        execute(config)
    data.write_text(good)
    execute(config)


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(RunError, match="cannot be written"):
        execute(config)


def test_the_last_step_is_always_logged(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, train={"logging_steps": 4})
    execute(config)
    steps = [row["step"] for row in read_log(config.directory / "log.jsonl") if "loss" in row]
    assert steps == [1, 4, 6]
