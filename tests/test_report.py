"""Reports: averages and differences by hand-made runs, files without anything outside of them."""

import base64
import dataclasses
import json
import math
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from typer.testing import CliRunner

from reftune import figures
from reftune.errors import RunError
from reftune.figures import Point
from reftune.paper import TABLE_17, TABLES
from reftune.peft_json import method_comparison
from reftune.records import (
    average,
    average_error,
    compare,
    pareto,
    read,
    score,
    sign_test,
    standard_error,
)
from reftune.report import write_report
from reftune.samples import FORMAT, OverSeeds, Sample
from reftune.settings import parse_config
from reftune_cli import app

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")

TASKS = ("ARC-Easy", "boolq")


def make_run(
    directory: Path,
    method: str,
    seed: int,
    right: dict[str, list[int]],
    base: dict[str, list[int]],
    parameters: int = 1000,
    **adapter: Any,
) -> None:
    """Write what a run leaves behind: `right` says for each task which examples it got."""
    values = {
        "name": directory.name,
        "seed": seed,
        "output_dir": str(directory.parent),
        "adapter": {"method": method, **adapter},
        "data": {"train": "demo"},
        "evaluate": {"tasks": list(right)},
    }
    directory.mkdir(parents=True)
    config = parse_config(values, "test")
    (directory / "config.yaml").write_text(config.to_yaml())
    tasks = {}
    for task in right:
        scored = {"base": base[task], "adapter": right[task]}
        tasks[task] = {who: result(task, scores) for who, scores in scored.items()}
        for who, scores in scored.items():
            path = directory / "samples" / who / f"{task}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = [{"reftune_samples": FORMAT}, *map(dataclasses.asdict, samples(task, scores))]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = {
        "name": directory.name,
        "method": method,
        "seed": seed,
        "dtype": "bfloat16",
        "parameters": parameters,
        "percent": 100 * parameters / 1e6,
        "examples": 10,
        "train": {"loss": 1.0, "steps": 4, "seconds": 10.0 + seed, "tokens_per_second": 100.0},
        "tasks": tasks,
        "versions": {"reftune": "0"},
    }
    (directory / "results.json").write_text(json.dumps(results))
    log = [{"step": s, "loss": 2.0 / s, "learning_rate": 1e-3, "seconds": s} for s in (1, 2, 3, 4)]
    (directory / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))


def result(task: str, scores: list[int]) -> dict[str, Any]:
    error = statistics.stdev(scores) / math.sqrt(len(scores))
    return {
        "task": task,
        "metric": "accuracy",
        "value": statistics.fmean(scores),
        "stderr": error,
        "n": len(scores),
        "seconds": 1.0,
        "generated_tokens": 5,
    }


def samples(task: str, scores: list[int]) -> list[Sample]:
    return [
        Sample(
            i, "x:1", None, f"<b>{task}</b> | {i}\nnext", "gold", f"reply {i}", "r", s, 1, "stop", 0
        )
        for i, s in enumerate(scores)
    ]


