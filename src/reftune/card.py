"""The model card of an adapter: what it is, what it scored, how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from reftune.data import source_name
from reftune.hub import is_hub_name, split_revision
from reftune.methods import BASELINES, PEFT_METHODS, WEIGHT_METHODS
from reftune.settings import RunConfig
from reftune.tasks import TASKS
from reftune.tasks.glue import GLUE, HUB
from reftune.tasks.hub import SETS


def model_card(
    config: RunConfig,
    base: str,
    results: Mapping[str, Any],
    *,
    revision: str | None = None,
    where: str | None = None,
) -> str:
    """Return the README.md of an adapter's directory, with the Hub's metadata on top.

    `revision` is the base model's, where it is known; `where` the adapter's name on the Hub.
    """
    where = where or f"path/to/{config.name}"
    sections = [
        f"---\n{_metadata(config, base, results)}\n---",
        f"# {config.name}",
        _about(config.method, base),
        "## Use",
        _usage(config, base, revision, where),
        "## The adapter",
        _table(("setting", "value"), _settings(config, results, base, revision)),
        "## Training",
        _table(("setting", "value"), _training(config, results)),
    ]
    scores = _scores(results)
    if scores:
        header = ("task", "examples", "base", "adapter")
        sections += ["## Results", _table(header, scores)]
    return "\n\n".join(sections) + "\n"


def _metadata(config: RunConfig, base: str, results: Mapping[str, Any]) -> str:
    """Return the YAML that the Hub reads; a directory of this machine is not named there."""
    is_reft = config.method not in BASELINES
    return ModelCardData(
        base_model=base if is_hub_name(base) else None,
        base_model_relation="finetune" if config.method in WEIGHT_METHODS else "adapter",
        library_name="reftune" if config.method in WEIGHT_METHODS else "peft",
        pipeline_tag=_pipeline(config),
        tags=["reft", config.method, "representation-finetuning", "reftune"]
        if is_reft
        else [config.method, "reftune"],
        datasets=_hub_data(config) or None,
        model_name=config.name,
        eval_results=_eval_results(config, results) or None,
    ).to_yaml()


def _pipeline(config: RunConfig) -> str:
    return "text-classification" if _is_classifier(config) else "text-generation"


def _hub_data(config: RunConfig) -> list[str]:
    """Return the data sets of the Hub that were trained on."""
    found = []
    for source in _sources(config):
        name = split_revision(source.partition(":")[0])[0]
        if source in TASKS or _is_classifier(config):
            if config.data.data_dir in (None, "hub"):
                found.append(_task_data(config, source)[0])
        elif is_hub_name(name) and source_name(source) == source:
            found.append(name)
    return list(dict.fromkeys(name for name in found if is_hub_name(name)))


def _task_data(config: RunConfig, task: str) -> tuple[str, str | None]:
    """Return which set of the Hub, and which of its configs, a task is made of; else its name."""
    if _is_classifier(config) and task in GLUE:
        return HUB, task
    known = SETS.get(task)
    return (known.path, known.config or None) if known else (task, None)


def _eval_results(config: RunConfig, results: Mapping[str, Any]) -> list[EvalResult]:
    found = []
    for task, scores in results.get("tasks", {}).items():
        score = scores["adapter"]
        path, name = _task_data(config, task)
        found.append(
            EvalResult(
                task_type=_pipeline(config),
                dataset_type=path,
                dataset_name=task,
                dataset_config=name,
                dataset_split=_split(config, task),
                metric_type=score["metric"],
                metric_value=round(float(score["value"]), 6),
            )
        )
    return found


def _split(config: RunConfig, task: str) -> str | None:
    """Return what the Hub calls the split that was scored, where a whole split of it was."""
    if _is_classifier(config) or config.evaluate.split != "test":
        return None
    return SETS[task].splits.get("test") if task in SETS else None


def _sources(config: RunConfig) -> list[str]:
    train = config.data.train
    return list(train) if isinstance(train, list) else [train]


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


def _usage(config: RunConfig, base: str, revision: str | None, where: str) -> str:
    method = config.method
    if method in WEIGHT_METHODS:
        return f"""```python
from reftune.run import load_adapter

loaded = load_adapter("{where}")
loaded.model, loaded.tokenizer
```"""
    register = "" if method in PEFT_METHODS else "import reftune  # registers ReFT with PEFT\n"
    pinned = f', revision="{revision}"' if revision else ""
    if _is_classifier(config):
        return f"""```python
{register}from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification

labels = AutoConfig.from_pretrained("{where}")
model = AutoModelForSequenceClassification.from_pretrained("{base}", config=labels{pinned})
model = PeftModel.from_pretrained(model, "{where}")
```"""
    if config.quantization is not None:
        return f"""```python
from reftune.run import load_adapter

loaded = load_adapter("{where}", quantization="{config.quantization}")
loaded.model, loaded.tokenizer
```"""
    return f"""```python
{register}from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}"{pinned})
model = PeftModel.from_pretrained(model, "{where}")
```"""


def _settings(
    config: RunConfig, results: Mapping[str, Any], base: str, revision: str | None
) -> list[tuple[str, str]]:
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
        ("base model", f"`{base}`" + (f" at `{revision}`" if revision else "")),
        *own,
        ("trainable parameters", f"{results['parameters']:,} ({results['percent']:.4f}%)"),
        ("and of the head", f"{results['head_parameters']:,}")
        if _is_classifier(config)
        else ("prompt template", config.data.template),
    ]


def _training(config: RunConfig, results: Mapping[str, Any]) -> list[tuple[str, str]]:
    t, trained = config.train, results["train"]
    rows = [
        ("data", ", ".join(map(source_name, _sources(config)))),
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
