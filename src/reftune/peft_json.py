"""A run in the schema of PEFT's method comparison (huggingface/peft, method_comparison/MetaMathQA).

That suite keeps a JSON file for each experiment. What a run of ours does not measure is 0 (memory
where there was no GPU: its readers want a number, and take it for the least) or left out
("forgetting", a loss on Wikipedia). `train_config.model_id` and the names of the metrics say what
was run: only Llama-3.2-3B on MetaMathQA is an entry of theirs. Of schedules it knows the cosine and
none: where `lr_scheduler` is null, each metric's "lr" says whether the rate was constant.
"""

from __future__ import annotations

import datetime
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reftune.callbacks import mean_loss
from reftune.cells import CELLS
from reftune.errors import RunError
from reftune.methods import WEIGHT_METHODS
from reftune.provenance import system
from reftune.records import OURS, Record
from reftune.run import ADAPTER, RESULTS

_PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")
EVAL_STEPS = 250  # the suite's: its last loss is the mean over so many steps
_SCHEDULES = {"cosine": "cosine"}  # the others are not theirs
_QUANTIZED = {"bnb-4bit": "int4", "bnb-8bit": "int8", "torchao-int8": "int8"}
# Of torch.optim, by the names that transformers gives them; AdamW has many.
_OPTIMIZERS = {"sgd": "SGD", "adagrad": "Adagrad", "rmsprop": "RMSprop", "adafactor": "Adafactor"}


def method_comparison(record: Record) -> dict[str, Any]:
    """Return a finished run as one of the suite's result files holds it.

    Raises RunError for what the suite does not have: classifiers, runs without an accuracy, and
    other optimizers than torch's; and for runs that do not say their base's dtype.
    """
    if record.config.get("task_type", "causal_lm") != "causal_lm":
        raise RunError(f"{record.directory} is a classifier's run; PEFT's comparison has none.")
    if not _accuracies(record):
        raise RunError(
            f"{record.directory} was evaluated on nothing that has an accuracy, the score of "
            "PEFT's comparison. Name tasks in evaluate.tasks."
        )
    seconds = record.results["train"]["seconds"]
    evaluation = sum(s[OURS]["seconds"] for s in record.tasks.values())
    finished = (record.directory / RESULTS).stat().st_mtime
    created = datetime.datetime.fromtimestamp(finished, tz=datetime.UTC)
    return {
        "run_info": {
            "created_at": created.isoformat(timespec="seconds"),
            "total_time": seconds + evaluation,
            "experiment_name": f"{record.method}/{_name(record.directory)}",
            "peft_branch": "reftune",
            "peft_worktree_is_dirty": False,
            "train_config": _train_config(record),
            "peft_config": _peft_config(record),
            "error_msg": "",
        },
        "train_info": _train_info(record, seconds),
        "meta_info": {
            "model_info": {"sha": None, "created_at": None},
            "dataset_info": {},
            "package_info": _packages(record.results["versions"]),
            "system_info": record.results.get("system", dict.fromkeys(system())),
            "pytorch_info": f"torch {record.results['versions'].get('torch')}",
        },
    }


def _train_info(record: Record, seconds: float) -> dict[str, Any]:
    trained, percent = record.results["parameters"], record.results["percent"]
    base = round(100 * trained / percent) if percent else 0
    memory = record.results["train"].get("accelerator_memory", {})
    return {
        "accelerator_memory_reserved_avg": memory.get("reserved_avg", 0),
        "accelerator_memory_max": memory.get("max", 0),
        "accelerator_memory_reserved_99th": memory.get("reserved_99th", 0),
        "train_time": seconds,
        "file_size": _file_size(record.directory / ADAPTER),
        "num_trainable_params": trained,
        "num_total_params": base + (0 if record.method in WEIGHT_METHODS else trained),
        "status": "success",
        "metrics": _metrics(record),
    }


