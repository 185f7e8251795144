"""Try ReFT on every class of transformers that can be made tiny, and write down what works.

    python benchmarks/models_matrix.py                      # all, some 15 minutes on one idle core
    python benchmarks/models_matrix.py --only causal:llama  # some; the others are kept
    python benchmarks/models_matrix.py --page               # only write docs/models.md again

Writes benchmarks/results/models.json and, from it, docs/models.md. Each class is tried in a process
of its own with limits on time and memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers.models.auto import modeling_auto

from reftune import ReftConfig
from reftune.errors import LayersNotFoundError
from reftune.layers import find_targets
from zoo import page
from zoo.checks import CHECKS, Subject, checks_of
from zoo.special import LAYERS_PATHS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "models.json"
PAGE = ROOT / "docs" / "models.md"
SECONDS, BYTES = 120, 8 << 30
KINDS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq-cls": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "image-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
}


def subjects(kind: str) -> dict[str, Subject]:
    """Return the classes of a kind by model type, one for each model type."""
    found = {}
    for model_type, names in getattr(modeling_auto, KINDS[kind]).items():
        name = names if isinstance(names, str) else names[0]
        path = LAYERS_PATHS.get((kind, model_type))
        found[model_type] = Subject(kind, model_type, name, path)
    return found


def try_out(s: Subject) -> dict[str, Any]:
    """Return what was found out about one class."""
    row: dict[str, Any] = {"class": s.model_class}
    try:
        base = s.base()
        with torch.no_grad():
            base(**s.inputs())
    except Exception as error:
        return {**row, "status": "untried", "reason": reason_of(error)}
    try:
        found = find_targets(base, ReftConfig(layers_path=s.layers_path))
    except Exception as error:
        named = type(error).__name__ if isinstance(error, LayersNotFoundError) else "error"
        return {**row, "status": "no", "reason": f"{named}: {reason_of(error)}"}
    row["depth"] = len(found)
    row["layers"] = next(iter(found)).rpartition(".")[0]
    if s.layers_path:
        row["named"] = True
    row["checks"] = {}
    for name in checks_of(s):
        try:
            row["checks"][name] = CHECKS[name](s)
        except Exception as error:
            row["checks"][name] = _blame(s, name, error)
    failed = [name for name, found in row["checks"].items() if found.startswith("no")]
    return {**row, "status": "no" if failed else "works"}


def _blame(s: Subject, name: str, error: Exception) -> str:
    """Say whose error it is: the base model's own where it lies in what the base model does."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = any("/reftune/" in f.filename for f in frames)
    return f"{'no' if ours else 'base'}: {reason_of(error)}"


def reason_of(error: Exception) -> str:
    """Return an error in one line."""
    text = " ".join(str(error).split()).replace(str(ROOT), "")
    return f"{type(error).__name__}: {text}"[:240]


def _child(s: Subject, pipe: Connection) -> None:
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for the life of this process
    pipe.send(try_out(s))


def in_a_process(s: Subject) -> dict[str, Any]:
    """Return what `try_out` finds, in a forked process with limits on time and memory."""
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_child, args=(s, there))
    process.start()
    there.close()
    row: dict[str, Any] = {"class": s.model_class, "status": "untried"}
    try:
        if here.poll(SECONDS):
            row = here.recv()
        else:
            row["reason"] = f"not done in {SECONDS} s"
    except EOFError:
        row["reason"] = "its process died"
    process.kill()
    process.join()
    return row


def chosen(only: list[str]) -> Iterator[Subject]:
    """Yield what was asked for: everything, a kind, or `kind:model_type`."""
    for kind in KINDS:
        for model_type, s in subjects(kind).items():
            if not only or kind in only or f"{kind}:{model_type}" in only:
                yield s


def write(path: Path, text: str) -> None:
    """Write a file under a temporary name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="kinds, or kind:model_type")
    parser.add_argument("--page", action="store_true", help="only write the page")
    args = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results.setdefault("kinds", {})
    if not args.page:
        transformers.logging.set_verbosity_error()
        versions = {"torch": torch.__version__, "peft": peft.__version__}
        results["versions"] = {"transformers": transformers.__version__, **versions}
        for s in chosen(args.only):
            started = time.monotonic()
            row = in_a_process(s)
            results["kinds"].setdefault(s.kind, {})[s.model_type] = row
            no = {k: v for k, v in row.get("checks", {}).items() if not v.startswith("yes")}
            took = time.monotonic() - started
            told = row.get("reason", no or "")
            print(f"{s.kind}:{s.model_type} {row['status']} {told} {took:.0f} s", flush=True)
            write(RESULTS, json.dumps(results, indent=1) + "\n")
    write(PAGE, page.render(results))


if __name__ == "__main__":
    main()
