"""Experiments: which cells there are, which are run, and what is kept of those that fail."""

import dataclasses
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from reftune import base_model
from reftune import cells as cells_module
from reftune.base_model import base_scores
from reftune.callbacks import Progress
from reftune.cells import Outcome, run_cells
from reftune.errors import ReftConfigError, ReftuneError, RunError, RunInterrupted
from reftune.experiment import Cell, Experiment, load_experiment
from reftune.generate import HFEngine
from reftune.run import Silent, execute
from reftune.settings import load_config
from reftune_cli import app
from runs import tiny_run

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
]

METHODS: dict[str, Any] = {
    "loreft": {"adapter": {"method": "loreft"}, "grid": {"adapter.r": [1, 2]}},
    "lora": {"adapter": {"method": "lora", "r": 2}, "train.learning_rate": 5e-3},
}
TWO = {"loreft": METHODS["loreft"]["adapter"], "lora": METHODS["lora"]["adapter"]}
TWO = {name: {"adapter": adapter} for name, adapter in TWO.items()}


def write(tmp_path: Path, name: str = "e", **keys: Any) -> Path:
    """Write an experiment of tiny runs; two steps each."""
    values = tiny_run(tmp_path, train={"max_steps": 2, "save_steps": 1}).model_dump(mode="json")
    values["adapter"] = {"positions": "f2+l2", "r": 2}
    values |= {"name": name, **keys}
    del values["seed"]
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def names(experiment: Experiment) -> list[str]:
    return [cell.name for cell in experiment.cells]


def read_cells(experiment: Experiment) -> list[dict[str, Any]]:
    lines = (experiment.directory / "cells.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def statuses(outcomes: list[Outcome]) -> dict[str, str]:
    return {outcome.cell: outcome.status for outcome in outcomes}


# --- which cells ----------------------------------------------------------------------------------


def test_cells_are_variants_times_grid_times_seeds(tmp_path: Path) -> None:
    path = write(tmp_path, methods=METHODS, seeds=[1, 2])
    found = load_experiment(path)
    assert names(found) == [
        *("loreft-r1-s1", "loreft-r1-s2", "loreft-r2-s1", "loreft-r2-s2"),
        *("lora-s1", "lora-s2"),
    ]
    assert [c.config.adapter.r for c in found.cells] == [1, 1, 2, 2, 2, 2]
    assert {c.arm for c in found.cells} == {"loreft-r1", "loreft-r2", "lora"}
    assert all(c.config.directory == tmp_path / "runs" / "e" / c.name for c in found.cells)
    assert len(load_experiment(path, seeds=[7]).cells) == 3


def test_a_variant_keeps_what_the_methods_share_and_drops_what_only_its_own_kind_has(
    tmp_path: Path,
) -> None:
    methods = {"direft": {"adapter.method": "direft"}, "full": {"adapter": {"method": "full"}}}
    direft, full = (c.config for c in load_experiment(write(tmp_path, methods=methods)).cells)
    assert (direft.method, direft.adapter.positions, direft.adapter.r) == ("direft", "f2+l2", 2)
    assert full.adapter.model_dump() == {"method": "full"}
    assert direft.train == full.train


def test_a_grid_may_list_its_points(tmp_path: Path) -> None:
    grid = [{"adapter.r": 4, "adapter.lora_alpha": 8}, {"adapter.r": 8, "adapter.lora_alpha": 16}]
    found = load_experiment(write(tmp_path, methods={"lora": METHODS["lora"]}, grid=grid)).cells
    assert [(c.config.adapter.r, c.config.adapter.lora_alpha) for c in found] == [(4, 8), (8, 16)]
    product = {"adapter.r": [1, 2], "train.learning_rate": [1e-3, 2e-3]}
    cells = load_experiment(write(tmp_path, grid=product)).cells
    assert [cell.name for cell in cells] == [
        *("loreft-r1-lr0.001-s42", "loreft-r1-lr0.002-s42"),
        *("loreft-r2-lr0.001-s42", "loreft-r2-lr0.002-s42"),
    ]
    short = load_experiment(write(tmp_path, grid={"r": [1, 2], "learning_rate": [1e-3, 2e-3]}))
    assert short.cells == cells


def test_overrides_win_over_variants_but_not_silently_over_the_grid(tmp_path: Path) -> None:
    path = write(tmp_path, methods=METHODS)
    found = load_experiment(path, ["train.learning_rate=0.5", "seeds=[3]", "name=other"])
    assert {c.config.train.learning_rate for c in found.cells} == {0.5}
    assert {c.seed for c in found.cells} == {3}
    assert found.directory == tmp_path / "runs" / "other"
    with pytest.raises(ReftConfigError, match=r"adapter\.r is in the grid"):
        load_experiment(path, ["adapter.r=3"])
    with pytest.raises(ReftConfigError, match=r"adapter is in the grid"):
        load_experiment(path, ["adapter={method: lora}"])


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"methods": {"a": {"trian": {}}}}, "Did you mean 'train'"),
        ({"methods": {"a": {"adapter": {"method": "lora", "rank": 2}}}}, "a-s42.*adapter.rank"),
        ({"methods": {"a/b": {}}}, "a variant is named 'a/b'"),
        ({"grid": {"adapter.r": 4}}, "grid"),
        ({"grid": {"adapter.rr": [4]}}, "no key 'adapter.rr'"),
        ({"grid": {"rr": [4]}}, "no key 'rr'"),
        ({"grid": {"batch_size": [4]}}, "may be train.batch_size or evaluate.batch_size"),
        ({"grid": {"train.r": [4]}}, "no key 'train.r'. Did you mean 'adapter.r'?"),
        ({"grid": [{"adapter.r": 4}, {"adapter.r": 4}]}, "two cells"),
        ({"grid": [{"r": 4, "adapter.r": 8}]}, "grid has adapter.r twice: adapter.r, r"),
        ({"grid": {4: [1]}}, "no key '4'"),
        ({"methodes": {}}, "no key 'methodes'.*Did you mean 'methods'?"),
        ({"seeds": [1, 2, 1]}, "seeds has 1 more than once"),
        ({"seeds": []}, "seeds is"),
        ({"name": "a b"}, "name is 'a b'"),
    ],
)
def test_a_wrong_experiment_says_what_is_accepted(
    tmp_path: Path, keys: dict[str, Any], says: str
) -> None:
    path = write(tmp_path, **{"name": "e"})
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | keys))
    with pytest.raises(ReftConfigError, match=says):
        load_experiment(path)


