"""The scripts of experiments/: each on a tiny model, and what their numbers mean."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiments import ablate, codebook, common, compose, memorise, negate, overhead, records

from reftune import ReftConfig, options, reft_layers
from reftune import cells as cells_module
from reftune.data import TokenDataset
from reftune.errors import DataError, ReftConfigError, RunError
from reftune.experiment import Experiment
from reftune.generate import HFEngine, Sampling
from reftune.prompts import Example, encode_prompt
from runs import tiny_model_directory
from tiny import tiny_llama, tiny_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    # transformers' Trainer pins memory by a function that torch deprecates
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
]

STORY = "title page\nAlice was beginning to get very tired of sitting by her sister on the bank. "
GOOD, BAD = "a truly lovely film with a warm heart", "a dull and tired film without any wit"


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Keep the number of threads, which a script sets, and the random state."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return a folder with a tiny model and a few rows of everything that is read."""
    tiny_model_directory(tmp_path)
    reviews = [{"sentence": f"{t} {i} times over again", "label": k}
               for i in range(12) for k, t in enumerate((BAD, GOOD))]  # fmt: skip
    questions = [{"text": f"What is thing {i}?", "label": i % 6} for i in range(48)]
    answers = [
        {"instruction": f"Say {i}", "input": "", "output": f"It is {i}. And more."}
        for i in range(40)
    ]
    write(tmp_path / "alice_in_wonderland.txt", STORY * 4)
    write(tmp_path / "alpaca_en_demo.json", json.dumps(answers))
    write(tmp_path / "sst2/train.jsonl", *map(json.dumps, reviews))
    write(tmp_path / "sst2/dev.jsonl", *map(json.dumps, reviews[:8]))
    write(tmp_path / "TREC.train.all.jsonl", *map(json.dumps, questions[:36]))
    write(tmp_path / "TREC.test.all.jsonl", *map(json.dumps, questions[36:]))
    return tmp_path


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines))


def run(script: Any, place: Path, *more: str) -> Any:
    """Run a script as from a shell; return its summary."""
    given = ["--model", str(place / "model"), "--data-dir", str(place), "--out", str(place / "out")]
    return script.main([*given, "--threads", "1", *more])


