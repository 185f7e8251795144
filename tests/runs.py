"""A run small enough for every test: a tiny model in a directory, a few rows, a config."""

import json
import os
import signal
from pathlib import Path
from typing import Any

from reftune.callbacks import Progress
from reftune.run import Silent
from reftune.settings import RunConfig, parse_config
from tiny import tiny_llama, tiny_tokenizer

ROWS = [{"prompt": f"say {c}{c}", "completion": f"{c}!"} for c in "abcdefghijkl"]


def tiny_model_directory(tmp_path: Path) -> Path:
    """Save the tiny Llama and its tokenizer; return the directory."""
    directory = tmp_path / "model"
    if not directory.exists():
        tiny_llama().save_pretrained(directory)
        tiny_tokenizer().save_pretrained(directory)
    return directory


def tiny_run(tmp_path: Path, **sections: dict[str, Any]) -> RunConfig:
    """Return a config of a run of 6 steps in `tmp_path`, with keys of its sections changed."""
    tmp_path.mkdir(exist_ok=True)
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    values: dict[str, Any] = {
        "name": "run",
        "model": str(tiny_model_directory(tmp_path)),
        "output_dir": str(tmp_path / "runs"),
        "adapter": {"r": 2, "positions": "f2+l2"},
        "data": {"train": str(data), "template": "none", "max_length": 32},
        "train": {
            "epochs": 3,
            "batch_size": 3,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_steps": 2,
            "device": "cpu",
        },
        "evaluate": {"show": 0},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return parse_config(values, "tiny")


class InterruptAt(Silent):
    """Press Ctrl-C when training reaches a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def training(self, progress: Progress) -> None:
        if progress.step == self.step:
            self.step = -1
            os.kill(os.getpid(), signal.SIGINT)