@pytest.mark.parametrize(
    "recipe", sorted((Path(__file__).parent.parent / "recipes/experiments").glob("*.yaml"))
)
def test_recipes_are_valid(recipe: Path) -> None:
    assert len(load_experiment(recipe, seeds=[1, 2, 3]).cells) >= 3


# --- running them ---------------------------------------------------------------------------------


def test_a_cell_is_an_ordinary_run_and_a_finished_one_is_not_run_again(tmp_path: Path) -> None:
    experiment = load_experiment(write(tmp_path, methods=TWO))
    assert set(statuses(run_cells(experiment)).values()) == {"done"}
    cell = experiment.cells[0].config
    alone = load_config(cell.directory / "config.yaml").model_copy(
        update={"name": "alone", "output_dir": str(tmp_path)}
    )
    results = json.loads((cell.directory / "results.json").read_text())
    again = execute(alone)
    assert again["train"]["loss"] == results["train"]["loss"]
    assert not (cell.directory / "checkpoints").exists()
    before = {p: p.stat().st_mtime_ns for p in experiment.directory.rglob("results.json")}
    first = read_cells(experiment)
    assert set(statuses(run_cells(experiment)).values()) == {"done"}
    assert {p: p.stat().st_mtime_ns for p in before} == before
    rows = read_cells(experiment)
    assert rows == first
    assert all(row["seconds"] > 0 for row in rows)
    assert [row["cell"] for row in rows] == names(experiment)
    assert all(row["status"] == "done" and row["parameters"] > 0 for row in rows)


def test_checkpoints_are_kept_where_asked(tmp_path: Path) -> None:
    experiment = load_experiment(write(tmp_path, keep_checkpoints=True))
    run_cells(experiment)
    assert (experiment.cells[0].config.directory / "checkpoints").is_dir()


