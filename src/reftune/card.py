"""The model card of an adapter: what it is, what it scored, how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from reftune.methods import BASELINES, PEFT_METHODS, WEIGHT_METHODS
from reftune.settings import RunConfig


def model_card(config: RunConfig, base: str, results: Mapping[str, Any]) -> str:
    """Return the README.md of an adapter's directory, with the Hub's metadata on top."""
    is_reft = config.method not in BASELINES
    front = {
        "base_model": base,
        "library_name": "reftune" if config.method in WEIGHT_METHODS else "peft",
        "pipeline_tag": "text-classification" if _is_classifier(config) else "text-generation",
        "tags": ["reft", config.method, "representation-finetuning", "reftune"]
        if is_reft
        else [config.method, "reftune"],
    }
    sources = config.data.train if isinstance(config.data.train, list) else [config.data.train]
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {config.name}",
        _about(config.method, base),
        "## Use",
        _usage(config, base),
        "## The adapter",
        _table(("setting", "value"), _settings(config, results)),
        "## Training",
        _table(("setting", "value"), _training(config, sources, results)),
    ]
    scores = _scores(results)
    if scores:
        header = ("task", "examples", "base", "adapter")
        sections += ["## Results", _table(header, scores)]
    return "\n\n".join(sections) + "\n"


def _about(method: str, base: str) -> str:
    if method in PEFT_METHODS:
        return f"A `{method}` adapter (PEFT) for `{base}`, trained by reftune's runner."
    if method in WEIGHT_METHODS:
        return f"Trained weights of `{base}`: {WEIGHT_METHODS[method]}. The others are not here."
    return (
        f"A representation finetuning (ReFT) adapter for `{base}`: it edits hidden states of "
        f"prompt tokens, the weights of the model stay as they are."
    )


def _is_classifier(config: RunConfig) -> bool:
    return config.task_type == "seq_cls"


def _usage(config: RunConfig, base: str) -> str:
    method, name = config.method, config.name
    if method in WEIGHT_METHODS:
        return f"""```python
from reftune.run import load_adapter

loaded = load_adapter("path/to/{name}")
loaded.model, loaded.tokenizer
```"""
    register = "" if method in PEFT_METHODS else "import reftune  # registers ReFT with PEFT\n"
    if _is_classifier(config):
        return f"""```python
{register}from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification

labels = AutoConfig.from_pretrained("path/to/{name}")
model = AutoModelForSequenceClassification.from_pretrained("{base}", config=labels)
model = PeftModel.from_pretrained(model, "path/to/{name}")
```"""
    return f"""```python
{register}from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "path/to/{name}")
```"""


def _settings(config: RunConfig, results: Mapping[str, Any]) -> list[tuple[str, str]]:
    if config.method in BASELINES:
        fields = config.adapter.model_dump()
        own = [(key, str(value)) for key, value in fields.items() if value not in (None, {}, [])]
    else:
        adapter = config.reft_config()
        own = [
            ("method", adapter.method),
            ("rank", str(adapter.r)),
            ("layers", str(adapter.layers)),
            ("positions", adapter.positions),
            ("tied", adapter.tied),
        ]
    return [
        *own,
        ("trainable parameters", f"{results['parameters']:,} ({results['percent']:.4f}%)"),
        ("and of the head", f"{results['head_parameters']:,}")
        if _is_classifier(config)
        else ("prompt template", config.data.template),
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