BASE = {"ARC-Easy": [0, 0, 0, 1], "boolq": [1, 0, 1, 0]}
LOREFT = {
    1: {"ARC-Easy": [1, 1, 1, 1], "boolq": [1, 0, 0, 0]},
    2: {"ARC-Easy": [1, 1, 0, 0], "boolq": [1, 0, 1, 1]},
}
LORA = {"ARC-Easy": [1, 0, 0, 1], "boolq": [1, 1, 1, 0]}


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """Return the directory of an experiment: LoReFT with two seeds, LoRA with one, one failure."""
    folder = tmp_path / "exp"
    cells = []
    for name, seed, right, parameters in (
        ("loreft", 1, LOREFT[1], 500),
        ("loreft", 2, LOREFT[2], 500),
        ("lora", 1, LORA, 9000),
    ):
        make_run(folder / f"{name}-s{seed}", name, seed, right, BASE, parameters)
        cells.append((name, seed, "done", None))
    cells.append(("full", 1, "failed", "RuntimeError: out of memory"))
    rows = [
        {"cell": f"{n}-s{s}", "variant": n, "point": {}, "seed": s, "status": w, "error": e}
        for n, s, w, e in cells
    ]
    (folder / "cells.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


# --- numbers --------------------------------------------------------------------------------------


def test_scores_are_means_and_deviations_over_seeds_and_averages_are_taken_within_a_seed(
    experiment: Path,
) -> None:
    arms = read(experiment).arms
    assert list(arms) == ["loreft", "lora"]
    easy = score(arms["loreft"], "ARC-Easy")
    assert easy == (75.0, statistics.stdev([100, 50]), 2)
    mean = average(arms["loreft"], TASKS)
    per_seed = [(100 + 25) / 2, (50 + 75) / 2]
    assert mean == (62.5, statistics.stdev(per_seed), 2)
    lora = score(arms["lora"], "boolq")
    assert lora is not None
    assert (lora.mean, lora.sd, lora.n) == (75.0, None, 1)
    base = average(arms["loreft"], TASKS, "base")
    assert base is not None
    assert base.mean == 37.5


def test_the_error_of_an_average_over_tasks_is_that_of_independent_sets(experiment: Path) -> None:
    runs = read(experiment).arms["lora"]
    errors = [standard_error(runs, task) for task in TASKS]
    oracle = [100 * statistics.stdev(LORA[task]) / 2 for task in TASKS]
    assert errors == pytest.approx(oracle)
    found = average_error(runs, TASKS)
    assert found == pytest.approx(math.sqrt(sum(e**2 for e in oracle)) / 2)


def test_examples_won_and_lost_against_the_base_are_counted_by_their_mean_over_seeds(
    experiment: Path,
) -> None:
    found = compare(read(experiment).arms["loreft"], None, "ARC-Easy")
    assert found is not None
    d = found.difference
    # means over seeds: 1, 1, 0.5, 0.5 against 0, 0, 0, 1
    assert (d.wins, d.losses, d.n) == (3, 1, 4)
    assert d.mean == pytest.approx((1 + 1 + 0.5 - 0.5) / 4)
    assert found.p == pytest.approx(stats.binomtest(3, 4).pvalue)
    other = compare(read(experiment).arms["loreft"], read(experiment).arms["lora"], "boolq")
    assert other is not None
    # means over seeds: 1, 0, 0.5, 0.5 against 1, 1, 1, 0
    assert (other.difference.wins, other.difference.losses) == (1, 2)


@pytest.mark.parametrize(
    ("wins", "losses"), [(0, 0), (1, 0), (5, 5), (30, 12), (0, 40), (700, 610)]
)
def test_the_sign_test_is_scipys(wins: int, losses: int) -> None:
    n = wins + losses
    oracle = stats.binomtest(wins, n).pvalue if n else 1.0
    assert sign_test(wins, losses) == pytest.approx(oracle, rel=1e-9)
    assert sign_test(wins, losses) == sign_test(losses, wins)


def test_commonsense_is_also_scored_by_the_first_option_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run, "loreft", 1, {"piqa": [0, 1, 0, 0]}, {"piqa": [0, 0, 0, 0]})
    replies = [
        "the correct solution is solution2",  # right, but for the published code
        "the correct answer is solution2",
        "solution1, not solution2",
        "the correct answer is answer2",
    ]
    for who, texts in (("adapter", replies), ("base", ["What?"] * 4)):
        path = run / "samples" / who / "piqa.jsonl"
        head, *rows = map(json.loads, path.read_text().splitlines())
        rows = [
            r | {"completion": t, "gold": "solution2"} for r, t in zip(rows, texts, strict=True)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in (head, *rows)))
    page = write_report(run)[0].read_text()
    section = page.partition("## Commonsense by the first option named")[2].partition("\n## ")[0]
    assert "| run | 50.0 | 50.0 |" in section
    assert "| base | 0.0 | 0.0 |" in section
    # Not where both readings say the same.
    rows = [r | {"completion": "the correct answer is " + r["gold"]} for r in rows]
    results = json.loads((run / "results.json").read_text())
    for who in ("adapter", "base"):
        path = run / "samples" / who / "piqa.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in (head, *rows)))
        results["tasks"]["piqa"][who]["value"] = 1.0
    (run / "results.json").write_text(json.dumps(results))
    assert "first option named" not in write_report(run)[0].read_text()
    # Each set for itself: what one run lacks hides nothing of another.
    make_run(tmp_path / "two" / "a", "loreft", 1, {"boolq": [1, 1]}, {"boolq": [1, 1]})
    make_run(tmp_path / "two" / "b", "loreft", 1, {"piqa": [1, 1]}, {"piqa": [1, 1]})
    assert "first option named" in write_report(tmp_path / "two")[0].read_text()
    make_run(tmp_path / "other", "loreft", 1, {"demo": [0, 1]}, {"demo": [0, 0]})
    assert "first option named" not in write_report(tmp_path / "other")[0].read_text()