def test_a_failed_cell_is_recorded_and_does_not_stop_the_rest(tmp_path: Path) -> None:
    methods = {"bad": {"adapter": {"method": "lora", "target_modules": ["nowhere"]}}, **TWO}
    path = write(tmp_path, methods=methods)
    code, output = invoke("experiment", str(path))
    assert code == 1
    assert "nowhere" in output
    experiment = load_experiment(path)
    rows = read_cells(experiment)
    assert [row["status"] for row in rows] == ["failed", "done", "done"]
    assert "nowhere" in rows[0]["error"]
    assert "Traceback" in (experiment.directory / "bad-s42" / "error.txt").read_text()
    code, output = invoke("experiment", str(path), "--dry-run")
    assert code == 0
    assert "pending" in output


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"data": {"train": "gone.jsonl"}}, "gone.jsonl"),
        ({"evaluate": {"tasks": ["sst2"]}}, "Did you mean 'words/sst2'?"),
    ],
)
def test_what_is_wrong_with_all_data_stops_the_experiment_before_its_base_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], says: str
) -> None:
    monkeypatch.setattr(cells_module, "base_scores", lambda *_: pytest.fail("is evaluated"))
    values = yaml.safe_load(write(tmp_path).read_text())
    changed = {section: values[section] | more for section, more in keys.items()}
    path = write(tmp_path, methods=TWO, **changed)
    with pytest.raises(ReftuneError, match=says):
        run_cells(load_experiment(path, seeds=[1, 2]))
    monkeypatch.undo()
    methods = TWO | {"odd": {key: {**changed[key]} for key in keys}}
    outcomes = run_cells(load_experiment(write(tmp_path, "some", methods=methods)))
    assert [o.status for o in outcomes] == ["done", "done", "failed"], "some can be run"


class InterruptAt(Silent):
    """Press Ctrl-C at a step of the n-th cell."""

    def __init__(self, step: int, cell: int) -> None:
        self.step, self.cell, self.started = step, cell, 0

    def say(self, text: str) -> None:
        self.started += text.startswith("[")

    def training(self, progress: Progress) -> None:
        if progress.step == self.step and self.started == self.cell:
            self.cell = -1
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_stops_all_and_the_same_command_goes_on_from_the_checkpoint(
    tmp_path: Path,
) -> None:
    whole = load_experiment(write(tmp_path, name="whole", methods=TWO))
    run_cells(whole)
    broken = load_experiment(write(tmp_path, name="broken", methods=TWO))
    with pytest.raises(RunInterrupted, match="1 of 2 cells are finished.*same command"):
        run_cells(broken, reporter=InterruptAt(1, cell=2))
    rows = read_cells(broken)
    assert [row["status"] for row in rows] == ["done", "interrupted"]
    assert rows[1]["seconds"] > 0
    resumed: list[str] = []

    class Watching(Silent):
        def training(self, progress: Progress) -> None:
            resumed.append(f"step {progress.step}")

    run_cells(broken, reporter=Watching())
    assert resumed[0] == "step 2", "the interrupted cell began with its second step"
    for one, other in zip(whole.cells, broken.cells, strict=True):
        a, b = (json.loads((c.config.directory / "results.json").read_text()) for c in (one, other))
        assert a["train"]["loss"] == b["train"]["loss"]


def test_a_cells_seconds_are_those_of_all_its_attempts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = Outcome("", "", {}, 0, "done")
    ends = iter(
        [
            dataclasses.replace(done, status="interrupted", seconds=5.0),
            dataclasses.replace(done, status="failed", seconds=10.0),
            dataclasses.replace(done, seconds=100.0),
            dataclasses.replace(done, seconds=7.0),
        ]
    )

    def attempt(experiment: Experiment, cell: Cell, reporter: Any) -> Outcome:
        end = next(ends)
        if end.status == "done":
            execute(cell.config, overwrite=True)
        return dataclasses.replace(end, cell=cell.name, variant=cell.variant, seed=cell.seed)

    monkeypatch.setattr(cells_module, "_with_base", attempt)
    experiment = load_experiment(write(tmp_path, methods={"loreft": TWO["loreft"]}))
    with pytest.raises(RunInterrupted):
        run_cells(experiment)
    assert [row["seconds"] for row in read_cells(experiment)] == [5.0]
    for expected in (15.0, 115.0, 115.0):  # the last time, nothing is run
        assert [outcome.seconds for outcome in run_cells(experiment)] == [expected]
        assert [row["seconds"] for row in read_cells(experiment)] == [expected]
    shutil.rmtree(experiment.cells[0].config.directory)
    assert [outcome.seconds for outcome in run_cells(experiment)] == [7.0], "begun anew"


