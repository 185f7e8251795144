"""The training benchmark: the floor's arithmetic, rates and ratios, resuming, what an arm does."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import tiny_llama, tiny_tokenizer

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
# PEFT 0.21 asks a model for a property that transformers 5 deprecates.
PEFT_ASKS = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(autouse=True, scope="module")
def _on_path() -> Iterator[None]:
    """The benchmark is scripts, not a package; its workers import each other by plain names."""
    added = [str(BENCHMARKS), str(BENCHMARKS / "training_peers")]
    sys.path[:0] = added
    yield
    for path in added:
        sys.path.remove(path)


def job(**changes: Any) -> Any:
    from training_peers.job import Job, Row, Setting

    generator = torch.Generator().manual_seed(0)
    rows = [
        Row(torch.randint(3, 250, (length,), generator=generator).tolist(), 4)
        for length in (9, 6, 12, 7, 5, 10, 8, 11)
    ]
    values: dict[str, Any] = {
        "workload": "A",
        "task": "causal",
        "model": "tiny",
        "dtype": "float32",
        "pad_token_id": 0,
        "setting": Setting([0, 1], 2, 1, 1, tied=True),
        "batch_size": 2,
        "epochs": 1,
        "first_steps": 1,
        "whole_run": False,
        "learning_rate": {"reft": 1e-3, "lora": 1e-3},
        "warmup_ratio": 0.1,
        "threads": 1,
        "device": "cpu",
        "seed": 42,
        "examples": rows,
        "heldout": rows[:3],
        "plain_order": list(range(8)),
        "grouped_order": [2, 7, 5, 0, 6, 3, 1, 4],
    }
    return Job(**(values | changes))


# Two layers of width 4 (4 query heads of 1, 2 key heads), a gated MLP of 8, 10 words: a token's
# key and value cost 2*4*2*2 = 32, its query, output and MLP 2*4*2*4 + 2*4*3*8 = 256, a query with
# a key 2*4 + 2*4 = 16, a token of logits 2*4*10 = 80.
CAUSAL = dict(  # noqa: C408
    hidden_size=4, num_layers=2, query_size=4, key_size=2, mlp_size=8, mlp_matrices=3,
    vocabulary=10, causal=True,
)  # fmt: skip


def test_floor_of_prefix_and_suffix() -> None:
    """5 tokens, 3 are prompt: 4 are computed, tokens 2 and 3 read; layer 1 has gradients."""
    from training_peers.floor import Shape, floor_flops

    layer_0 = 4 * (32 + 256) + (1 + 2 + 3 + 4) * 16
    layer_1 = 4 * 32 + 2 * 256 + (3 + 4) * 16
    backward = 4 * 32 + 2 * 256 + 2 * (3 + 4) * 16
    expected = layer_0 + layer_1 + backward + 2 * (2 * 80)
    assert expected == 3248
    assert floor_flops(Shape(**CAUSAL), [(5, 3)], [0, 1], 1, 1) == expected
    assert floor_flops(Shape(**CAUSAL), [(5, 3), (5, 3)], [0], 1, 0) == 2 * expected


def test_floor_of_a_suffix_over_epochs() -> None:
    """Token 2 is edited: no gradient before it; later epochs have tokens 2 and 3 of layer 1."""
    from training_peers.floor import Shape, floor_flops

    first = 4 * (32 + 256) + 10 * 16 + 4 * 32 + 2 * 256 + 7 * 16 + 2 * 80
    later = 2 * (32 + 256) + 7 * 16 + 2 * 80
    # dQ and dP over all 7 keys; dK and dV: token 2 sees one key with a gradient, token 3 two
    backward = 2 * (32 + 256) + (7 + 3) * 16 + 2 * 80
    shape = Shape(**CAUSAL)
    assert floor_flops(shape, [(5, 3)], [0], 0, 1) == first + backward
    assert floor_flops(shape, [(5, 3)], [0], 0, 1, 3) == first + 2 * later + 3 * backward


def test_floor_with_nothing_above_the_edit() -> None:
    """Only the last layer is edited: backward, and later epochs, are the output matrix alone."""
    from training_peers.floor import Shape, floor_flops

    shape = Shape(**CAUSAL)
    once = floor_flops(shape, [(5, 3)], [1], 0, 2)
    assert floor_flops(shape, [(5, 3)], [1], 0, 2, 2) - once == 2 * (2 * 80)


def test_floor_of_layers_between() -> None:
    """Of three layers the first is edited, from token 1 on; the middle one serves all tokens."""
    from training_peers.floor import Shape, floor_flops

    forward = 2 * (4 * (32 + 256) + 10 * 16) + 4 * 32 + 2 * 256 + 7 * 16
    middle = 3 * (32 + 256) + ((2 + 3 + 4) + (1 + 2 + 3)) * 16
    last = 3 * 32 + 2 * 256 + ((3 + 4) + (2 + 3)) * 16
    shape = Shape(**(CAUSAL | {"num_layers": 3}))
    expected = forward + middle + last + 2 * (2 * 80)
    assert floor_flops(shape, [(5, 3)], [0], 0, 2) == expected


def test_floor_of_a_classifier() -> None:
    """An encoder's tokens all see each other; the head reads the first."""
    from training_peers.floor import Shape, floor_flops

    bert = {"model_type": "bert", "hidden_size": 4, "num_hidden_layers": 2, "vocab_size": 10}
    shape = Shape.of(bert | {"num_attention_heads": 2, "intermediate_size": 8})
    # key and value 2*4*2*4 = 64; query, output and a plain MLP 2*4*2*4 + 2*4*2*8 = 192
    layer_0 = 3 * (64 + 192) + 9 * 16
    layer_1 = 3 * 64 + 192 + 3 * 16
    backward = 3 * 64 + 192 + 2 * 3 * 16
    assert floor_flops(shape, [(3, 3)], [0, 1], 3, 0) == layer_0 + layer_1 + backward


