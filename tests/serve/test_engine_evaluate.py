"""`reftune evaluate --engine vllm` has the results of transformers, example by example."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from serving_tiny import save_adapter
from typer.testing import CliRunner

from reftune.evaluate import read_samples
from reftune_cli import app

EIGHT = ["--tasks", "demo", "--limit", "8", "--dtype", "float32"]


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return two adapters that say which base they were trained on."""
    folder = tmp_path_factory.mktemp("adapters")
    saved = [save_adapter(folder / name, i) for i, name in enumerate("ab")]
    for path in saved:
        config = json.loads((path / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(base)
        (path / "adapter_config.json").write_text(json.dumps(config))
    return saved


def evaluate(adapters: list[Path], out: Path, *more: str) -> dict[str, Any]:
    """Return the scores, and the samples without their times and how the row was named."""
    command = ["evaluate", *map(str, adapters), *EIGHT, "--out", str(out), *more]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    scores = json.loads((out / "results.json").read_text())["tasks"]["demo"]
    samples = {
        who: [
            dataclasses.replace(s, seconds=0.0, adapter=None)
            for s in sorted(
                read_samples(out / "samples" / who / "demo.jsonl"), key=lambda s: s.index
            )
        ]
        for who in scores
    }
    return {who: (scores[who]["value"], scores[who]["n"], samples[who]) for who in scores}


@pytest.mark.parametrize("count", [1, 2])
def test_results_are_those_of_transformers(
    count: int, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm

    class Eager(vllm.LLM):  # type: ignore[misc]
        def __init__(self, model: str, **options: Any) -> None:
            super().__init__(model, enforce_eager=True, **options)

    monkeypatch.setattr(vllm, "LLM", Eager)
    ours = evaluate(adapters[:count], tmp_path / "vllm", "--engine", "vllm")
    theirs = evaluate(adapters[:count], tmp_path / "hf")
    assert list(ours) == (["base", "adapter"] if count == 1 else ["base", "a", "b"])
    assert ours == theirs
    assert len({tuple(s.completion for s in samples) for _, _, samples in ours.values()}) > 1


def test_what_cannot_be_evaluated_is_a_sentence(adapters: list[Path], tmp_path: Path) -> None:
    other = save_adapter(tmp_path / "other", 3)
    for command, says in (
        ([str(adapters[0]), *EIGHT, "--engine", "tgi"], "accepted are hf"),
        ([str(adapters[0]), "--lm-eval", "piqa", "--engine", "vllm"], "accepted are hf"),
        ([str(adapters[0]), str(other), *EIGHT, "--engine", "vllm"], "one base model"),
        ([*map(str, [adapters[0]] * 2), *EIGHT, "--engine", "vllm"], "the same name"),
    ):
        done = CliRunner().invoke(app, ["evaluate", *command])
        assert done.exit_code == 1
        assert says in " ".join(done.output.split()), done.output