def test_a_cells_seconds_are_known_from_its_results_where_no_attempt_noted_them(
    tmp_path: Path,
) -> None:
    experiment = load_experiment(write(tmp_path, methods={"loreft": TWO["loreft"]}))
    run_cells(experiment)
    (row,) = read_cells(experiment)
    path = experiment.cells[0].config.directory / "results.json"
    results = json.loads(path.read_text())
    assert row["train_cpu_seconds"] == results["train"]["cpu_seconds"] > 0
    results["train"]["seconds"] = 1000.0  # most of them before its process was killed
    del results["train"]["cpu_seconds"]  # as on accelerators
    results["tasks"] = {
        "demo": {who: {"value": 1.0, "seconds": 20.0} for who in ("base", "adapter")}
    }
    path.write_text(json.dumps(results))
    for _ in range(2):
        run_cells(experiment)
        (row,) = read_cells(experiment)
        assert (row["train_seconds"], row["seconds"]) == (1000.0, 1020.0)
        assert "train_cpu_seconds" not in row
        (experiment.directory / "cells.jsonl").unlink()


def test_other_settings_in_a_finished_cell_are_not_taken_for_its_results(tmp_path: Path) -> None:
    path = write(tmp_path)
    run_cells(load_experiment(path))
    with pytest.raises(RunError, match=r"other settings \(train\.learning_rate\)"):
        run_cells(load_experiment(path, ["train.learning_rate=0.5"]))
    with pytest.raises(RunError, match=r"evaluate\.limit"):
        run_cells(load_experiment(path, ["evaluate.limit=3"]))
    run_cells(load_experiment(path, ["evaluate.show=3"]))  # changes no number


def test_a_setting_that_an_earlier_version_lacked_was_its_default(tmp_path: Path) -> None:
    path = write(tmp_path)
    (cell,) = load_experiment(path).cells
    run_cells(load_experiment(path))
    config = cell.config.directory / "config.yaml"
    lines = config.read_text().splitlines(keepends=True)
    config.write_text("".join(line for line in lines if "max_grad_norm" not in line))
    assert len(config.read_text()) < len("".join(lines))
    run_cells(load_experiment(path))
    with pytest.raises(RunError, match=r"other settings \(train\.max_grad_norm\)"):
        run_cells(load_experiment(path, ["train.max_grad_norm=0.5"]))


@pytest.mark.parametrize("text", ["", "a: [", "- 1"])
def test_a_finished_cell_whose_config_is_broken_is_told(tmp_path: Path, text: str) -> None:
    experiment = load_experiment(write(tmp_path))
    directory = experiment.cells[0].config.directory
    directory.mkdir(parents=True)
    (directory / "results.json").write_text("{}")
    (directory / "config.yaml").write_text(text)
    with pytest.raises(RunError, match=r"config\.yaml does not say what .* made with"):
        run_cells(experiment)


def test_the_base_model_is_evaluated_once_and_each_run_has_its_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = {"tasks": ["demo"], "limit": 2, "base": True, "show": 0}
    path = write(tmp_path, methods=TWO, evaluate=evaluate)
    calls: list[str] = []
    load = base_model._base_engine
    monkeypatch.setattr(
        base_model, "_base_engine", lambda config: (calls.append(config.name), load(config))[1]
    )
    experiment = load_experiment(path)
    run_cells(experiment)
    assert len(calls) == 1
    alone = load_config(experiment.cells[0].config.directory / "config.yaml").model_copy(
        update={"name": "alone", "output_dir": str(tmp_path)}
    )
    expected = execute(alone)["tasks"]["demo"]["base"]
    for cell in experiment.cells:
        scores = json.loads((cell.config.directory / "results.json").read_text())["tasks"]["demo"]
        assert set(scores) == {"base", "adapter"}
        assert (scores["base"]["value"], scores["base"]["n"]) == (expected["value"], 2)
        kept = (cell.config.directory / "samples" / "base" / "demo.jsonl").read_text()
        assert completions(kept) == completions(
            (alone.directory / "samples" / "base" / "demo.jsonl").read_text()
        )
    more = load_experiment(path, ["evaluate.limit=3", "name=more"])
    assert isinstance(base_scores(more, more.cells[0].config, Silent()), dict)
    assert len(calls) == 2, "other examples are another evaluation"


def completions(samples: str) -> list[str]:
    return [json.loads(line)["completion"] for line in samples.splitlines()[1:]]


