"""Several adapters in one pass, decided completions, and results over seeds."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from typer.testing import CliRunner

import reftune
from adapted_tiny import config, strong
from reftune import evaluate
from reftune.decoding import fingerprint, fingerprint_of
from reftune.errors import ReftConfigError, RunError
from reftune.evaluate import (
    Decides,
    Result,
    Sample,
    read_samples,
    run,
    run_adapters,
    run_all,
)
from reftune.generate import HFEngine, Sampling
from reftune.tasks import Task, get_task
from reftune_cli import app
from runs import tiny_model_directory
from test_evaluate import TOKENIZER, timeless, write_set
from tiny import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

N = 6
WHOS = {"base": None, "one": "one", "two": "two"}


class KilledError(Exception):
    """The evaluation's process was killed."""


def kill_after(n: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done >= n:
            raise KilledError

    return progress


def adapted(*names: str) -> PeftModel:
    """Return a tiny model with adapters: an adapter's name decides its weights."""
    settings = {"one": config(positions="f2+l3"), "two": config("direft", positions="all")}
    torch.manual_seed(len(names[0]))
    model = get_peft_model(tiny_llama(), settings[names[0]], names[0])
    for name in names[1:]:
        model.add_adapter(name, settings[name])
    for name in names:
        for layer in (m for m in model.modules() if hasattr(m, "reft_phi")):
            if name in layer.reft_phi:
                one = strong_phi(layer.reft_phi[name], seed=sum(map(ord, name)))
                layer.reft_phi[name] = one
    return model.eval()


def strong_phi(phi: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in phi.named_parameters():
            if name != "R" or not phi.orthonormal:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return phi


@pytest.fixture
def task(tmp_path: Path) -> Task:
    write_set(tmp_path / "data", "boolq", "test", N)
    return get_task("boolq", tmp_path / "data")


def paths(folder: Path, *whos: str) -> dict[str, Path]:
    return {who: folder / f"{who}.jsonl" for who in whos or WHOS}


def without_time(results: dict[str, Result]) -> dict[str, Result]:
    return {who: dataclasses.replace(r, seconds=0.0) for who, r in results.items()}


def one_by_one(task: Task, folder: Path) -> dict[str, list[Sample]]:
    """Return the samples of each adapter, evaluated alone."""
    model = adapted("one", "two")
    engine = HFEngine(model, TOKENIZER, 4)
    for name in ("one", "two"):
        model.set_adapter(name)
        run(task, engine, samples_path=folder / name)
    with model.disable_adapter():
        run(task, engine, samples_path=folder / "base")
    return {who: read_samples(folder / who) for who in WHOS}


def test_adapters_in_one_pass_have_the_results_of_each_alone(task, tmp_path):
    alone = one_by_one(task, tmp_path / "alone")
    engine = HFEngine(adapted("one", "two"), TOKENIZER, 4)
    found = run_adapters(task, engine, WHOS, samples=paths(tmp_path))
    assert list(found) == list(WHOS)
    for who, name in WHOS.items():
        samples = timeless(read_samples(tmp_path / f"{who}.jsonl"))
        assert {s.adapter for s in samples} == {name}
        assert [dataclasses.replace(s, adapter=None) for s in samples] == timeless(alone[who])
        assert found[who].n == N
        assert found[who].generated_tokens == sum(s.tokens for s in samples)
    assert len({tuple(s.completion for s in alone[who]) for who in WHOS}) == 3
    assert without_time(run_adapters(task, engine, WHOS)) == without_time(found), "without files"


@pytest.mark.parametrize("torn", [b"", b'{"index": 1, "whe'])
@pytest.mark.parametrize("killed_after", [1, 7, 3 * N])
def test_a_killed_pass_goes_on_where_it_was(task, tmp_path, killed_after, torn):
    engine = HFEngine(adapted("one", "two"), TOKENIZER, 4)
    whole = run_adapters(task, engine, WHOS, samples=paths(tmp_path / "whole"))
    with pytest.raises(KilledError):
        run_adapters(
            task, engine, WHOS, samples=paths(tmp_path / "k"), progress=kill_after(killed_after)
        )
    with (tmp_path / "k" / "two.jsonl").open("ab") as file:
        file.write(torn)
    heard: list[tuple[int, int]] = []
    resumed = run_adapters(
        task, engine, WHOS, samples=paths(tmp_path / "k"), progress=lambda *a: heard.append(a)
    )
    assert heard == [(done, 3 * N) for done in range(killed_after + 1, 3 * N + 1)]
    assert without_time(resumed) == without_time(whole)
    for who in WHOS:
        ours, theirs = (read_samples(tmp_path / f / f"{who}.jsonl") for f in ("k", "whole"))
        assert timeless(ours) == timeless(theirs)


def test_what_else_is_loaded_does_not_matter_for_what_is_there(task, tmp_path):
    engine = HFEngine(adapted("one"), TOKENIZER, 4)
    first = run_adapters(
        task, engine, {"base": None, "one": "one"}, samples=paths(tmp_path, "base", "one")
    )
    before = {who: (tmp_path / f"{who}.jsonl").read_bytes() for who in first}
    more = HFEngine(adapted("one", "two"), TOKENIZER, 4)
    found = run_adapters(task, more, WHOS, samples=paths(tmp_path))
    assert {who: found[who] for who in first} == first
    assert {who: (tmp_path / f"{who}.jsonl").read_bytes() for who in first} == before
    other = adapted("one", "two")
    strong(other, seed=9)
    with pytest.raises(RunError, match="belongs to another evaluation"):
        run_adapters(task, HFEngine(other, TOKENIZER), WHOS, samples=paths(tmp_path))


def test_the_identity_of_an_adapter_is_that_of_its_weights_and_its_base():
    model = adapted("one", "two")
    base, one, two = (fingerprint_of(model, name) for name in (None, "one", "two"))
    assert len({base, one, two}) == 3
    assert fingerprint_of(adapted("one"), "one") == one
    assert fingerprint_of(adapted("one"), None) == base
    assert fingerprint_of(tiny_llama(), None).split("=")[0] == base.split("base=")[0] + "weights"
    lora = get_peft_model(tiny_llama(), LoraConfig(r=2, init_lora_weights=False), "one")
    assert fingerprint_of(lora, None) != fingerprint_of(lora, "one")
    assert fingerprint_of(lora, None).startswith(base.split(" ")[0])


def test_strength_and_order_are_of_an_adapters_identity(tmp_path, task):
    model = adapted("one", "two")
    plain = fingerprint(model), fingerprint_of(model, "one"), fingerprint_of(model, "two")
    reftune.set_strength(model, 0.5, "one")
    assert fingerprint(model) != plain[0]
    assert fingerprint_of(model, "one") == f"{plain[1]} strength=0.5"
    assert fingerprint_of(model, "two") == plain[2]
    reftune.set_strength(model, 1.0)
    with reftune.options(strength=-1):
        assert fingerprint_of(model, "two") == f"{plain[2]} strength=-1"
    model.base_model.set_adapter(["one", "two"])
    in_order = fingerprint(model)
    reftune.set_composition(model, "sum")
    assert "composition=sum" in fingerprint(model)
    reftune.set_composition(model, "in_order")
    assert fingerprint(model) == in_order
    engine, path = HFEngine(model, TOKENIZER, 4), tmp_path / "samples.jsonl"
    run(task, engine, samples_path=path)
    reftune.set_strength(model, 0.5)
    with pytest.raises(RunError, match="belongs to another evaluation"):
        run(task, engine, samples_path=path)


def test_the_time_of_a_pass_is_shared_equally(task, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: float(next(clock)))
    found = run_adapters(task, HFEngine(adapted("one", "two"), TOKENIZER, 4), WHOS)
    seconds = [result.seconds for result in found.values()]
    assert sum(seconds) == pytest.approx(len(WHOS) * N, abs=2)  # a tick for each sample
    assert max(seconds) - min(seconds) <= 3


def test_an_adapter_that_is_not_there_is_named(task):
    engine = HFEngine(adapted("one"), TOKENIZER)
    with pytest.raises(ReftConfigError, match="no adapter 'onne'.*Did you mean 'one'"):
        run_adapters(task, engine, {"onne": "onne"})
    with pytest.raises(ReftConfigError, match="limit=0"):
        run_adapters(task, engine, {"one": "one"}, limit=0)


def test_all_tasks_with_all_adapters(task, tmp_path):
    write_set(tmp_path / "data", "piqa", "test", 3)
    both = [task, get_task("piqa", tmp_path / "data")]
    engine = HFEngine(adapted("one", "two"), TOKENIZER, 4)
    heard: list[str] = []
    results = run_all(
        both,
        engine,
        base=True,
        samples=tmp_path / "samples",
        progress=lambda what, done, total: heard.append(f"{what} {done}/{total}"),
        adapters=["one", "two"],
    )
    assert {name: list(scores) for name, scores in results.items()} == {
        "boolq": ["base", "one", "two"],
        "piqa": ["base", "one", "two"],
    }
    assert len(read_samples(tmp_path / "samples" / "two" / "piqa.jsonl")) == 3
    assert heard[-1] == "piqa 9/9"
    without = run_all(
        both[:1],
        engine,
        base=False,
        samples=None,
        progress=lambda *a: None,
        adapters=["two"],
    )
    assert without["boolq"]["two"]["value"] == results["boolq"]["two"]["value"]
    with pytest.raises(ReftConfigError, match="'base'"):
        run_all(both, engine, base=True, samples=None, progress=lambda *a: None, adapters=["base"])


def test_the_command_line_evaluates_several_adapters(tmp_path):
    write_set(tmp_path / "data", "boolq", "test", N)
    base = str(tiny_model_directory(tmp_path))
    model = adapted("one", "two")
    for name, adapter in model.peft_config.items():
        adapter.base_model_name_or_path = base
        model.save_pretrained(str(tmp_path), selected_adapters=[name], save_embedding_layers=False)
    arguments = ["--tasks", "boolq", "--data-dir", str(tmp_path / "data"), "--dtype", "float32"]
    command = ["evaluate", str(tmp_path / "one"), str(tmp_path / "two"), *arguments]
    found = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out")])
    assert found.exit_code == 0, found.output
    heads = [line.split() for line in found.output.splitlines() if line.split()[:1] == ["task"]]
    assert heads == [["task", "examples", "base", "one", "two"]]
    results = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]["boolq"]
    engine = HFEngine(adapted("one", "two"), TOKENIZER)
    get = get_task("boolq", tmp_path / "data")
    for who, expected in run_adapters(get, engine, WHOS).items():
        assert results[who]["generated_tokens"] == expected.generated_tokens

    other = json.loads((tmp_path / "two" / "adapter_config.json").read_text())
    other["base_model_name_or_path"] = "elsewhere"
    (tmp_path / "two" / "adapter_config.json").write_text(json.dumps(other))
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 1
    assert "one base model" in found.output


def test_a_folder_keeps_its_other_tasks_and_adapters_and_the_base_is_evaluated_once(tmp_path):
    for name, n in (("boolq", N), ("piqa", 3)):
        write_set(tmp_path / "data", name, "test", n)
    model = adapted("one", "two")
    for name, adapter in model.peft_config.items():
        adapter.base_model_name_or_path = str(tiny_model_directory(tmp_path))
        model.save_pretrained(str(tmp_path), selected_adapters=[name], save_embedding_layers=False)
    out = tmp_path / "out"

    def evaluated(adapter: str, tasks: str) -> dict[str, list[str]]:
        where = ["--data-dir", str(tmp_path / "data"), "--dtype", "float32", "--out", str(out)]
        found = CliRunner().invoke(app, ["evaluate", adapter, "--tasks", tasks, *where])
        assert found.exit_code == 0, found.output
        results = json.loads((out / "results.json").read_text())["tasks"]
        return {task: list(scores) for task, scores in results.items()}

    assert evaluated(f"a={tmp_path / 'one'}", "boolq") == {"boolq": ["base", "a"]}
    base = (out / "samples/base/boolq.jsonl").read_bytes()
    assert evaluated(f"b={tmp_path / 'two'}", "boolq") == {"boolq": ["base", "a", "b"]}
    assert (out / "samples/base/boolq.jsonl").read_bytes() == base
    found = evaluated(f"b={tmp_path / 'two'}", "piqa")
    assert found == {"boolq": ["base", "a", "b"], "piqa": ["base", "b"]}
    # A name that is another adapter's now: what the former had stands there no longer.
    assert evaluated(f"b={tmp_path / 'one'}", "demo")["boolq"] == ["base", "a"]


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.parametrize("method", ["lora", "prompt_tuning"])
def test_the_base_of_any_method_is_known_as_such(task, tmp_path, method):
    """Other weights of the adapter leave the base what it is."""
    kinds = {
        "lora": LoraConfig(task_type="CAUSAL_LM"),
        "prompt_tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    }
    headers = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = get_peft_model(tiny_llama(), kinds[method]).eval()
        with torch.no_grad():
            for p in (p for p in model.parameters() if p.requires_grad):
                p.add_(seed)
        engine = HFEngine(model, TOKENIZER, 4)
        how = {"base": True, "samples": tmp_path / str(seed), "progress": lambda *a: None}
        run_all([task], engine, **how)
        paths = [tmp_path / str(seed) / who / "boolq.jsonl" for who in ("base", "adapter")]
        headers.append([json.loads(p.read_text().splitlines()[0])["model"] for p in paths])
    assert headers[0][0] == headers[1][0]
    assert len({headers[0][0], headers[0][1], headers[1][1]}) == 3


def test_options_of_lm_eval_are_not_ignored_beside_tasks():
    for option in (["--num-fewshot", "2"], ["--chat-template"], ["--include-path", "there"]):
        found = CliRunner().invoke(app, ["evaluate", "a", "--tasks", "demo", *option])
        assert found.exit_code == 1
        assert "are for --lm-eval" in " ".join(found.output.split())


class Digits:
    """A task that is right or wrong by the first digit of a completion."""

    name = "digits"
    metric = "accuracy"
    template = "none"
    sampling = Sampling(max_new_tokens=40)
    num_examples = N

    def example(self, i: int) -> Any:
        from reftune.prompts import Example

        return Example(prompt=f"count from {i}", completion="5", fields={}, where=f"row {i}")

    def gold(self, example: Any) -> str:
        return "5"

    def extract(self, text: str) -> str:
        return next((c for c in text if c.isascii() and c.isdigit()), "")

    def score(self, example: Any, completion: str) -> float:
        return float(self.extract(completion) == "5")


class DecidedDigits(Digits):
    def is_decided(self, example: Any, text: str) -> bool:
        return self.extract(text) != ""


def test_a_task_that_decides_early_has_the_same_scores_in_fewer_tokens(tmp_path):
    assert isinstance(DecidedDigits(), Decides)
    assert not isinstance(Digits(), Decides)
    engine = HFEngine(tiny_llama(), TOKENIZER, 4)
    whole = run(Digits(), engine, samples_path=tmp_path / "whole")
    early = run(DecidedDigits(), engine, samples_path=tmp_path / "early")
    assert (early.value, early.stderr) == (whole.value, whole.stderr)
    assert early.generated_tokens < whole.generated_tokens
    pairs = zip(read_samples(tmp_path / "early"), read_samples(tmp_path / "whole"), strict=True)
    for short, long in pairs:
        assert long.completion.startswith(short.completion)
        assert (short.score, short.extracted) == (long.score, long.extracted)
        assert short.finish_reason == ("decided" if short.extracted else "length")