def test_samples_beyond_a_smaller_limit_are_left_out(tmp_path: Path) -> None:
    right = {"boolq": [1, 0, 1, 1]}
    make_run(tmp_path / "run", "loreft", 1, right, {"boolq": BASE["boolq"]})
    path = tmp_path / "run" / "results.json"
    results = json.loads(path.read_text())
    results["tasks"]["boolq"]["adapter"]["n"] = 2
    path.write_text(json.dumps(results))
    (run,) = read(tmp_path / "run").runs
    assert [s.index for s in run.samples("adapter", "boolq")] == [0, 1]
    assert len(run.samples("base", "boolq")) == 4


def test_the_pareto_front_is_what_nothing_beats_in_both() -> None:
    points = {"a": (1, 30.0), "b": (2, 50.0), "c": (3, 40.0), "d": (4, 60.0), "e": (4, 55.0)}
    front = pareto(points)
    assert front == ["a", "b", "d"]
    for name, (cost, value) in points.items():
        beaten = any(c <= cost and v > value for c, v in points.values())
        assert (name not in front) == beaten


def test_the_papers_rows_are_consistent_with_their_averages() -> None:
    """A digit typed wrongly moves the mean of a row away from the average the paper prints."""
    for table in TABLES:
        for method, row in table.scores.items():
            own = statistics.fmean(v for task, v in row.items() if task != "average")
            assert own == pytest.approx(row["average"], abs=0.11), (table.source, method)
    arithmetic = [t for t in TABLES if t.source == "Table 2"]
    for method in ("direft", "loreft"):
        by_model = {t.model: t.scores[method]["average"] for t in arithmetic}
        formula = TABLE_17[method]
        assert by_model == {"LLaMA-7B": formula.llama_7b, "LLaMA-13B": formula.llama_13b}


# --- files ----------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Collect a page's tags, its text, and what it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "action")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_whole_well_formed_and_loads_nothing(experiment: Path) -> None:
    _, path = write_report(experiment)
    text = path.read_text()
    page = Page(text)
    assert page.open == []
    pictures = [src for src in page.loads if src.startswith("data:image/png;base64,")]
    assert len(pictures) == 3
    assert all(base64.b64decode(p.partition(",")[2])[:4] == b"\x89PNG" for p in pictures)
    assert all(src.startswith(("data:", "#")) for src in page.loads)
    assert "url(" not in text
    assert "@import" not in text
    assert "<b>ARC-Easy</b>" not in text, "a model's text is not markup"
    shown = " ".join(page.text)
    for said in ("75.0 ± 35.4", "62.5", "<b>ARC-Easy</b>", "out of memory", "Beside the paper"):
        assert said in shown, said


def test_the_markdown_has_the_same_numbers_and_its_pictures_beside_it(
    experiment: Path, tmp_path: Path
) -> None:
    path, _ = write_report(experiment, tmp_path / "out")
    text = path.read_text()
    links = re.findall(r"\]\((.+?)\)", text)
    assert sorted(links) == [
        "report/loss.png",
        "report/score-parameters.png",
        "report/score-seconds.png",
    ]
    assert all((path.parent / link).read_bytes()[:4] == b"\x89PNG" for link in links)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert any(
        r.startswith("| loreft | 500 | 0.0500 | **75.0 ± 35.4** | 50.0 ± 35.4 |") for r in rows
    )
    assert "**75.0**" in text, "LoRA is best on boolq"
    assert "training, seconds" in text
    for results in experiment.glob("*/results.json"):
        values = json.loads(results.read_text())
        values["train"]["cpu_seconds"] = 3.0
        results.write_text(json.dumps(values))
    assert "| training, s | tokens/s | seeds |" in text
    text_cpu = write_report(experiment, tmp_path / "cpu")[0].read_text()
    assert "training, CPU-seconds" in text_cpu
    assert "| training, s | CPU-s | tokens/s | seeds |" in text_cpu
    assert "| 12 | 3 | 100 | 2 |" in text_cpu
    assert "| 37.5 | – | – | – | – |" in text_cpu
    assert any(r.startswith("| base | 0 | 0 | 25.0 | 50.0 | 37.5 |") for r in rows)
    assert "| loreft | 0.050 / 0.031 | 75.0 / 83.2 | 50.0 / 69.3 |" in text
    for block in re.split(r"\n\n", text):
        table = [line for line in block.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table}) <= 1, block
    assert not list((tmp_path / "out").rglob(".*"))
    assert not (experiment / "report.md").exists()