def test_cells_in_processes_give_what_one_after_another_gives(tmp_path: Path) -> None:
    one = load_experiment(write(tmp_path, name="one", methods=TWO))
    two = load_experiment(write(tmp_path, name="two", methods=TWO))
    run_cells(one)
    assert set(statuses(run_cells(two, jobs=2)).values()) == {"done"}
    for a, b in zip(one.cells, two.cells, strict=True):
        x, y = (json.loads((c.config.directory / "results.json").read_text()) for c in (a, b))
        assert x["train"]["loss"] == pytest.approx(y["train"]["loss"], rel=1e-4)


def test_cells_of_other_seeds_stay_listed(tmp_path: Path) -> None:
    path = write(tmp_path, methods={"loreft": TWO["loreft"]})
    run_cells(load_experiment(path, seeds=[1]))
    first = read_cells(load_experiment(path))
    run_cells(load_experiment(path, seeds=[2]))
    both = read_cells(load_experiment(path))
    assert [row["cell"] for row in both] == ["loreft-s2", "loreft-s1"]
    assert both[1:] == first
    shutil.rmtree(load_experiment(path, seeds=[1]).cells[0].config.directory)
    run_cells(load_experiment(path, seeds=[2]))
    assert [row["cell"] for row in read_cells(load_experiment(path))] == ["loreft-s2"]


def test_seeds_that_were_run_with_other_settings_are_no_seeds_of_one_arm(tmp_path: Path) -> None:
    path = write(tmp_path, methods={"loreft": TWO["loreft"]})
    run_cells(load_experiment(path, seeds=[1]))
    slower = load_experiment(path, ["train.learning_rate=0.5"], seeds=[2])
    with pytest.raises(RunError, match=r"loreft-s1, another seed of loreft-s2.*learning_rate"):
        run_cells(slower)
    assert not slower.cells[0].config.directory.exists()
    run_cells(load_experiment(path, ["evaluate.show=3"], seeds=[2]))


def test_a_failed_cell_of_another_seed_stays_listed(tmp_path: Path) -> None:
    methods = {"bad": {"adapter": {"method": "lora", "target_modules": ["nowhere"]}}}
    path = write(tmp_path, methods=methods)
    run_cells(load_experiment(path, seeds=[1]))
    run_cells(load_experiment(path, seeds=[2]))
    rows = read_cells(load_experiment(path))
    assert [(row["cell"], row["status"]) for row in rows] == [
        ("bad-s2", "failed"),
        ("bad-s1", "failed"),
    ]


def test_a_base_that_fails_is_not_tried_by_several_processes_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_base(*_: Any) -> None:
        raise OSError("the Hub is away")

    monkeypatch.setattr(cells_module, "base_scores", no_base)
    monkeypatch.setattr(cells_module, "seeing_one_gpu", lambda _: pytest.fail("is started"))
    experiment = load_experiment(write(tmp_path, methods=TWO))
    outcomes = run_cells(experiment, jobs=2)
    assert set(statuses(outcomes).values()) == {"failed"}
    assert "the base model's evaluation: OSError: the Hub is away" in str(outcomes[0].error)


def test_a_judge_gets_the_base_models_replies_too(tmp_path: Path) -> None:
    rows = [{"instruction": "say zz", "output": "z!", "dataset": "koala"}]
    (tmp_path / "alpaca_eval.json").write_text(json.dumps(rows))
    evaluate = {"tasks": ["alpaca_eval"], "max_new_tokens": 3, "base": True, "show": 0}
    path = write(tmp_path, evaluate=evaluate)
    experiment = load_experiment(path, [f"data.data_dir={tmp_path}"])
    assert statuses(run_cells(experiment)) == {"loreft-s42": "done"}
    folder = experiment.cells[0].config.directory / "alpaca_eval"
    assert sorted(p.name for p in folder.iterdir()) == ["adapter.json", "base.json"]
    (tmp_path / "alpaca_eval.json").rename(tmp_path / "elsewhere.json")
    run_cells(experiment)  # what is finished asks for no data
    (reply,) = json.loads((folder / "base.json").read_text())
    assert (reply["instruction"], reply["dataset"]) == ("say zz", "koala")
    assert reply["generator"] == str(experiment.cells[0].config.model)


