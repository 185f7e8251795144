"""What the documents show is what runs: their Python is run, their commands are parsed."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForSequenceClassification,
)
from typer.testing import CliRunner

from reftune.settings import load_config
from reftune_cli import app
from tiny import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
HUB_MODEL, DEPTH = "HuggingFaceTB/SmolLM2-135M-Instruct", 30

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    # TRL's arguments use the old name themselves.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning"),  # no accelerator here
]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_python_blocks_run_one_after_the_other(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny model of as many layers stands in for the one of the Hub."""

    def tiny(name: str, *args: Any, **kwargs: Any) -> Any:
        assert name == HUB_MODEL
        return tiny_llama(layers=DEPTH)

    def tiny_classifier(name: str, num_labels: int) -> Any:
        config = tiny(name).config
        config.num_labels = num_labels
        return LlamaForSequenceClassification(config)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", tiny)
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", tiny_classifier)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name: tiny_tokenizer())
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in blocks(path, "python"):
        exec(compile(code, str(path), "exec"), names)


def commands(path: Path) -> list[list[str]]:
    lines = "\n".join(blocks(path, "bash")).splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [w for w in words if w and w[0] == "reftune"]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_commands_have_the_verbs_and_options_they_show(path: Path) -> None:
    group: Any = typer.main.get_command(app)
    for _, verb, *args in commands(path):
        command = group.commands[verb]
        context = command.make_context(verb, list(args))  # raises for an unknown option
        given = context.params
        assert not context.args or context.args[0].startswith("-"), (verb, context.args)
        if verb == "train" and "--resume" not in args:
            load_config(ROOT / given["config"], given["overrides"] or [])


def test_the_config_for_own_data_is_one(tmp_path: Path) -> None:
    found = [text for text in blocks(ROOT / "README.md", "yaml") if "name: mine" in text]
    (tmp_path / "mine.yaml").write_text(found[0])
    assert load_config(tmp_path / "mine.yaml").data.train == "my.jsonl"


def test_an_option_of_the_server_that_is_given_two_values_is_named() -> None:
    args = ["serve", "smollm2-135m", "--adapters", "a", "b", "--port", "8000"]
    result = CliRunner().invoke(app, args, env={"COLUMNS": "200"})
    assert result.exit_code == 1
    assert "'b' follows an option that takes one value" in " ".join(result.output.split())


def test_the_make_targets_that_documents_name_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for path in [*DOCUMENTS, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"^(?:    )?make ([a-z-]+)", path.read_text(), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), (path.name, target)