def test_a_single_run_has_a_report_and_an_empty_folder_says_what_to_give(
    experiment: Path, tmp_path: Path
) -> None:
    markdown, _ = write_report(experiment / "lora-s1")
    text = markdown.read_text()
    assert "# lora-s1" in text
    assert "Against the base model" in text
    with pytest.raises(RunError, match=r"no finished run.*experiment"):
        write_report(tmp_path / "nowhere")


def test_arms_are_compared_with_the_lora_of_their_rank_and_with_the_largest(tmp_path: Path) -> None:
    right = {"boolq": [1, 1, 0, 0]}
    for name, rank, parameters in (
        *(("lora", 1, 100), ("lora", 4, 400), ("lora", 8, 800)),
        *(("loreft", 1, 10), ("loreft", 2, 20), ("loreft", 4, 40)),
    ):
        folder = tmp_path / f"{name}-r{rank}"
        make_run(folder, name, 1, right, {"boolq": BASE["boolq"]}, parameters, r=rank)
    make_run(tmp_path / "ln_tuning", "ln_tuning", 1, right, {"boolq": BASE["boolq"]})
    all_arms = set(read(tmp_path).arms)
    assert len(all_arms) == 7
    text = write_report(tmp_path)[0].read_text()
    found = {}
    for section in text.split("## Against ")[1:]:
        name, _, rest = section.partition("\n")
        rows = rest.partition("\n## ")[0]
        found[name] = set(re.findall(r"^\| (\S+) \| boolq \|", rows, re.MULTILINE))
    assert found == {
        "the base model": all_arms,
        "lora-r1": {"loreft-r1"},
        "lora-r4": {"loreft-r4"},
        "lora-r8": all_arms - {"lora-r8"},
    }


def test_the_order_of_the_interventions_is_shown_beside_the_papers(tmp_path: Path) -> None:
    for number, method in enumerate(("lobireft", "consreft", "loreft")):
        right = {"ARC-Easy": [1] * (number + 1) + [0] * (3 - number)}
        make_run(tmp_path / method, method, 1, right, {"ARC-Easy": BASE["ARC-Easy"]})
    right = {"ARC-Easy": [0, 0, 0, 0]}
    make_run(tmp_path / "loreft-r1", "loreft", 1, right, {"ARC-Easy": BASE["ARC-Easy"]}, r=1)
    text = write_report(tmp_path)[0].read_text()
    assert "| loreft-r1 | h + Rᵀ(Wh + b − Rh) | 0.0 | 4 | 42.6 | 49.6 | 1 |" in text
    assert "| loreft | h + Rᵀ(Wh + b − Rh) | 75.0 | 1 | 42.6 | 49.6 | 1 |" in text
    assert "| lobireft | h + Rᵀb | 25.0 | 3 | 31.3 | 39.5 | 3 |" in text


def test_dora_is_not_taken_for_lora(tmp_path: Path) -> None:
    right = {"ARC-Easy": [1, 1, 0, 0]}
    make_run(tmp_path / "d", "lora", 1, right, {"ARC-Easy": BASE["ARC-Easy"]}, use_dora=True)
    assert "50.0 / 81.4" in write_report(tmp_path / "d")[0].read_text()


# --- PEFT's method comparison ---------------------------------------------------------------------

