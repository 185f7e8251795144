"""Run PEFT's own tests on ReFT and write what came out; fails on what is not explained.

    python benchmarks/peft_suite/run.py PATH_TO_PEFT [-n WORKERS] [-k EXPRESSION] [--results FILE]

PATH_TO_PEFT is a source tree of PEFT of the installed version: a git checkout, or the unpacked
source distribution. Nothing in it is written to. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
FILES = (
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_custom_models.py",
    "test_low_level_api.py",
)
# What PEFT's pyproject.toml filters; the rest of its pytest settings concerns coverage.
WARNINGS = ("error::DeprecationWarning:transformers", "error::FutureWarning:transformers")

Row = dict[str, str]


def main() -> int:
    """Run the tests; return 0 where every failure is explained and no explanation is stale."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkout", type=Path, help="source tree of PEFT, with its tests")
    parser.add_argument("-n", "--workers", type=int, default=1, help="processes (pytest-xdist)")
    parser.add_argument("-k", "--expression", default="", help="pytest's -k: only some tests")
    parser.add_argument("--results", type=Path, help="write the table to this Markdown file")
    args = parser.parse_args()
    check_version(args.checkout)
    started = time.monotonic()
    rows = run_tests(args.checkout.resolve(), args.workers, args.expression)
    seconds = time.monotonic() - started
    for row in rows:
        row["kind"], row["reason"] = classify(row)
    unexplained = [row for row in rows if row["kind"] == "unexplained"]
    stale = [] if args.expression else stale_entries(rows)
    for row in unexplained:
        print(f"NOT EXPLAINED {row['test']}\n    {row['error'][:300]}")
    for reason in stale:
        print(f"STALE: no failure any more for: {reason}")
    if args.results:
        args.results.write_text(table(rows, seconds, args.workers), encoding="utf-8")
    summary = {"seconds": round(seconds), "tests": len(rows), **Counter(r["kind"] for r in rows)}
    print(json.dumps({**summary, "stale": len(stale)}))
    return 1 if unexplained or stale or not rows else 0


def check_version(checkout: Path) -> None:
    """Exit where the tree is not of the installed version of PEFT."""
    init = checkout / "src" / "peft" / "__init__.py"
    if not init.is_file():
        sys.exit(f"{checkout} is no source tree of PEFT: {init} is missing.")
    found = re.search(r'__version__ = "(.+?)"', init.read_text(encoding="utf-8"))
    installed = importlib.metadata.version("peft")
    if found is None or found[1] != installed:
        sys.exit(
            f"{checkout} is of PEFT {found[1] if found else 'unknown'}, installed is {installed}. "
            f"Give the tree of {installed}: `git checkout v{installed}`, or unpack what "
            f"`pip download peft=={installed} --no-binary peft --no-deps` fetches."
        )


def run_tests(checkout: Path, workers: int, expression: str) -> list[Row]:
    """Run pytest in a process of its own, from an empty directory; return a row for each test."""
    import tiny_hub

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tiny_hub.build(work / "hub")
        (work / "empty.ini").touch()
        environment = {
            **os.environ,
            "HF_HUB_CACHE": str(work / "hub"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PEFT_CHECKOUT": str(checkout),
            "PEFT_SUITE_JSON": str(work / "rows.json"),
            "PYTHONDONTWRITEBYTECODE": "1",  # the checkout stays as it is
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1] / "src")]),
        }
        command = [sys.executable, "-m", "pytest", "-c", str(work / "empty.ini")]
        command += [f"--rootdir={checkout}", "-p", "reftune_peft_plugin", "-p", "no:cacheprovider"]
        command += ["-o", "consider_namespace_packages=true", "-q", "--tb=no", "--no-header"]
        command += ["--disable-warnings", "-r", "N"]
        command += [part for warning in WARNINGS for part in ("-W", warning)]
        command += ["-n", str(workers)] if workers > 1 else []
        command += ["-k", expression] if expression else []
        command += [str(checkout / "tests" / name) for name in FILES]
        subprocess.run(command, cwd=work, env=environment, check=False)
        rows = work / "rows.json"
        if not rows.is_file():
            sys.exit("pytest did not finish; see its output above.")
        loaded: list[Row] = json.loads(rows.read_text(encoding="utf-8"))
        return loaded


def parts(nodeid: str) -> tuple[str, str, str]:
    """Return the file, the function and the parameters (with brackets) of a test's id."""
    path, _, rest = nodeid.partition("::")
    name, bracket, parameters = rest.partition("[")
    return Path(path).name, name.rpartition("::")[2], bracket + parameters


def classify(row: Row) -> tuple[str, str]:
    """Return the kind of an outcome, and its reason."""
    from explained import EXPLAINED

    if row["outcome"] != "failed":
        return row["outcome"], row["error"]
    _, test, parameters = parts(row["test"])
    for entry in EXPLAINED:
        if entry.explains(test, parameters, row["error"]):
            return entry.kind, entry.reason
    return "unexplained", row["error"].partition("\n")[0][:200]


def stale_entries(rows: list[Row]) -> list[str]:
    """Return the reasons of entries that explain nothing."""
    from explained import EXPLAINED

    seen = {row["reason"] for row in rows}
    return [entry.reason for entry in EXPLAINED if entry.reason not in seen]


def table(rows: list[Row], seconds: float, workers: int) -> str:
    """Return results.md."""
    versions = ("peft", "transformers", "torch", "accelerate", "pytest")
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in versions)
    kinds = Counter(row["kind"] for row in rows)
    lines = [
        "# PEFT's own tests, run on ReFT",
        "",
        "Written by `run.py`; see README.md for how.",
        "",
        f"{found}, Python {platform.python_version()}, CPU; {seconds / 60:.1f} minutes with "
        f"{workers} process(es). {len(rows)} tests: "
        + ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
        + ".",
        "",
        "passed, skipped: as PEFT's tests say. no merge, by design, other layout: failed, for the "
        "reason that the second table gives (explained.py).",
        "",
    ]
    lines += _counts(rows) + _reasons(rows, "Failures and their reasons", failed=True)
    lines += _reasons(rows, "Skipped by PEFT's tests themselves", failed=False)
    return "\n".join(lines)


def _counts(rows: list[Row]) -> list[str]:
    columns = ("passed", "skipped", "no merge", "by design", "other layout", "unexplained")
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for row in rows:
        file, test, _ = parts(row["test"])
        counts[file, test][row["kind"]] += 1
    lines = [
        "## Outcomes by test",
        "",
        f"| file | test | {' | '.join(columns)} |",
        "|---|---|" + "---:|" * len(columns),
    ]
    for (file, test), counter in counts.items():
        cells = " | ".join(str(counter[column] or "") for column in columns)
        lines.append(f"| {file} | {test} | {cells} |")
    total = Counter(row["kind"] for row in rows)
    cells = " | ".join(str(total[column] or "") for column in columns)
    return [*lines, f"| all | | {cells} |", ""]


def _reasons(rows: list[Row], title: str, failed: bool) -> list[str]:
    wanted = [row for row in rows if row["outcome"] == ("failed" if failed else "skipped")]
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in wanted:
        groups[row["kind"], row["reason"]].append(parts(row["test"])[1])
    lines = [f"## {title}", "", "| tests | reason | cases |", "|---|---|---:|"]
    for (kind, reason), tests in sorted(groups.items()):
        names = ", ".join(sorted(set(tests)))
        text = " ".join(reason.split()).replace("|", "\\|")
        lines.append(f"| {names} | {f'{kind}: {text}' if failed else text} | {len(tests)} |")
    return [*lines, ""]


if __name__ == "__main__":
    sys.exit(main())