def test_rates_leave_out_the_first_steps() -> None:
    from training_peers.report import rates

    lengths = [9, 6, 12, 7, 5, 10, 8, 11]  # 68 tokens, 8.5 each
    contents = [(2, 15), (2, 19), (2, 15), (2, 19)]
    found = rates(job(), {"seconds": [100.0, 2, 3, 5], "contents": contents, "notes": []})
    assert found["tokens_per_second"] == pytest.approx((19 + 15 + 19) / 10)
    assert found["examples_per_second"] == pytest.approx(53 / 10 / (sum(lengths) / 8))
    unknown = rates(job(), {"seconds": [100.0, 2, 3, 5], "contents": None, "notes": []})
    assert unknown["examples_per_second"] == pytest.approx(6 / 10)
    assert unknown["notes"]


def test_rates_of_a_whole_run() -> None:
    """The first step counts once; steps that a peer did not make take its median step."""
    from training_peers.report import rates

    memorise = job(whole_run=True, epochs=3, plain_order=list(range(8)) * 3)  # 12 steps
    measured = {"seconds": [10.0, 1, 2, 9], "contents": None, "notes": []}
    found = rates(memorise, measured)
    assert found["run_seconds"] == pytest.approx(10 + 1 + 2 + 9 + 8 * 2)
    assert found["examples_per_second"] == pytest.approx(24 / found["run_seconds"])