# What method_comparison/processing.py of huggingface/peft reads, and `log_results` writes.
SCHEMA: dict[str, Any] = {
    "run_info": {
        "created_at": str, "total_time": float, "experiment_name": str, "peft_branch": str,
        "peft_worktree_is_dirty": bool, "train_config": dict, "peft_config": dict,
        "error_msg": str,
    },
    "train_info": {
        "accelerator_memory_reserved_avg": int, "accelerator_memory_max": int,
        "accelerator_memory_reserved_99th": int, "train_time": float, "file_size": int,
        "num_trainable_params": int, "num_total_params": int, "status": str, "metrics": list,
    },
    "meta_info": {
        "model_info": dict, "dataset_info": dict, "package_info": dict, "system_info": dict,
        "pytorch_info": str,
    },
}  # fmt: skip
TRAIN_CONFIG = {
    "model_id", "dtype", "max_seq_length", "batch_size", "batch_size_eval", "max_steps",
    "eval_steps", "compile", "use_gc", "query_template", "seed", "grad_norm_clip",
    "optimizer_type", "optimizer_kwargs", "lr_scheduler", "use_amp", "autocast_adapter_dtype",
    "generation_kwargs", "attn_implementation", "init_kv_cache_prefix",
}  # fmt: skip


def is_valid(train_config: dict[str, Any]) -> bool:
    """Return whether the suite's `TrainConfig` takes it: the rules of its `__post_init__`."""
    c, optimizers = train_config, {n for n in dir(torch.optim) if n[0].isupper()}
    return (
        isinstance(c["model_id"], str)
        and c["dtype"] in {"float32", "float16", "bfloat16", "int8", "int4"}
        and min(c["batch_size"], c["batch_size_eval"], c["max_steps"], c["eval_steps"]) > 0
        and min(c["max_seq_length"], c["grad_norm_clip"]) >= 0
        and c["eval_steps"] <= c["max_steps"]
        and c["optimizer_type"] in optimizers | {"lora+", "lora-fa", "riemannian"}
        and c["lr_scheduler"] in {None, "cosine"}
        and "{query}" in c["query_template"]
    )


def test_a_run_is_exported_in_the_schema_of_pefts_comparison(experiment: Path) -> None:
    adapter = experiment / "loreft-s1" / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "REFT", "r": 8}')
    (adapter / "adapter_model.safetensors").write_bytes(b"x" * 123)
    entry = method_comparison(read(experiment).runs[0])
    assert json.loads(json.dumps(entry)) == entry
    assert set(entry) == set(SCHEMA)
    for part, keys in SCHEMA.items():
        assert set(entry[part]) == set(keys)
        for key, kind in keys.items():
            assert isinstance(entry[part][key], kind), (part, key)
    trained = entry["run_info"]["train_config"]
    assert set(trained) == TRAIN_CONFIG
    assert is_valid(trained), "of a run that is given by epochs, in dtype auto"
    assert (trained["max_steps"], trained["eval_steps"], trained["dtype"]) == (4, 4, "bfloat16")
    assert {row["lr"] for row in entry["train_info"]["metrics"][:-1]} == {1e-3}
    info = entry["train_info"]
    assert (info["file_size"], info["num_trainable_params"]) == (123, 500)
    assert info["num_total_params"] == 1_000_500
    last = info["metrics"][-1]
    assert last["test accuracy"] == pytest.approx(0.625)
    assert last["train loss"] == pytest.approx(statistics.fmean([2, 1, 2 / 3, 0.5]))
    assert {"train loss", "train samples", "train total tokens"} <= set(last)
    assert entry["run_info"]["peft_config"]["peft_type"] == "REFT"
    log = [{"step": 1, "loss": 8.0, "learning_rate": 1e-3}]
    log += [{"step": 4, "loss": 2.0, "learning_rate": 1e-3}]  # the mean of three steps
    path = experiment / "loreft-s1" / "log.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in log))
    last = method_comparison(read(experiment).runs[0])["train_info"]["metrics"][-1]
    assert last["train loss"] == pytest.approx((8 + 3 * 2) / 4)


