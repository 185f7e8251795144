"""The results files of experiments/: resumed, shared by commands, of known machines."""

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiments import common, records
from experiments.records import DivergedError, Record

from reftune.errors import RunError, RunInterrupted

AMD, ARM = {"cpus": 2, "processor": "amd"}, {"cpus": 8, "processor": "arm"}


def record(out: Path, *more: str, rate: float = 0.1, times: bool = False) -> Record:
    """Return an experiment's record, begun or gone on with as by a command."""
    args = common.parser("some", None).parse_args(["--out", str(out), *more])
    return Record(args, {"rate": rate}, times=times)


def give(value: float) -> Callable[[], records.Numbers]:
    return lambda: {"accuracy": value}


def diverge() -> records.Numbers:
    raise DivergedError("the loss is nan at step 7")


def file(out: Path) -> Any:
    return json.loads((out / "some.json").read_text())


def values(out: Path) -> dict[str, float]:
    return {name: cell["accuracy"] for name, cell in file(out)["cells"].items()}


# --- the same command again -----------------------------------------------------------------------


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize(
    "interruption", [KeyboardInterrupt(), RunInterrupted("2 of 3 cells. The same command goes on.")]
)
def test_the_same_command_goes_on_without_fresh(
    monkeypatch: pytest.MonkeyPatch, interruption: BaseException, fresh: bool
) -> None:
    def main(argv: None) -> None:
        raise interruption

    monkeypatch.setattr(sys, "argv", ["some", "--seed", "1", *["--fresh"] * fresh])
    with pytest.raises(SystemExit, match="same command goes on") as end:
        common.command_line(main)
    assert ("Leave out --fresh" in str(end.value)) is fresh


def test_fresh_is_given_by_its_whole_name(capsys: pytest.CaptureFixture[str]) -> None:
    """Half of it would begin anew as well, and the advice not be given."""
    with pytest.raises(SystemExit):
        common.parser("some", None).parse_args(["--fre"])
    assert "--fre" in capsys.readouterr().err


def test_fresh_forgets_what_was_measured(tmp_path: Path) -> None:
    record(tmp_path, rate=0.2).measure({"a": give(1), "b": give(2)})
    record(tmp_path, "--fresh").measure({"a": give(3)})
    assert values(tmp_path) == {"a": 3}


# --- cells without a result -----------------------------------------------------------------------


@pytest.mark.parametrize("fresh", [True, False])
def test_cells_that_diverge_are_named_in_the_end(tmp_path: Path, fresh: bool) -> None:
    with pytest.raises(RunError) as failure:
        record(tmp_path, *["--fresh"] * fresh).measure(
            {"a": diverge, "b": give(1), "c": diverge, "d": give(2)}
        )
    text = str(failure.value)
    assert "2 of 4 cells" in text
    assert "a (the loss is nan at step 7); c (the loss is nan at step 7)" in text
    assert "lower --learning-rate is another setting" in text
    assert "another --out" in text
    assert ("Leave out --fresh" in text) is fresh
    assert values(tmp_path) == {"b": 1, "d": 2}
    record(tmp_path).measure({"a": give(3), "b": diverge, "c": give(4), "d": diverge})
    assert values(tmp_path) == {"b": 1, "d": 2, "a": 3, "c": 4}


def test_what_went_wrong_otherwise_ends_the_command(tmp_path: Path) -> None:
    def broken() -> records.Numbers:
        raise RunError("no disk")

    with pytest.raises(RunError, match="^no disk$"):
        record(tmp_path).measure({"a": broken, "b": give(1)})
    assert not list(tmp_path.iterdir())


# --- several commands -----------------------------------------------------------------------------


def test_two_commands_keep_the_cells_of_both(tmp_path: Path) -> None:
    one, two = record(tmp_path), record(tmp_path)
    one.measure({"a": give(1)})
    two.measure({"b": give(2), "both": give(3)})
    two.finish("of two", [["table"]])
    one.measure({"c": give(4)})
    assert values(tmp_path) == {"a": 1, "b": 2, "both": 3, "c": 4}
    assert file(tmp_path)["summary"] == "of two"
    one.cells["both"] = {"accuracy": 5}
    one.finish("of one", [["table"]])
    assert values(tmp_path)["both"] == 5  # one's own
    assert file(tmp_path)["summary"] == "of one"
    assert [path.name for path in tmp_path.iterdir()] == ["some.json"]


def test_commands_with_other_settings_do_not_share_a_file(tmp_path: Path) -> None:
    one, two = record(tmp_path), record(tmp_path, rate=0.2)
    one.measure({"a": give(1)})
    before = (tmp_path / "some.json").read_text()
    with pytest.raises(RunError, match=r"other settings \(rate 0.1, now 0.2\).*another --out"):
        two.measure({"b": give(2)})
    assert (tmp_path / "some.json").read_text() == before


# --- machines -------------------------------------------------------------------------------------


def test_every_machine_that_measured_a_cell_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "machine", lambda: AMD)
    record(tmp_path).measure({"a": give(1), "b": give(2)})
    assert file(tmp_path)["machines"] == [AMD]
    monkeypatch.setattr(records, "machine", lambda: ARM)
    again = record(tmp_path)
    again.measure({"a": give(3)})
    again.finish("all", [["table"]])
    assert file(tmp_path)["machines"] == [AMD]  # ARM has measured nothing
    again.measure({"c": give(4)})
    assert file(tmp_path)["machines"] == [AMD, ARM]


def test_times_are_of_one_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "machine", lambda: ARM)
    late = record(tmp_path, times=True)
    monkeypatch.setattr(records, "machine", lambda: AMD)
    record(tmp_path, times=True).measure({"a": give(1)})
    record(tmp_path, times=True).measure({"b": give(2)})
    assert file(tmp_path)["machine"] == AMD
    with pytest.raises(RunError, match=r"other machine \(.*amd, now arm\).*another --out"):
        late.measure({"c": give(3)})
    assert values(tmp_path) == {"a": 1, "b": 2}


def test_a_machine_is_more_than_its_kind() -> None:
    found = records.machine()
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    assert found["processor"] in info or "model name" not in info
    assert found["instructions"]


@pytest.mark.parametrize("path", sorted(common.RESULTS.glob("*.json")), ids=lambda p: p.stem)
def test_results_that_are_there_are_gone_on_with(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first ones were written with one machine, which was the last that had a hand in them."""
    before = json.loads(path.read_text())
    shutil.copy(path, tmp_path)
    monkeypatch.setattr(records, "versions", lambda: before["versions"])
    args = argparse.Namespace(name=path.stem, out=tmp_path, quick=False, fresh=False)
    found = Record(args, before["settings"], times=path.stem == "overhead")
    found.measure(dict.fromkeys(before["cells"], diverge))
    found.finish(before["summary"], [["table"]])
    after = json.loads((tmp_path / path.name).read_text())
    noted = {"machines", "machine"}
    assert {k: v for k, v in after.items() if k not in noted} == {
        k: v for k, v in before.items() if k not in noted
    }
    known = before.get("machines", [before.get("machine")])
    assert after.get("machines", [after.get("machine")]) == known