def test_ratios_are_taken_within_a_round() -> None:
    from training_peers.report import summarise, table

    rates = {
        "reftune": [10.0, 20.0, 8.0],
        "lora": [5.0, 4.0, 8.0],  # 2, 5 and 1 times slower: a quotient of medians would say 2
        "floor": [20.0, 25.0, 16.0],
    }
    cells = {
        f"A/{arm}/{n}": {"examples_per_second": rate, "tokens_per_second": 2 * rate}
        for arm, each in rates.items()
        for n, rate in enumerate(each, 1)
    }
    cells["A/adapters/1"] = {"error": "RuntimeError: no"}
    summary = summarise(cells)["A"]
    assert summary["lora"]["reftune_is"] == 2.0
    assert summary["lora"]["examples_per_second"] == 5.0
    assert summary["reftune"]["of_floor"] == 0.5
    assert "reftune_is" not in summary["reftune"]
    assert summary["adapters"] == {"error": "RuntimeError: no"}
    assert "RuntimeError: no" in table({"A": summary})
    # a failed round does not take the others with it
    cells["A/lora/2"] = {"error": "killed"}
    assert summarise(cells)["A"]["lora"]["reftune_is"] == 1.5


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Cells that were measured, in place of measuring them; pyreft's fail."""
    import training

    done: list[str] = []

    def fake(job: Any, arm: str, *_: Any) -> dict[str, Any]:
        done.append(f"{job.workload}/{arm}")
        if arm == "pyreft":
            return {"error": "no"}
        return {"examples_per_second": 1.0, "tokens_per_second": 2.0}

    monkeypatch.setattr(training, "measure_arm", fake)
    return done


def test_finished_cells_are_not_run_again(tmp_path: Path, measured: list[str]) -> None:
    import training

    path = tmp_path / "out.json"
    arms = ["floor", "reftune", "pyreft", "reftune:train.compile=false"]

    def run(jobs: dict[str, Any]) -> list[str]:
        measured.clear()
        training.run(jobs, arms, 2, {}, path, {"machine": "m"})
        return sorted(measured)

    assert run({"A": job()}) == sorted(f"A/{arm}" for arm in arms * 2)
    assert run({"A": job()}) == ["A/pyreft", "A/pyreft"]  # those that failed
    assert len(run({"A": job(threads=2)})) == 8  # another job
    saved = json.loads(path.read_text())
    assert saved["machine"] == "m"
    assert saved["summary"]["A"]["reftune"]["rounds"] == 2
    assert len(saved["cells"]) == 8
    assert run({"A": job(threads=2, model="/elsewhere/tiny")}) == ["A/pyreft", "A/pyreft"]


def test_an_interrupted_benchmark_has_a_whole_file(tmp_path: Path, measured: list[str]) -> None:
    import training

    path = tmp_path / "out.json"
    training.run({"A": job()}, ["floor"], 1, {}, path, {})

    def interrupted(*_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "measure_arm", interrupted)
        with pytest.raises(KeyboardInterrupt):
            training.run({"A": job()}, ["floor", "lora"], 1, {}, path, {})
    assert list(json.loads(path.read_text())["cells"]) == ["A/floor/1"]
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_rounds_take_turns() -> None:
    import training

    turns = list(training.turns(["A", "B"], ["x", "y", "z"], 2))
    assert len(turns) == len(set(turns)) == 12
    assert [arm for n, name, arm in turns if (n, name) == (1, "A")] == ["x", "y", "z"]
    assert [arm for n, name, arm in turns if (n, name) == (2, "A")] == ["y", "z", "x"]


def test_arms_and_workloads_by_name() -> None:
    import training

    overrides = {"train.compile": False, "train.optimizer": "adamw_torch", "adapter.r": 2}
    text = "reftune:train.compile=false,train.optimizer=adamw_torch,adapter.r=2"
    assert training.parse_arm(text) == ("reftune", overrides)
    assert training.workload_names("A,C,E") == ["A", "C10", "C100", "E"]
    for bad in ("lorax", "lora:train.x=1"):
        with pytest.raises(SystemExit, match="--arms"):
            training.parse_arm(bad)
    with pytest.raises(SystemExit, match="--workloads"):
        training.workload_names("A,Z")


def test_a_job_survives_its_file(tmp_path: Path) -> None:
    from training_peers.job import Job

    written = job(overrides={"train.compile": False}, stop_after=3, order="grouped")
    written.write(tmp_path / "job.json")
    read = Job.read(tmp_path / "job.json")
    assert read == written
    assert (read.total_steps, read.steps, read.warmup_steps) == (4, 3, 1)
    assert [len(row.input_ids) for row in read.rows()][:3] == [12, 11, 10]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    tiny_llama().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@PEFT_ASKS