@pytest.mark.parametrize(
    ("changes", "key", "expected"),
    [
        ({"quantization": "bnb-4bit"}, "dtype", "int4"),
        ({"quantization": "torchao-int8"}, "dtype", "int8"),
        ({"dtype": "float32"}, "dtype", "bfloat16"),
        ({"schedule": "linear"}, "lr_scheduler", None),
        ({"schedule": "cosine"}, "lr_scheduler", "cosine"),
        ({"optimizer": "adamw_torch_fused"}, "optimizer_type", "AdamW"),
        ({"optimizer": "sgd"}, "optimizer_type", "SGD"),
        ({"compile": True}, "compile", False),
    ],
)
def test_an_entrys_settings_are_the_suites_names_for_what_was_done(
    changes: dict[str, Any], key: str, expected: Any, tmp_path: Path
) -> None:
    make_run(tmp_path / "run", "loreft", 1, LORA, BASE)
    record = read(tmp_path / "run").runs[0]
    top = {k: v for k, v in changes.items() if k in record.config}
    train = record.config["train"] | {k: v for k, v in changes.items() if k not in top}
    record = dataclasses.replace(record, config={**record.config, **top, "train": train})
    trained = method_comparison(record)["run_info"]["train_config"]
    assert is_valid(trained)
    assert trained[key] == expected


def test_what_the_suite_cannot_hold_is_not_exported_as_something_else(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "loreft", 1, LORA, BASE)
    record = read(tmp_path / "run").runs[0]
    train = record.config["train"] | {"optimizer": "galore"}
    with pytest.raises(RunError, match="trained by galore"):
        method_comparison(dataclasses.replace(record, config={**record.config, "train": train}))
    earlier = {k: v for k, v in record.results.items() if k != "dtype"}
    with pytest.raises(RunError, match="dtype: auto"):
        method_comparison(dataclasses.replace(record, results=earlier))
    config = {**record.config, "dtype": "float16"}
    entry = method_comparison(dataclasses.replace(record, config=config, results=earlier))
    assert entry["run_info"]["train_config"]["dtype"] == "float16"


def test_an_entry_says_what_the_run_was_made_with_and_not_who_exports_it(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "loreft", 1, LORA, BASE)
    path = tmp_path / "run" / "results.json"
    results = json.loads(path.read_text())
    results["versions"] = {"torch": "9.9", "peft": "8.8"}
    results["system"] = {"accelerator": "a large one"}
    results["train"]["accelerator_memory"] = {"reserved_avg": 1, "reserved_99th": 2, "max": 3}
    path.write_text(json.dumps(results))
    entry = method_comparison(read(tmp_path / "run").runs[0])
    packages = entry["meta_info"]["package_info"]
    assert (packages["torch-version"], packages["peft-version"]) == ("9.9", "8.8")
    assert packages["transformers-version"] is None
    assert entry["meta_info"]["system_info"] == {"accelerator": "a large one"}
    memory = [entry["train_info"][f"accelerator_memory_{k}"] for k in ("reserved_avg", "max")]
    assert memory == [1, 3]


def test_a_run_without_an_accuracy_is_not_exported_as_one(tmp_path: Path) -> None:
    make_run(tmp_path / "e" / "good", "loreft", 1, LORA, BASE)
    make_run(tmp_path / "e" / "none", "loreft", 1, {}, {})
    make_run(tmp_path / "e" / "chat", "loreft", 1, {"boolq": [1, 1]}, {"boolq": [1, 1]})
    path = tmp_path / "e" / "chat" / "results.json"
    path.write_text(path.read_text().replace('"accuracy"', '"answered"'))
    target = tmp_path / "entries"
    result = CliRunner().invoke(
        app, ["report", str(tmp_path / "e"), "--peft-json", str(target)], env={"COLUMNS": "200"}
    )
    assert result.exit_code == 0, result.output
    assert [p.name for p in target.iterdir()] == ["loreft--good.json"]
    assert result.output.count("Not exported") == 2


@pytest.mark.parametrize(("method", "found"), [("full", None), ("bitfit", {"peft_type": "BITFIT"})])
def test_bitfit_is_no_full_finetuning(
    method: str, found: dict[str, str] | None, tmp_path: Path
) -> None:
    make_run(tmp_path / method, method, 1, LORA, BASE)
    assert method_comparison(read(tmp_path / method).runs[0])["run_info"]["peft_config"] == found


