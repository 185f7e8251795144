"""The model card of an adapter: what it is, what it scored, how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from reftune.config import ReftConfig
from reftune.settings import RunConfig


def model_card(config: RunConfig, adapter: ReftConfig, results: Mapping[str, Any]) -> str:
    """Return the README.md of an adapter's directory, with the Hub's metadata on top."""
    base = adapter.base_model_name_or_path
    front = {
        "base_model": base,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["reft", adapter.method, "representation-finetuning", "reftune"],
    }
    sources = config.data.train if isinstance(config.data.train, list) else [config.data.train]
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {config.name}",
        f"A representation finetuning (ReFT) adapter for `{base}`: it edits hidden states of "
        f"prompt tokens, the weights of the model stay as they are.",
        "## Use",
        _usage(str(base), config.name),
        "## The adapter",
        _table(("setting", "value"), _settings(config, adapter, results)),
        "## Training",
        _table(("setting", "value"), _training(config, sources, results)),
    ]
    scores = _scores(results)
    if scores:
        header = ("task", "examples", "base", "adapter")
        sections += ["## Results", _table(header, scores)]
    return "\n\n".join(sections) + "\n"


def _usage(base: str, name: str) -> str:
    return f"""```python
import reftune  # registers ReFT with PEFT
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "path/to/{name}")
```"""


def _settings(
    config: RunConfig, adapter: ReftConfig, results: Mapping[str, Any]
) -> list[tuple[str, str]]:
    return [
        ("method", adapter.method),
        ("rank", str(adapter.r)),
        ("layers", str(adapter.layers)),
        ("positions", adapter.positions),
        ("tied", adapter.tied),
        ("trainable parameters", f"{results['parameters']:,} ({results['percent']:.4f}%)"),
        ("prompt template", config.data.template),
    ]


def _training(
    config: RunConfig, sources: list[str], results: Mapping[str, Any]
) -> list[tuple[str, str]]:
    t, trained = config.train, results["train"]
    rows = [
        ("data", ", ".join(sources)),
        ("examples", str(results["examples"])),
        ("optimizer steps", str(trained["steps"])),
        ("batch", f"{t.batch_size} x {t.gradient_accumulation_steps}"),
        ("learning rate", f"{t.learning_rate:g}, {t.schedule}, warm-up {t.warmup_ratio:g}"),
        ("weight decay", f"{t.weight_decay:g}"),
        ("seed", str(config.seed)),
        ("mean training loss", f"{trained['loss']:.4f}"),
    ]
    heldout = results.get("heldout")
    if heldout:
        rows.append(("held-out loss", f"{heldout['adapter']:.4f} (base {heldout['base']:.4f})"))
    return rows


def _scores(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (name, str(scores["adapter"]["n"]), format_score(scores.get("base")),
         format_score(scores["adapter"]))
        for name, scores in results.get("tasks", {}).items()
    ]  # fmt: skip


def format_score(result: Mapping[str, Any] | None) -> str:
    """Return "62.5 ± 12.5" (per cent and standard error), or a dash."""
    if result is None:
        return "–"
    error = "" if result["stderr"] is None else f" ± {100 * result['stderr']:.1f}"
    return f"{100 * result['value']:.1f}{error}"


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
