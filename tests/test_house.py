"""The house rules that a test can hold: import order, public names, sizes, what import loads."""

import ast
import subprocess
import sys
from pathlib import Path

import reftune

SRC = Path(__file__).parent.parent / "src"

# The reading order. A module imports only modules above it.
ROOMS = (
    "errors",
    "hub",
    "orthonormal",
    "interventions",
    "positions",
    "config",
    "masks",
    "context",
    "spans",
    "recompute",
    "mixed",
    "layers",
    "heads",
    "layer",
    "controls",
    "composition",
    "trainers",
    "generating",
    "checkpoint",
    "quantised",
    "tuner",
    "together",
    "__init__",
    "methods",
    "models",
    "convert.foreign",
    "convert.adapter",
    "convert.keys",
    "convert.pyreft",
    "convert.pyreft_out",
    "convert.adapters",
    "convert.easysteer",
    "convert",
    "prompts",
    "workers",
    "token_store",
    "tokens",
    "data",
    "distributed",
    "heldout",
    "callbacks",
    "speed",
    "speed.patch",
    "speed.dropout",
    "speed.norms",
    "speed.products",
    "speed.attention",
    "speed.compiled",
    "speed.unread",
    "speed.offload",
    "speed.loss",
    "speed.batches",
    "speed.frozen",
    "speed.plan",
    "speed.training",
    "trainer",
    "train",
    "decoding",
    "completions",
    "generate",
    "likelihood",
    "demo",
    "tasks.glue",
    "tasks.leaks",
    "tasks.hub",
    "tasks.rows",
    "tasks.base",
    "tasks.commonsense",
    "tasks.arithmetic",
    "tasks.instruct",
    "tasks.labels",
    "tasks.procedural",
    "tasks.demo",
    "tasks",
    "samples",
    "evaluate",
    "settings",
    "encoder",
    "classify",
    "sources",
    "stored",
    "seen",
    "card",
    "plots",
    "loading",
    "saving",
    "provenance",
    "alpaca_eval",
    "run",
    "publish",
    "harness",
    "experiment",
    "base_model",
    "cells",
    "records",
    "figures",
    "pages",
    "paper",
    "report",
    "peft_json",
    "integrations",
    "integrations.axolotl",
    "serve",
    "serve.settings",
    "serve.version",
    "serve.adapter",
    "serve.parameters",
    "serve.store",
    "serve.edits",
    "serve.bank",
    "serve.plan",
    "serve.chunks",
    "serve.model_state",
    "serve.attach",
    "serve.frontend",
    "serve.plugin",
    "serve.engine",
    "serve.catalog",
    "serve.metrics",
    "serve.http",
    "serve.launch",
)


def module_files() -> dict[str, Path]:
    found = {}
    for path in sorted((SRC / "reftune").rglob("*.py")):
        name = ".".join(path.relative_to(SRC / "reftune").with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imported_rooms(path: Path) -> set[str]:
    """Return the rooms a module imports when it is imported (not under TYPE_CHECKING)."""
    rooms: set[str] = set()
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only or not isinstance(node, ast.ImportFrom):
            continue
        module = node.module or ""
        if module == "reftune":
            names = {alias.name for alias in node.names}
            rooms |= {name if name in ROOMS else "__init__" for name in names}
        elif module.startswith("reftune."):
            rooms.add(module.removeprefix("reftune."))
    return rooms


def test_every_module_is_a_room() -> None:
    assert set(module_files()) == set(ROOMS)


def test_a_module_imports_only_rooms_above_it() -> None:
    below = [
        f"{name} imports {room}"
        for name, path in module_files().items()
        for room in imported_rooms(path)
        if ROOMS.index(room) >= ROOMS.index(name)
    ]
    assert below == []


def test_modules_are_short() -> None:
    files = [*module_files().values(), *(SRC / "reftune_cli").glob("*.py")]
    long = {p.name: n for p in files if (n := p.read_text().count("\n")) > 400}
    assert long == {}


def test_functions_are_short() -> None:
    long = [
        f"{path.name}: {node.name}"
        for path in SRC.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno > 60
    ]
    assert long == []


def test_all_is_the_api() -> None:
    """Every public name is in __all__, and every name there exists and is documented."""
    for name in reftune.__all__:
        value = getattr(reftune, name)
        assert name in ("METHODS", "__version__") or value.__doc__, name
    public = {n for n, v in vars(reftune).items() if not n.startswith("_")} - set(ROOMS)
    assert public <= set(reftune.__all__)


def test_import_loads_no_optional_library() -> None:
    optional = ["matplotlib", "gguf", "vllm", "gradio", "trl", "lm_eval", "datasets", "rich"]
    code = f"import sys, reftune; print([m for m in {optional} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_loads_neither_torch_nor_peft() -> None:
    code = (
        "import sys, reftune_cli\n"
        "try: reftune_cli.app(['--help'], standalone_mode=True)\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'peft', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
    assert "train" in done.stdout


def test_files_are_read_without_pickle() -> None:
    """No torch.load without weights_only, no pickle import."""
    for path in SRC.rglob("*.py"):
        text = path.read_text()
        assert "import pickle" not in text, path
        assert "torch.load(" not in text or "weights_only=True" in text, path