def _metrics(record: Record) -> list[dict[str, Any]]:
    """Return what was logged while training, and the test as the last entry."""
    train, trained = record.config["train"], record.results["train"]
    log = record.log()
    batch = train["batch_size"] * train["gradient_accumulation_steps"]
    metrics: list[dict[str, Any]] = [
        {
            "step": row["step"],
            "train loss": row["loss"],
            "lr": row["learning_rate"],
            "train samples": row["step"] * batch,
            "elapsed time": row.get("seconds", 0.0),
        }
        for row in log
    ]
    tasks = _accuracies(record)
    late = trained["steps"] - EVAL_STEPS
    last = {
        "step": trained["steps"],
        "test accuracy": statistics.fmean(tasks.values()),
        "train loss": mean_loss(log, late) if log and log[-1]["step"] > late else trained["loss"],
        "train samples": trained["steps"] * batch,
        "train total tokens": round(trained["tokens_per_second"] * trained["seconds"]),
    }
    return [*metrics, last | {f"test accuracy {name}": value for name, value in tasks.items()}]


def _accuracies(record: Record) -> dict[str, float]:
    scores = {name: found[OURS] for name, found in record.tasks.items()}
    return {name: s["value"] for name, s in scores.items() if s["metric"] == "accuracy"}


def _name(directory: Path) -> str:
    """Return a run's name, with its experiment's before it: cells of two may be named alike."""
    inside = (directory.parent / CELLS).is_file()
    return f"{directory.parent.name}-{directory.name}" if inside else directory.name


def _train_config(record: Record) -> dict[str, Any]:
    config, trained = record.config, record.results["train"]
    train, data = config["train"], config["data"]
    return {
        "model_id": config["model"],
        "dtype": _dtype(record),
        "max_seq_length": data["max_length"],
        "batch_size": train["batch_size"] * train["gradient_accumulation_steps"],
        "batch_size_eval": config["evaluate"]["batch_size"],
        "max_steps": trained["steps"],
        "eval_steps": trained["steps"],  # evaluated once, at the end
        "compile": "compile" in trained.get("shortcuts", ()),
        "use_gc": train["gradient_checkpointing"],
        "query_template": "{query}",
        "seed": config["seed"],
        "grad_norm_clip": train["max_grad_norm"],
        "optimizer_type": _optimizer(record),
        "optimizer_kwargs": {"lr": train["learning_rate"], "weight_decay": train["weight_decay"]},
        "lr_scheduler": _SCHEDULES.get(train["schedule"]),
        "use_amp": False,
        "autocast_adapter_dtype": True,
        "generation_kwargs": {},
        "attn_implementation": config["attn_implementation"],
        "init_kv_cache_prefix": None,
    }


def _dtype(record: Record) -> str:
    """Return what the base was loaded in. Raises RunError where nothing says it."""
    if quantization := record.config.get("quantization"):
        return _QUANTIZED[quantization]
    found = str(record.results.get("dtype", record.config["dtype"]))
    if found == "auto":
        raise RunError(
            f"{record.directory} was run with dtype: auto by a version that did not write down "
            'what it came to. Add it to results.json, e.g. "dtype": "bfloat16".'
        )
    return found


def _optimizer(record: Record) -> str:
    """Return the name that torch gives a run's optimizer. Raises RunError where it has none."""
    name = record.config["train"]["optimizer"]
    if found := "AdamW" if "adamw" in name else _OPTIMIZERS.get(name):
        return found
    raise RunError(f"{record.directory} was trained by {name}, which PEFT's comparison lacks.")


def _peft_config(record: Record) -> dict[str, Any] | None:
    path = record.directory / ADAPTER / "adapter_config.json"
    if not path.is_file():
        # Weights of the base. None is "full-finetuning" there, which bitfit is not.
        return None if record.method == "full" else {"peft_type": record.method.upper()}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _file_size(adapter: Path) -> int:
    return sum(path.stat().st_size for path in adapter.glob("*.safetensors"))


def _packages(known: Mapping[str, str]) -> dict[str, str | None]:
    """Return the versions that a run was made with; None of what it does not say."""
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        found |= {f"{name}-version": known.get(name), f"{name}-commit-hash": None}
    return found
