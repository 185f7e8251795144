"""A run in the schema of PEFT's method comparison (huggingface/peft, method_comparison/MetaMathQA).

That suite keeps a JSON file for each experiment. What a run of ours does not measure is 0 (memory)
or left out ("forgetting", a loss on Wikipedia), as its readers allow. `train_config.model_id` and
the names of the metrics say what was run: only Llama-3.2-3B on MetaMathQA is an entry of theirs.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from reftune.errors import RunError
from reftune.methods import WEIGHT_METHODS
from reftune.records import OURS, Record
from reftune.run import ADAPTER, RESULTS

_PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")
_SCHEDULES = {"cosine": "cosine"}  # the others are not theirs


def method_comparison(record: Record) -> dict[str, Any]:
    """Return a finished run as one of the suite's result files holds it.

    Raises RunError for a classifier, which the suite does not have.
    """
    if record.config.get("task_type", "causal_lm") != "causal_lm":
        raise RunError(f"{record.directory} is a classifier's run; PEFT's comparison has none.")
    seconds = record.results["train"]["seconds"]
    evaluation = sum(s[OURS]["seconds"] for s in record.tasks.values())
    finished = (record.directory / RESULTS).stat().st_mtime
    created = datetime.datetime.fromtimestamp(finished, tz=datetime.UTC)
    return {
        "run_info": {
            "created_at": created.isoformat(timespec="seconds"),
            "total_time": seconds + evaluation,
            "experiment_name": f"{record.method}/{record.directory.name}",
            "peft_branch": "reftune",
            "peft_worktree_is_dirty": False,
            "train_config": _train_config(record.config),
            "peft_config": _peft_config(record.directory),
            "error_msg": "",
        },
        "train_info": _train_info(record, seconds),
        "meta_info": {
            "model_info": {"sha": None, "created_at": None},
            "dataset_info": {},
            "package_info": _packages(),
            "system_info": _system(),
            "pytorch_info": torch.__config__.show(),
        },
    }


def _train_info(record: Record, seconds: float) -> dict[str, Any]:
    trained, percent = record.results["parameters"], record.results["percent"]
    base = round(100 * trained / percent) if percent else 0
    return {
        "accelerator_memory_reserved_avg": 0,
        "accelerator_memory_max": 0,
        "accelerator_memory_reserved_99th": 0,
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
    batch = train["batch_size"] * train["gradient_accumulation_steps"]
    metrics: list[dict[str, Any]] = [
        {
            "step": row["step"],
            "train loss": row["loss"],
            "train samples": row["step"] * batch,
            "elapsed time": row.get("seconds", 0.0),
        }
        for row in record.log()
    ]
    tasks = {name: scores[OURS]["value"] for name, scores in record.tasks.items()}
    last = {
        "step": trained["steps"],
        "test accuracy": statistics.fmean(tasks.values()) if tasks else 0.0,
        "train loss": trained["loss"],
        "train samples": trained["steps"] * batch,
        "train total tokens": round(trained["tokens_per_second"] * trained["seconds"]),
    }
    return [*metrics, last | {f"test accuracy {name}": value for name, value in tasks.items()}]


def _train_config(config: Mapping[str, Any]) -> dict[str, Any]:
    train, data = config["train"], config["data"]
    return {
        "model_id": config["model"],
        "dtype": config["dtype"],
        "max_seq_length": data["max_length"],
        "batch_size": train["batch_size"] * train["gradient_accumulation_steps"],
        "batch_size_eval": config["evaluate"]["batch_size"],
        "max_steps": train["max_steps"] or 0,
        "eval_steps": train["max_steps"] or 0,
        "compile": train["compile"] is True,
        "use_gc": train["gradient_checkpointing"],
        "query_template": "{query}",
        "seed": config["seed"],
        "grad_norm_clip": train["max_grad_norm"],
        "optimizer_type": "AdamW" if "adamw" in train["optimizer"] else train["optimizer"],
        "optimizer_kwargs": {"lr": train["learning_rate"], "weight_decay": train["weight_decay"]},
        "lr_scheduler": _SCHEDULES.get(train["schedule"]),
        "use_amp": False,
        "autocast_adapter_dtype": True,
        "generation_kwargs": {},
        "attn_implementation": config["attn_implementation"],
        "init_kv_cache_prefix": None,
    }


def _peft_config(directory: Path) -> dict[str, Any] | None:
    path = directory / ADAPTER / "adapter_config.json"
    if not path.is_file():
        return None  # weights of the base: "full-finetuning" there
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _file_size(adapter: Path) -> int:
    return sum(path.stat().st_size for path in adapter.glob("*.safetensors"))


def _packages() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[f"{name}-version"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[f"{name}-version"] = None
        found[f"{name}-commit-hash"] = None
    return found


def _system() -> dict[str, str]:
    uname = platform.uname()
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    return {
        "system": uname.system,
        "release": uname.release,
        "version": uname.version,
        "machine": uname.machine,
        "processor": uname.processor,
        "accelerator": device,
    }