def test_trained_weights_of_the_base_are_counted_once(tmp_path: Path) -> None:
    make_run(tmp_path / "full", "full", 1, LORA, BASE, 1_000_000)
    info = method_comparison(read(tmp_path / "full").runs[0])["train_info"]
    assert (info["num_trainable_params"], info["num_total_params"]) == (1_000_000, 1_000_000)


def test_what_costs_nothing_is_in_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(figures, "_png", lambda figure: (drawn.append(figure), b"")[1])
    score = OverSeeds(50.0, None, 1)
    costs = {"head": 0.0, "loreft": 500.0, "full": 1e7}
    for names in (costs, ["loreft", "full"]):
        points = {name: Point(costs[name], score, name) for name in names}
        figures.against_cost(points, "parameters", None, "score")
        left, right = drawn[-1].axes[0].get_xlim()
        assert all(left < costs[name] < right for name in names)
    assert [figure.axes[0].get_xscale() for figure in drawn] == ["symlog", "log"]


def test_labels_are_as_short_as_tells_the_arms_apart() -> None:
    arms = ["lora-r4-alpha8", "lora-r8-alpha16"]
    assert figures.shortest_labels(arms, "lora") == ["r4", "r8"]
    assert figures.shortest_labels(["x-r4-lr1", "x-r4-lr2"], "x") == ["r4-lr1", "r4-lr2"]
    assert figures.shortest_labels(["base", "base-r2"], "base") == ["", "r2"]
    assert figures.shortest_labels([], "x") == []


@pytest.mark.parametrize(("base", "is_line"), [(13.3, False), (80.0, True)])
def test_a_base_that_is_far_off_does_not_squeeze_the_picture(
    monkeypatch: pytest.MonkeyPatch, base: float, is_line: bool
) -> None:
    drawn = []
    monkeypatch.setattr(figures, "_png", lambda figure: (drawn.append(figure), b"")[1])
    scores = {"a": 84.0, "b": 87.0}
    points = {n: Point(1.0 + s, OverSeeds(s, None, 1), n) for n, s in scores.items()}
    figures.against_cost(points, "seconds", ("base model", base), "score")
    axes = drawn[0].axes[0]
    low, high = axes.get_ylim()
    assert bool(low < base < high) == is_line
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert ("base model" if is_line else "base model: 13.3") in labels


def test_the_verb_writes_report_and_export(experiment: Path, tmp_path: Path) -> None:
    target = tmp_path / "entries"
    result = CliRunner().invoke(
        app, ["report", str(experiment), "--peft-json", str(target)], env={"COLUMNS": "200"}
    )
    assert result.exit_code == 0, result.output
    assert "report.html" in result.output
    assert sorted(p.name for p in target.iterdir()) == [
        *(f"lora--{experiment.name}-lora-s1.json",),
        *(f"loreft--{experiment.name}-loreft-s{seed}.json" for seed in (1, 2)),
    ]
    result = CliRunner().invoke(app, ["report", str(tmp_path / "nowhere")])
    assert result.exit_code == 1
    assert "no finished run" in result.output


def test_the_experiments_for_pefts_suite_are_configs_that_peft_reads() -> None:
    import peft

    from reftune.config import ReftConfig

    folder = Path(__file__).parent.parent / "benchmarks" / "peft_method_comparison"
    configs = sorted(folder.glob("experiments/reft/*/adapter_config.json"))
    assert configs
    for path in configs:
        config = peft.PeftConfig.from_pretrained(str(path.parent))
        assert isinstance(config, ReftConfig)
        training = path.with_name("training_params.json")
        given = json.loads(training.read_text()) if training.exists() else {}
        assert set(given) <= TRAIN_CONFIG


def test_replies_that_nothing_judges_are_shown_to_be_read(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "loreft", 1, {"boolq": [1] * 30}, {"boolq": [1] * 30})
    judged = write_report(tmp_path / "a")[0].read_text().partition("## Generations")[2]
    assert "The first 4 examples of boolq; each arm" in judged
    path = tmp_path / "a" / "results.json"
    path.write_text(path.read_text().replace('"accuracy"', '"answered"'))
    read = write_report(tmp_path / "a")[0].read_text().partition("## Generations")[2]
    assert "The first 20 examples of boolq; each arm" in read
    assert judged.count("✓") == 8
    assert read.count("✓") == 0