def test_the_base_models_replies_are_beside_those_of_a_task_with_a_slash(tmp_path: Path) -> None:
    evaluate = {"tasks": ["format/json"], "limit": 2, "base": True, "show": 0}
    experiment = load_experiment(write(tmp_path, evaluate=evaluate))
    run_cells(experiment)
    kept = experiment.cells[0].config.directory / "samples" / "base" / "format" / "json.jsonl"
    before = kept.read_text()
    assert len(before.splitlines()) == 3
    kept.unlink()  # as runs were left before
    run_cells(experiment)
    assert kept.read_text() == before


def killed_at_lora(experiment: Experiment, cell: Any, threads: int) -> Outcome:
    """Be killed, as by the system where memory runs out, in one of the cells."""
    if cell.variant == "lora":
        os._exit(9)
    return RUN_IN_PROCESS(experiment, cell, threads)


RUN_IN_PROCESS = cells_module._in_process


def test_a_killed_process_is_a_failed_cell_and_does_not_stop_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells_module, "_in_process", killed_at_lora)
    experiment = load_experiment(write(tmp_path, methods=TWO))
    outcomes = run_cells(experiment, jobs=2)
    assert statuses(outcomes) == {"loreft-s42": "done", "lora-s42": "failed"}
    assert "killed" in str(outcomes[1].error)
    assert [row["status"] for row in read_cells(experiment)] == ["done", "failed"]


def die_afterwards(experiment: Experiment, cell: Any, threads: int) -> Outcome:
    """Be killed between two cells."""
    threading.Timer(0.3, os._exit, (9,)).start()
    return Outcome(cell.name, cell.variant, cell.point, cell.seed, "failed", "only noted")


def test_a_process_that_is_killed_between_two_cells_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells_module, "_in_process", die_afterwards)
    monkeypatch.setattr(cells_module, "write_cells", lambda *_: time.sleep(1))
    experiment = load_experiment(write(tmp_path, methods=TWO, seeds=[1, 2]))
    outcomes = run_cells(experiment, jobs=2)
    assert [outcome.error for outcome in outcomes] == ["only noted"] * 4


def note_the_gpu(experiment: Experiment, cell: Any, threads: int) -> Outcome:
    """Write what this process may see, from before anything of ours was imported, and no more."""
    note = Path(experiment.cells[0].config.output_dir) / f"{cell.name}.gpu"
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(f"{os.environ.get('CUDA_VISIBLE_DEVICES')} {threads}")
    return Outcome(cell.name, cell.variant, cell.point, cell.seed, "failed", "only noted")


def test_each_process_has_a_gpu_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells_module, "_in_process", note_the_gpu)
    monkeypatch.setattr(cells_module, "usable_cpus", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    experiment = load_experiment(write(tmp_path, methods=TWO, seeds=[1, 2]))
    run_cells(experiment, jobs=2)
    notes = [p.read_text() for p in Path(experiment.cells[0].config.output_dir).glob("*.gpu")]
    assert len(notes) == 4
    assert set(notes) == {"2 4", "5 4"}
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,5"


def test_the_verb_lists_and_runs_and_names_wrong_seeds(tmp_path: Path) -> None:
    path = write(tmp_path, methods=TWO)
    code, output = invoke("experiment", str(path), "--dry-run", "--seeds", "1,2")
    assert code == 0
    assert output.count("pending") == 4
    assert not (tmp_path / "runs").exists()
    code, output = invoke("experiment", str(path), "train.max_steps=1", "--seeds", "1")
    assert code == 0, output
    assert "2 of 2 cells" in output
    code, output = invoke(
        *("experiment", str(path), "train.max_steps=1", "--seeds", "1,2", "--only", "lora*, *-s3")
    )
    assert code == 0, output
    assert "2 of 2 cells" in output
    assert read_cells(load_experiment(path))[-1]["cell"] == "loreft-s1", "stays listed"
    code, output = invoke("experiment", str(path), "--only", "lore")
    assert code == 1
    assert "there are loreft-s42, lora-s42" in output
    code, output = invoke("train", str(path))
    assert code == 1
    assert f"reftune experiment {path}" in output
    code, output = invoke("experiment", str(path), "--seeds", "one")
    assert code == 1
    assert "42,43,44" in output


def invoke(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(args), env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_the_engine_of_the_base_has_no_adapter(tmp_path: Path) -> None:
    config = load_experiment(write(tmp_path)).cells[0].config
    engine = base_model._base_engine(config)
    assert isinstance(engine, HFEngine)
    assert not hasattr(engine.model, "peft_config")