def kept(place: Path, name: str) -> Any:
    """Return a results file, after a look at its picture."""
    assert (place / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((place / "out" / f"{name}.json").read_text())


# --- what they share ------------------------------------------------------------------------------


def pairs() -> TokenDataset:
    examples = [Example(f"say {c}", f" {c}{c}") for c in "abcd"]
    return TokenDataset.from_examples(examples, tiny_tokenizer(), "none", 32, cache_dir=None)


def two_skills() -> ReftConfig:
    return ReftConfig(
        task_type="CAUSAL_LM",
        r=4,
        layers=[0],
        positions="l1",
        subspaces={"a": [0, 1], "b": [2, 3]},
    )


def test_a_step_is_the_mean_of_its_batches_each_with_its_subspaces() -> None:
    data, collator = pairs(), common.Collator(0)
    batches = [common.Batch([0, 1], ["a"]), common.Batch([2, 3], ["b"]), common.Batch([0, 3])]
    with common.attached(tiny_llama(), two_skills(), 0) as model:
        expected = []
        for batch in batches:
            inputs = collator([data[i] for i in batch.rows])
            with options(subspaces=batch.subspaces), torch.no_grad():
                expected.append(float(model(**inputs).loss))
        (loss,) = common.train(model, data, [batches], 1e-2, 0)
    assert loss == pytest.approx(sum(expected) / 3, rel=1e-4)
    assert len({round(x, 3) for x in expected}) == 3


@pytest.mark.parametrize(("taught", "others"), [("a", slice(2, 4)), ("b", slice(0, 2))])
def test_a_skill_is_learned_in_its_own_rows(taught: str, others: slice) -> None:
    with common.attached(tiny_llama(), two_skills(), 0) as model:
        (layer,) = reft_layers(model).values()
        before = layer.phi("default").W.detach().clone()
        losses = common.train(model, pairs(), [[common.Batch(range(4), [taught])]] * 20, 0.1, 0)
        change = (layer.phi("default").W.detach() - before)[0].abs().amax(-1)
    assert losses[-1] < losses[0]
    assert change[others].max() == 0
    assert change.max() > 0


def test_training_ends_when_it_is_told_to() -> None:
    with common.attached(tiny_llama(), two_skills(), 0) as model:
        steps = [[common.Batch([0])]] * 9
        seen = []
        common.train(model, pairs(), steps, 0.1, 0, stop=lambda n, _: seen.append(n) or n == 3)
    assert seen == [1, 2, 3]


def test_a_model_is_bare_again_after_a_cell() -> None:
    model = tiny_llama()
    with common.attached(model, two_skills(), 0) as adapted:
        assert reft_layers(adapted)
    assert not reft_layers(model)
    assert not hasattr(model, "peft_config")


def test_every_example_is_in_an_epoch_once() -> None:
    batches = common.shuffled(10, 4, 3, torch.Generator().manual_seed(0))
    assert [len(b) for b in batches] == [4, 4, 2] * 3
    epochs = [[n for batch in batches[i : i + 3] for n in batch] for i in (0, 3, 6)]
    assert [sorted(e) for e in epochs] == [list(range(10))] * 3
    assert epochs[0] != epochs[1]


def test_what_is_measured_is_not_measured_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("--layers", "0", "--sizes", "2", "3", "--epochs", "2")
    learn, calls = codebook.learn, []

    def stopped(*args: Any) -> Any:
        calls.append(args[2])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return learn(*args)

    monkeypatch.setattr(codebook, "learn", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(codebook, place, *asked)
    first = json.loads((place / "out/codebook.json").read_text())["cells"]
    assert list(first) == ["2 pairs, layer 0"]
    run(codebook, place, *asked)
    run(codebook, place, *asked)
    assert [len(pairs) for pairs in calls] == [2, 3, 3]
    found = kept(place, "codebook")
    assert found["cells"]["2 pairs, layer 0"] == first["2 pairs, layer 0"]
    with pytest.raises(RunError, match="other settings.*epochs 2, now 3.*--fresh"):
        run(codebook, place, *asked[:-1], "3")


@pytest.mark.parametrize("sizes", [("2", "3"), ("3", "2")])
def test_a_cell_that_diverges_does_not_keep_another_from_its_result(
    place: Path, monkeypatch: pytest.MonkeyPatch, sizes: tuple[str, ...]
) -> None:
    asked = ("--layers", "0", "--epochs", "3", "--sizes")
    run(codebook, place, *asked, "2", "--out", str(place / "alone"))
    alone = json.loads((place / "alone/codebook.json").read_text())["cells"]["2 pairs, layer 0"]
    learn = codebook.learn

    def too_fast(*given: Any) -> Any:
        rate = float("inf") if len(given[2]) == 3 else given[-1].learning_rate
        return learn(*given[:-1], argparse.Namespace(**vars(given[-1]) | {"learning_rate": rate}))

    with monkeypatch.context() as patch:
        patch.setattr(codebook, "learn", too_fast)
        with pytest.raises(RunError) as failure:
            run(codebook, place, *asked, *sizes)
    assert "1 of 2 cells have no result: 3 pairs, layer 0 (the loss is nan at" in str(failure.value)
    assert not (place / "out/codebook.png").exists()
    cells = json.loads((place / "out/codebook.json").read_text())["cells"]
    assert list(cells) == ["2 pairs, layer 0"]
    same = ("accuracy", "first_token", "loss", "epochs")
    assert [cells["2 pairs, layer 0"][n] for n in same] == [alone[n] for n in same]
    run(codebook, place, *asked, *sizes)
    assert set(kept(place, "codebook")["cells"]) == {"2 pairs, layer 0", "3 pairs, layer 0"}


def test_a_wrong_request_says_what_to_do(place: Path) -> None:
    with pytest.raises(ReftConfigError, match=r"layers has \[7\].*layers 0 to 1"):
        run(memorise, place, "--layers", "7")
    with pytest.raises(DataError, match=r"reads alice_in_wonderland.txt.*has none"):
        run(memorise, place, "--data-dir", str(place / "model"))
    with pytest.raises(DataError, match="--data-dir"):
        ablate.main(["--model", str(place / "model"), "--out", str(place)])


# --- memorisation and codebook --------------------------------------------------------------------


def test_the_last_layer_reaches_one_token_and_no_more(place: Path) -> None:
    """The mechanical part of the paper's claim: after its first token the base model goes on."""
    asked = ("--kinds", "random", "--layers", "1", "--control-lengths", "1", "3", "--epochs", "60")
    run(memorise, place, *asked, "--method", "loreft", "--rank", "8", "--learning-rate", "0.1")
    cells = kept(place, "memorise")["cells"]
    one, three = (cells[f"random {length} tokens, layer 1"] for length in (1, 3))
    assert (one["right_tokens"], one["recovered"]) == (1, 1.0)
    assert one["epochs"] < 60  # training ended when all was right
    assert three["right_tokens"] == 1
    assert three["recovered"] == pytest.approx(1 / 3)
    assert three["epochs"] == 60


def test_what_is_right_step_by_step_is_what_greedy_decoding_writes() -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    prompt = tokenizer(memorise.PROMPT).input_ids
    (own,) = HFEngine(model, tokenizer).generate([prompt], Sampling(max_new_tokens=12))
    ids = list(own.token_ids)
    for wrong_at in (0, 5, 11, None):
        target = list(ids)
        if wrong_at is not None:
            target[wrong_at] = 3 + (ids[wrong_at] - 2) % 256
        right = memorise.right_tokens(model, torch.tensor([*prompt, *target]), len(prompt))
        assert right == (12 if wrong_at is None else wrong_at)


def test_texts_to_memorise() -> None:
    tokenizer = tiny_tokenizer()
    story = memorise.alice(STORY)
    assert story.startswith("Alice")
    of = {k: memorise.text_ids(k, story, tokenizer, 30, 0) for k in memorise.KINDS}
    assert tokenizer.decode(of["alice"]) == story[:30]
    assert set(tokenizer.decode(of["scrambled"]).split()[:-1]) < set(story.split())
    assert tokenizer.decode(of["scrambled"]) != story[:30]
    assert all(i > 2 for i in of["random"])
    assert of["random"] == memorise.text_ids("random", story, tokenizer, 30, 0)
    with pytest.raises(DataError, match="fewer than --lengths"):
        memorise.text_ids("alice", story, tokenizer, 10_000, 0)
    assert memorise.common_prefix("abcd", "abx") == 2
    assert memorise.common_prefix("ab", "abx") == 2


def test_a_pair_is_learned_where_greedy_decoding_writes_the_word_and_no_more() -> None:
    """Trained at no rate an adapter writes what a fresh one does: only that is right."""
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    prompts = [f"RAND#ID{i}->" for i in range(4)]
    argv = ["--epochs", "1", "--learning-rate", "1e-12", "--rank", "8", "--layers", "0"]
    args = codebook.arguments_of(argv)
    config = ReftConfig(task_type="CAUSAL_LM", method="consreft", r=8, layers=[0], positions="l1")
    with common.attached(model, config, args.seed) as adapted:
        ids = [tokenizer(prompt).input_ids for prompt in prompts]
        sampling = Sampling(max_new_tokens=codebook.LONGEST)
        texts = [w.text for w in HFEngine(adapted, tokenizer).generate(ids, sampling)]
    wrong = [texts[0], texts[1][:-1], texts[2] + "x", texts[3]]
    pairs = [Example(p, text) for p, text in zip(prompts, wrong, strict=True)]
    found = codebook.learn(model, tokenizer, pairs, 0, args)
    assert found["accuracy"] == 0.5
    assert found["first_token"] >= 0.75  # a word that goes on begins right
    assert found["epochs"] == 1


def test_the_words_of_a_codebook_are_different() -> None:
    book = codebook.codebook(STORY, 8, 0)
    assert len({pair.completion for pair in book}) == len({pair.prompt for pair in book}) == 8
    with pytest.raises(DataError, match="different words"):
        codebook.codebook(STORY, 100, 0)


# --- composition ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "capitals", "json_", "opens"),
    [
        ("PARIS IS IN FRANCE.", True, False, False),
        ('{"answer": "Paris."}', False, True, True),
        ('{"answer": "PARIS."}', True, True, True),
        ('{"ANSWER": "PARIS."}', True, True, True),
        ('{"answer": "PARIS', True, False, True),
        ('{"answer": "Paris.", "more": 1}', False, False, True),
        ('{"answer": 4}', False, False, True),
        ("4", False, False, False),
        ("", False, False, False),
    ],
)
def test_properties_are_told_by_rule(text: str, capitals: bool, json_: bool, opens: bool) -> None:
    found = (compose.is_capitals(text), compose.is_json(text), compose.opens_json(text))
    assert found == (capitals, json_, opens)


def test_what_is_taught_has_the_property() -> None:
    example = Example("?", 'He said "yes".')
    assert compose.is_capitals(compose.taught(example, "capitals").completion)
    assert compose.is_json(compose.taught(example, "json").completion)
    assert compose.first_sentence("One. Two.\nThree") == "One."


def test_composition(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing on the base model answers; the subspaces on are those of the arm."""
    seen: dict[str, list[str]] = {}
    shares = compose.shares
    monkeypatch.setattr(
        compose, "shares", lambda texts: seen.setdefault(str(len(seen)), texts) and shares(texts)
    )
    asked = ("--examples", "8", "--tests", "4", "--epochs", "3", "--learning-rate", "0.1")
    asked += ("--new-tokens", "24")
    run(compose, place, *asked, "--layers", "0")  # the last one reaches one token only
    arms = kept(place, "compose")["cells"]["arms"]
    assert set(compose.ARMS) < set(arms)
    examples = compose.short_answers(place / "alpaca_en_demo.json", 20)[16:]
    tokenizer = tiny_tokenizer()
    prompts = [encode_prompt(e.prompt, tokenizer, "auto") for e in examples]
    base = HFEngine(tiny_llama(), tokenizer).generate(prompts, Sampling(max_new_tokens=24))
    assert seen["0"] == [w.text for w in base]
    assert len({tuple(texts) for texts in seen.values()}) == 4


# --- strength -------------------------------------------------------------------------------------


def test_the_word_list_is_of_words_that_tell() -> None:
    listed = negate.word_list([(GOOD, 1), (BAD, 0)] * 10, frequent=5)
    assert listed["lovely"] == listed["warm"] == 1
    assert listed["dull"] == listed["tired"] == -1
    assert "film" not in listed
    assert "a" not in listed
    found = negate.sentiment(["lovely lovely dull", "so dull"], listed)
    assert found["sentiment"] == 0.0
    assert found["positive texts"] == found["negative texts"] == 0.5
    assert found["repeated"] == pytest.approx(1 / 5)


def test_strength_0_is_the_base_model_and_others_are_not(place: Path) -> None:
    asked = ("--strengths", "-1", "0", "1", "--examples", "8", "--tests", "4", "--new-tokens", "8")
    texts = []
    for rate in ("0.1", "0.01"):
        run(negate, place, *asked, "--learning-rate", rate, "--fresh")
        cell = kept(place, "negate")["cells"]["strengths"]
        texts.append([cell[c]["texts"] for c in ("-1", "0", "1")])
    assert texts[0][1] == texts[1][1]
    assert texts[0][1] not in (texts[0][0], texts[0][2])
    assert texts[0][0] != texts[0][2]


# --- overhead -------------------------------------------------------------------------------------


def test_overhead_is_a_ratio_within_a_round(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that gets slower does so for both arms; the bare model has no adapter."""
    calls: list[bool] = []

    def generate(model: Any, ids: torch.Tensor, new: int) -> float:
        slower = (1, 10, 1)[len(calls) // 11 % 3]  # there are eleven calls in a round
        calls.append(bool(reft_layers(model)))
        disturbed = 50 if calls[-1] and (len(calls) - 1) % 33 >= 22 else 1
        return slower * disturbed * (3.0 if calls[-1] else 2.0) * (1 if new > 1 else 0.5)

    monkeypatch.setattr(overhead, "generate", generate)
    summary = run(overhead, place, "--sweeps", "rank", "--rounds", "3")
    assert summary == {"rank": dict.fromkeys(("1", "4", "8", "16", "32"), 1.5)}
    assert calls[:11] == [False] * 5 + [True] * 6
    assert calls[11:22] == [True] * 6 + [False] * 5
    cell = kept(place, "overhead")["cells"]["rank 8"]
    assert cell["first"] == 1.5
    assert len(cell["rounds"]) == 3
    monkeypatch.setattr(records, "machine", lambda: {"cpus": 96})
    with pytest.raises(RunError, match="other machine.*cpus .*, now 96.*--fresh"):
        run(overhead, place, "--sweeps", "rank", "prompt", "--rounds", "3")


def test_overhead_of_real_generation(place: Path) -> None:
    summary = run(overhead, place, "--quick")
    assert all(ratio > 0 for sweep in summary.values() for ratio in sweep.values())
    assert list(summary) == ["layers", "rank", "positions", "prompt"]
    for cell in kept(place, "overhead-quick")["cells"].values():
        assert all(0 < r["hooks"] < r["adapted whole"] for r in cell["rounds"])


def test_hooks_are_timed_in_a_block_alone() -> None:
    """One for each edited layer and two for each module on the way to it, every forward."""
    model = tiny_llama()
    ids = torch.arange(8)[None]
    with common.attached(model, ReftConfig(task_type="CAUSAL_LM", layers=[0, 1], r=2), 0) as tuned:
        expected = tuned.eval()(ids).logits
        with overhead.clocked(tuned, ids) as taken:
            assert torch.equal(tuned(ids).logits, expected)
            calls = len(taken)
            overhead.generate(tuned, ids, 3)
            assert len(taken) == calls * 4
        tuned(ids)
    assert len(taken) == calls * 4
    assert calls >= 2 + 2
    assert all(seconds >= 0 for seconds in taken)


@pytest.mark.parametrize(("layers", "expected"), [(2, [7, 22]), (4, [3, 11, 18, 26])])
def test_layers_are_spread_evenly(layers: int, expected: list[int]) -> None:
    config = overhead.Setting(layers=layers, positions=3).config(30)
    assert config.layers == expected
    assert config.positions == "f1+l2"
    assert overhead.Setting(layers=9).config(2).layers == [0, 1]


# --- layers and positions -------------------------------------------------------------------------


def test_ablation(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal rank and equal parameters are what they say, measured on the models as trained."""
    asked = ("--quick", "--examples", "16", "--tests", "4")
    run(ablate, place, *asked, "--runs", str(place / "runs"))
    cells = kept(place, "ablate-quick")["cells"]
    assert cells["one_l1_r4"]["parameters"] * 2 == cells["all_l1_r4"]["parameters"]
    assert cells["one_l1_r8"]["parameters"] == cells["all_l1_r4"]["parameters"]
    assert cells["lora"]["parameters"] == pytest.approx(cells["all_l1_r4"]["parameters"], rel=0.05)
    made = ablate.variants(str(place / "model"), 4, 1e-3, 1e-2, 1e-4)
    rates = {name: variant["train"]["learning_rate"] for name, variant in made.items()}
    assert (rates["one_l1_r4"], rates["one_l1_r8"]) == (1e-2, 1e-3)
    assert (rates["all_l1_r4"], rates["lora"]) == (1e-3, 1e-4)
    # Other seeds' cells are in the same folder.
    asked = (*asked, "--runs", str(place / "runs"))
    run(ablate, place, *asked, "--seeds", "2", "--out", str(place / "second"))
    found = json.loads((place / "second" / "ablate-quick.json").read_text())
    assert all(list(numbers["of seeds"]) == ["2"] for numbers in found["cells"].values())
    # More seeds are no other settings: what is finished is not run again, wherever it was.
    with monkeypatch.context() as patch:
        patch.setattr(cells_module, "run_cell", None)
        patch.setattr(ablate, "machine", lambda: {"cpus": 96})
        run(ablate, place, *asked, "--seeds", "42", "2")
        both = kept(place, "ablate-quick")
        run(ablate, place, *asked, "--seeds", "2")
    assert both["machines"] == [records.machine()]
    for name, numbers in both["cells"].items():
        each = cells[name]["accuracy"], found["cells"][name]["accuracy"]
        assert numbers["of seeds"] == dict(zip(("42", "2"), each, strict=True))
        assert numbers["accuracy"] == pytest.approx(sum(each) / 2)
    again = kept(place, "ablate-quick")["cells"]
    assert all(list(numbers["of seeds"]) == ["2"] for numbers in again.values())
    with pytest.raises(RunError, match="--fresh"):
        run(ablate, place, *asked, "--rank", "2")
    run(ablate, place, *asked, "--rank", "2", "--fresh")
    assert kept(place, "ablate-quick")["settings"]["rank"] == 2


@pytest.mark.parametrize("fresh", [True, False])
def test_an_ablation_with_a_cell_that_failed_says_what_to_do(tmp_path: Path, fresh: bool) -> None:
    row = {"cell": "lora-s42", "status": "failed", "error": "no memory"}
    write(tmp_path / cells_module.CELLS, json.dumps(row))
    experiment = Experiment("x", tmp_path, (SimpleNamespace(name="lora-s42"),), False, "")
    with pytest.raises(RunError, match="lora-s42: no memory. The same command") as failure:
        ablate.collect(experiment, fresh)
    assert ("Leave out --fresh" in str(failure.value)) is fresh


def test_the_grids_hold_the_lowest_ranks_and_the_highest() -> None:
    """All layers have one rank: the parameters of theirs are those that are compared."""
    accuracy = {"one_l1_r4": 0.1, "one_l1_r40": 0.2, "all_l1_r4": 0.3, "one_f1_l1_r4": 0.4}
    accuracy |= {"one_f1_l1_r40": 0.5, "all_f1_l1_r4": 0.6, "lora": 0.7}
    found = ablate.grids({name: {"accuracy": value} for name, value in accuracy.items()}, 4)
    everything = {"l1": 0.3, "f1+l1": 0.6}
    assert found["rank"] == {"one": {"l1": 0.1, "f1+l1": 0.4}, "all": everything}
    assert found["parameters"] == {"one": {"l1": 0.2, "f1+l1": 0.5}, "all": everything}


def test_effects_are_means_over_the_other_choice() -> None:
    grid = {"one": {"l1": 0.0, "all": 0.2}, "all": {"l1": 0.4, "all": 1.0}}
    found = ablate.effects(grid)
    assert found["layers"] == pytest.approx({"one": 0.1, "all": 0.7})
    assert found["positions"] == pytest.approx({"l1": 0.2, "all": 0.6})
