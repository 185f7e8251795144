"""What the benchmarks of generation and scaling make of their numbers, and how they resume."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import get_peft_model
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import commonsense_likelihood
import generation
import generation_arms
import measure
import scaling
from reftune import ReftConfig
from reftune.models import load_model
from reftune.prompts import encode_prompt
from runs import tiny_run
from tiny import tiny_llama, tiny_tokenizer

HEAD = {"settings": {"threads": 2}, "versions": {"torch": "2"}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results" / "numbers.json"


# --- rounds, kept -------------------------------------------------------------------------------


def run(path: Path, rounds: int, stop_after: int | None = None) -> list[tuple[str, str]]:
    """Measure two cells; return what was measured, in its order."""
    measured: list[tuple[str, str]] = []

    def numbers(cell: str, arm: str) -> float:
        if len(measured) == stop_after:
            raise KeyboardInterrupt
        measured.append((cell, arm))
        return float(len(measured))

    record = measure.Record(path, HEAD)
    cells = {"x": ["a", "b"], "y": ["a", "c"]}
    with contextlib.suppress(KeyboardInterrupt):
        measure.measure_in_turns(record, cells, rounds, numbers, lambda: len(record.cells))
    return measured


def test_arms_take_turns_and_every_cell_gets_a_round_before_any_gets_its_second(path):
    first, second = [("x", "a"), ("x", "b")], [("y", "a"), ("y", "c")]
    expected = [*first, *second, *first[::-1], *second[::-1]]
    assert run(path, 2) == expected
    kept = json.loads(path.read_text())
    assert kept["settings"] == HEAD["settings"]
    assert kept["summary"] == 2
    assert kept["cells"]["x"] == [{"a": 1.0, "b": 2.0}, {"a": 6.0, "b": 5.0}]
    assert [list(numbers) for numbers in kept["cells"]["y"]] == [["a", "c"]] * 2


@pytest.mark.parametrize("stop_after", range(8))
def test_an_interrupted_run_goes_on_with_the_round_it_was_in(path, stop_after):
    whole = run(path.with_name("whole.json"), 2)
    before = run(path, 2, stop_after)
    assert before == whole[:stop_after]
    assert run(path, 2) == whole[stop_after // 2 * 2 :]
    assert run(path, 2) == []
    assert len(run(path, 3)) == 4


@pytest.mark.parametrize("changed", ["settings", "versions"])
def test_numbers_made_otherwise_are_not_mixed(path, changed):
    run(path, 1)
    other = HEAD | {changed: {"threads": 1}}
    with pytest.raises(SystemExit, match=f"other {changed}.*--fresh"):
        measure.Record(path, other)
    assert measure.Record(path, other, fresh=True).cells == {}
    with pytest.raises(SystemExit, match="x was measured with a, b, not with a, c"):
        measure.Record(path, HEAD).missing("x", ["a", "c"], 1)


def test_a_ratio_is_taken_within_a_round():
    """A machine that gets slower does so for both arms of a round."""
    rounds = [{"a": 2.0, "b": 1.0}, {"a": 20.0, "b": 10.0}, {"a": 3.0, "b": 100.0}]
    assert measure.median_ratio(rounds, "a", "b") == 2.0
    assert measure.median_of(rounds, "b") == 10.0


def test_a_table_lines_up():
    lines = measure.table(("x", "rate"), [("long name", "1"), ("b", "12.5")]).splitlines()
    assert lines == ["x          rate", "long name     1", "b          12.5"]


# --- generation ---------------------------------------------------------------------------------


def cells(wanted: list[str], pyreft: bool = False) -> dict[str, Any]:
    return generation.cells_of([1, 8], [16, 4], [1, 8], wanted, pyreft)


def test_cells_are_chosen_by_name():
    assert list(cells(["*"])) == ["startup", "b1-n4", "b8-n4", "mixed-n4", *(
        "b1-n16", "b8-n16", "mixed-n16"
    )]  # fmt: skip
    assert list(cells(["b1-*", "startup"])) == ["startup", "b1-n4", "b1-n16"]
    assert cells(["mixed-n4"])["mixed-n4"].arms[1:3] == ("reftune x1", "reftune x8")
    assert "pyreft" not in cells(["b1-n4"])["b1-n4"].arms
    assert "pyreft" in cells(["b1-n4"], pyreft=True)["b1-n4"].arms
    with pytest.raises(SystemExit, match="b9.*there are startup, b1-n4"):
        cells(["b9*"])


def test_rates_are_of_new_tokens_and_compared_with_the_first_arm():
    rounds = [{"bare": 2.0, "reftune": 4.0}, {"bare": 1.0, "reftune": 1.25}]
    names = ("b8-n16", "mixed-n16", "startup")
    summary = generation.summarise(dict.fromkeys(names, rounds))
    assert summary["b8-n16"]["bare"]["tokens_per_second"] == 8 * 16 / 1.5
    assert summary["mixed-n16"]["bare"]["tokens_per_second"] == 32 * 16 / 1.5
    assert summary["b8-n16"]["reftune"]["of_first"] == pytest.approx(
        (0.5 + 0.8) / 2
    )  # of its speed
    assert summary["startup"]["reftune"]["of_first"] == pytest.approx((2 + 1.25) / 2)  # of its time
    assert "0.650" in generation.report(summary)


def test_prompts_are_of_sixty_tokens_or_so_and_padded_on_the_left():
    tokenizer = tiny_tokenizer()
    batch = generation_arms.prompts(tokenizer, 32, "cpu")
    lengths = batch.mask.sum(-1)
    assert batch.ids.shape == batch.mask.shape == (32, 67)
    assert lengths.min() == 52
    assert lengths.float().mean() == pytest.approx(60, abs=1)
    assert (batch.mask.diff(dim=1) >= 0).all()
    assert batch.ids[batch.mask == 0].eq(tokenizer.pad_token_id).all()
    assert len({tuple(row) for row in batch.ids.tolist()}) == 32


# PEFT 0.21 asks a model for a property that transformers 5.23 deprecates.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_generation_is_checked_measured_and_resumed(tmp_path, path, monkeypatch, capsys):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    given = ["--model", str(tmp_path / "model"), "--out", str(path), "--threads", "1"]
    given += ["--batches", "2", "--new-tokens", "2", "--adapters", "1", "3", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["generation.py", *given, "--cells", "b*", "mixed*"])
    threads = torch.get_num_threads()
    generation.main()
    first = path.read_text()
    generation.main()
    torch.set_num_threads(threads)
    kept = json.loads(first)
    assert kept["checks"] == dict.fromkeys(
        [
            "reftune at strength 0 is bare",
            "reftune is not bare",
            "lora is not bare",
            "lora merged is lora",
            "lora mixed is each alone",
            "reftune mixed is each alone",
        ],
        True,
    )
    assert {name: len(rounds) for name, rounds in kept["cells"].items()} == {
        "b2-n2": 2,
        "mixed-n2": 2,
    }
    assert json.loads(path.read_text())["cells"] == kept["cells"]
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == kept["summary"]


# --- scaling ------------------------------------------------------------------------------------


def test_points_differ_from_the_default_in_one_factor():
    points = scaling.points_of(list(scaling.FACTORS))
    assert points.pop("default") == scaling.DEFAULT
    assert len(set(points.values())) == len(points)
    for name, point in points.items():
        differing = {f for f in scaling.FACTORS if getattr(point, f) != getattr(scaling.DEFAULT, f)}
        assert differing == {name.partition("=")[0]}
    for factor, values in scaling.FACTORS.items():
        assert getattr(scaling.DEFAULT, factor) in values


def test_a_panel_has_what_was_measured_of_its_factor(tmp_path):
    numbers = dict.fromkeys(scaling.NUMBERS, 1.0)
    summary = scaling.summarise(
        {"default": [numbers], "rank=1": [numbers, dict.fromkeys(scaling.NUMBERS, 3.0)]}
    )
    curves = scaling.curves(summary, ["rank", "width"])
    assert [value for value, _ in curves["rank"]] == [1, 8]
    assert curves["rank"][0][1]["milliseconds"] == 2.0
    assert [value for value, _ in curves["width"]] == [256]
    scaling.plot(summary, ["rank", "width"], tmp_path / "panels.png")
    assert (tmp_path / "panels.png").stat().st_size > 1000
    assert "2.0" in scaling.report(summary, ["rank"])


# PEFT 0.21 asks a model for a property that transformers 5.23 deprecates.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_a_point_is_a_training_run(monkeypatch):
    sent: list[dict[str, float]] = []

    class Sender:
        def send(self, numbers: dict[str, float]) -> None:
            sent.append(numbers)

    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    monkeypatch.setattr(scaling, "STEPS", 2)
    point = scaling.Point(layers=2, length=32, batch=2, examples=20, width=32)
    scaling._measure_here(point, 1, "cpu", Sender())
    torch.set_num_threads(threads)
    logging.set_verbosity(verbosity)
    assert list(sent[0]) == list(scaling.NUMBERS)
    assert sent[0]["milliseconds"] > 0
    assert sent[0]["first_step_seconds"] > 0
    assert sent[0]["mebibytes"] >= 0


# --- commonsense by likelihood --------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_the_most_probable_option_is_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run and its base, by the model's probabilities; scored again only with other rows."""
    rows = [
        {"instruction": f"is it {c}?\n\nAnswer format: true/false", "answer": answer}
        for c, answer in zip("abcd", ["true", "false", "true", "true"], strict=True)
    ]
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq/test.json").write_text(json.dumps(rows))
    config = tiny_run(
        tmp_path,
        data={"template": "commonsense"},
        train={"max_steps": 1},
        evaluate={"tasks": ["boolq"], "limit": 3},
    )
    (config.directory / "adapter").mkdir(parents=True)
    (config.directory / "results.json").write_text("{}")
    (config.directory / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    torch.manual_seed(0)
    tuned = get_peft_model(tiny_llama(), ReftConfig(task_type="CAUSAL_LM", layers="all", r=2))
    tuned.save_pretrained(str(config.directory / "adapter"))
    out = tmp_path / "new folder"
    arguments = [str(config.directory.parent), "--data-dir", str(tmp_path), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["commonsense_likelihood.py", *arguments])
    commonsense_likelihood.main()
    kept = json.loads((out / "runs-likelihood.json").read_text())["cells"]
    assert list(kept) == ["base", "run"]
    model, tokenizer = load_model(config.model)
    expected = []
    for row in rows[:3]:
        prompt = encode_prompt(row["instruction"], tokenizer, "commonsense")
        scores = {}
        for option in ("true", "false"):
            text = f"the correct answer is {option}"
            answer = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids = torch.tensor([prompt + answer])
            with torch.no_grad():
                logprobs = model.eval()(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
            scores[option] = logprobs.gather(-1, ids[0, len(prompt) :, None]).sum().item()
        expected.append(int(max(scores, key=scores.__getitem__) == row["answer"]))
    assert kept["base"]["right"] == {"boolq": expected}
    assert "base (1): boolq" in capsys.readouterr().out
    with monkeypatch.context() as scored:
        scored.setattr(commonsense_likelihood, "score", None)
        commonsense_likelihood.main()
    (tmp_path / "boolq/test.json").write_text(json.dumps(rows[::-1]))
    commonsense_likelihood.main()
    again = json.loads((out / "runs-likelihood.json").read_text())["cells"]
    assert again["run"]["of"]["rows"] != kept["run"]["of"]["rows"]
    assert again["run"]["of"]["model"] == kept["run"]["of"]["model"]


def test_options_that_are_level_share_the_point() -> None:
    """None is preferred for its name or its place."""
    best = commonsense_likelihood.best_of(["true", "false", "maybe"], [-1.0, -1.0, -2.0])
    assert best == ["true", "false"]
    points = [commonsense_likelihood.point(best, gold) for gold in ("true", "false", "maybe")]
    assert points == [0.5, 0.5, 0]


def test_a_head_in_float32_tells_apart_what_16_bits_do_not() -> None:
    model = tiny_llama().to(torch.bfloat16).eval()
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        coarse = model(ids).logits[0, -1]
        embedded = model.get_input_embeddings()(ids)
        commonsense_likelihood.with_float32_head(model)
        fine = model(ids).logits[0, -1]
    assert (fine.dtype, coarse.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(fine, coarse.float(), atol=1e-2, rtol=1e-2)
    assert len(fine.unique()) == len(fine) > len(coarse.unique())
    assert torch.equal(model.get_input_embeddings()(ids), embedded), "the input's are untouched"


def test_a_table_is_of_methods_over_seeds() -> None:
    cells = {
        "base": {"right": {"a": [0, 0], "b": [1, 0]}},
        "loreft-s1": {"right": {"a": [1, 0], "b": [1, 1]}},
        "loreft-s2": {"right": {"a": [1, 1], "b": [1, 1]}},
    }
    assert commonsense_likelihood.table(cells) == [
        "base (1): a 0.0, b 50.0, average 25.0",
        "loreft (2): a 75.0 ± 35.4, b 100.0 ± 0.0, average 87.5 ± 17.7",
    ]
