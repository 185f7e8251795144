"""The plugin of `llm`: adapters are its models, and reply as `reftune generate` does."""

import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from click.testing import CliRunner as ClickRunner
from typer.testing import CliRunner

from reftune.run import execute
from reftune_cli import app
from runs import tiny_run

llm = pytest.importorskip("llm")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
]
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a finished run in its runs/."""
    folder = tmp_path_factory.mktemp("llm")
    execute(tiny_run(folder, train={"epochs": 40, "learning_rate": 5e-2, "save_steps": 50}))
    return folder


@pytest.fixture
def cli(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Return llm's command line with our plugin and no other, its files in a folder of its own."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LLM_USER_PATH", str(folder / "llm"))
    monkeypatch.setattr("llm.plugins.LLM_LOAD_PLUGINS", "")
    from llm.plugins import load_plugins, pm

    load_plugins()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    plugin = import_module(project["entry-points"]["llm"]["reftune"])
    pm.register(plugin, "reftune")
    from llm.cli import cli

    yield cli
    pm.unregister(plugin)


def ask(cli: object, *args: str) -> str:
    result = ClickRunner().invoke(cli, list(args), catch_exceptions=False)  # type: ignore[arg-type]
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def generate(folder: Path, *options: str) -> str:
    args = ["generate", str(folder / "runs" / "run"), "say aa", "--max-new-tokens", "6"]
    result = CliRunner().invoke(app, [*args, *options], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def test_a_run_is_a_model_and_replies_as_reftune_does(cli: object, folder: Path) -> None:
    assert "reftune/runs/run" in ask(cli, "models")
    options = ("-o", "max_new_tokens", "6")
    reply = ask(cli, "-m", "reftune/runs/run", "say aa", *options)
    assert reply == generate(folder)
    base = ask(cli, "-m", "reftune/runs/run", "say aa", *options, "-o", "strength", "0")
    assert base != reply
    assert base in generate(folder, "--compare")


def test_what_the_environment_names_is_a_model_and_errors_are_said(
    cli: object, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFTUNE_ADAPTERS", f"{folder / 'runs' / 'run' / 'adapter'}, no/where")
    listed = ask(cli, "models")
    assert f"reftune/{folder}" in listed
    result = ClickRunner().invoke(cli, ["-m", "reftune/no/where", "say aa"])  # type: ignore[arg-type]
    assert result.exit_code == 1
    assert "HF_HUB_OFFLINE=1 is set" in result.output or "has no adapter" in result.output


def test_llm_alone_does_not_load_torch(folder: Path) -> None:
    import subprocess
    import sys

    code = "import sys, reftune_cli.llm_plugin as p; p.adapters(); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