def test_reftune_says_what_each_step_held(tiny_model: Path) -> None:
    """And LoRA is given the same batches, by the job's grouped order."""
    from common import measure
    from lora_worker import Lora
    from reftune_worker import Reftune

    from reftune.train import EpochSampler

    asked = job(model=str(tiny_model), overrides={"train.max_grad_norm": 0.5, "adapter.r": 3})
    order = list(EpochSampler([len(row.input_ids) for row in asked.examples], 2, asked.seed))
    arm = Reftune(asked)
    result = measure(arm)
    peer = Lora(dataclasses.replace(asked, grouped_order=order, order="grouped"))
    assert result["contents"] == peer.contents()
    assert sum(tokens for _, tokens in result["contents"]) == 68
    assert len(result["seconds"]) == 4
    assert result["trainable"] == 2 * (2 * 32 * 3 + 3)
    assert arm.settings().max_grad_norm == 0.5
    assert result["adapter_bytes"] > 4 * result["trainable"]
    assert 4 < result["heldout_loss"] < 40


@PEFT_ASKS
@pytest.mark.parametrize("part", ["labels", "norms", "attention", "products", "dropout"])
def test_a_shortcut_left_out_costs_time_alone(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Losses are the same to rounding, and what it would have called is called no more."""
    import reftune_worker
    from common import measure

    from reftune.speed import attention, dropout, norms, products
    from reftune.speed.training import LabelledLoss

    calls: list[str] = []

    def counted(name: str, owner: Any, function: str) -> None:
        real = getattr(owner, function)
        monkeypatch.setattr(owner, function, lambda *a, **k: calls.append(name) or real(*a, **k))

    counted("labels", LabelledLoss, "_loss")
    counted("norms", norms, "faster")
    counted("attention", attention, "in_training")
    counted("products", products, "attention")
    counted("dropout", dropout, "faster")
    asked = job(model=str(tiny_model))
    whole = measure(reftune_worker.Reftune(asked))
    assert set(calls) == {"labels", "norms", "attention", "products", "dropout"}
    calls.clear()
    left = dataclasses.replace(asked, overrides={f"without.{part}": True})
    found = measure(reftune_worker.Reftune(left))
    assert part not in calls
    assert {"labels", "norms"} - {part} <= set(calls)
    for loss in ("first_loss", "last_loss", "heldout_loss"):
        assert found[loss] == pytest.approx(whole[loss], rel=1e-4)


def test_heldout_loss_is_the_mean_over_tokens(tiny_model: Path) -> None:
    """Padding and batches do not matter: the oracle takes the rows one by one."""
    from common import heldout_loss
    from lora_worker import Lora

    arm = Lora(job(model=str(tiny_model)))
    model = arm.load()
    losses = []
    for row in arm.job.heldout:
        ids = torch.tensor([row.input_ids])
        logits = model(input_ids=ids).logits[0, row.prompt_length - 1 : -1]
        losses += torch.nn.functional.cross_entropy(
            logits, ids[0, row.prompt_length :], reduction="none"
        ).tolist()
    assert heldout_loss(arm, model) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@PEFT_ASKS
def test_a_peer_stops_early_on_the_schedule_of_the_whole_run(
    tiny_model: Path, tmp_path: Path
) -> None:
    from common import Clock
    from lora_worker import Lora

    whole = job(model=str(tiny_model), whole_run=True, warmup_ratio=0.0)
    arm = Lora(dataclasses.replace(whole, stop_after=3))
    clock = Clock(arm.job)
    clock.begin()
    log = arm.train(arm.attach(arm.load()), clock, tmp_path)
    assert len(clock.seconds()) == len(arm.contents() or []) == 3
    rates = {row["step"]: row["learning_rate"] for row in log if "learning_rate" in row}
    assert rates[3] == pytest.approx(1e-3 * 2 / 4), "linear over 4 steps"
