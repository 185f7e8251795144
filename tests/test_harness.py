"""lm-eval: strength 0 scores as its own `hf` model, an adapter as one example at a time."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import LoraConfig, PeftModel, get_peft_model
from sqlitedict import SqliteDict
from typer.testing import CliRunner

from adapted_tiny import config, reft, strong
from hub_tiny import BASE, files_in, hub_in_place
from reftune.controls import set_strength
from reftune.errors import ReftConfigError
from reftune.generate import HFEngine, Sampling
from reftune.harness import ReftuneLM, run_tasks
from reftune.likelihood import Pair, Scorer
from reftune.run import Loaded
from reftune_cli import app, evaluation
from runs import tiny_model_directory
from tiny import tiny_llama, tiny_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(lm_eval|evaluate|datasets|sacrebleu)"),
]

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TOKENIZER = tiny_tokenizer()
TOKENIZER.chat_template = TEMPLATE
MAX_LENGTH = 40
CONTEXTS = ["The cat", "short ", "", "A context that does not fit into so few tokens, by far", "Q"]
CONTINUATIONS = [" sat", " sat down", " b", " c", "x", "xy"]


def loglikelihoods() -> list[Instance]:
    return [request("loglikelihood", c, k) for c in CONTEXTS for k in CONTINUATIONS]


def request(kind: str, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def ours(model: Any = None, **settings: Any) -> ReftuneLM:
    model = model or reft(positions="f2+l3")
    return ReftuneLM(Loaded(model, TOKENIZER, "tiny"), **{"max_length": MAX_LENGTH, **settings})


def theirs(model: Any = None, **settings: Any) -> HFLM:
    settings = {"max_length": MAX_LENGTH, "batch_size": 3, **settings}
    return HFLM(model or tiny_llama(), backend="causal", tokenizer=TOKENIZER, **settings)


def assert_same(found: list[Any], expected: list[Any]) -> None:
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    values = [[value for value, _ in answers] for answers in (found, expected)]
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def by_hand(model: PeftModel, context: str, continuation: str) -> tuple[float, bool]:
    """Score one request by lm-eval's rules, in one forward whose prompt's length is an argument."""
    before = list(TOKENIZER(context.rstrip()).input_ids)  # spaces at its end go over
    after = list(TOKENIZER(context[len(context.rstrip()) :] + continuation).input_ids)
    ids = ((before or [TOKENIZER.bos_token_id]) + after)[-(MAX_LENGTH + 1) :]
    n = len(ids) - len(after)
    told = torch.tensor([n if context else 0])
    logits = model(input_ids=torch.tensor([ids[:-1]]), prompt_lengths=told).logits[0, n - 1 :]
    target = torch.tensor(ids[n:])
    value = logits.log_softmax(-1).gather(-1, target[:, None]).sum()
    return float(value), bool((logits.argmax(-1) == target).all())


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write three tasks with a data set of their own; return the folder of their YAMLs."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": f"What is {i}?", "choices": [f"it is {i}", "no", f"{i} {i}"], "label": i % 3}
        for i in range(9)
    ]
    for split, part in (("train", rows[:3]), ("test", rows[3:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {s: str(folder / f"{s}.jsonl") for s in ("train", "test")},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "fewshot_split": "train",
        "doc_to_text": "Q: {{question}}\nA:",
    }
    choice = {
        "task": "tiny_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    write = {
        "task": "tiny_write",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
    }
    text = {
        "task": "tiny_text",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    }
    for task in (choice, write, text):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump({**common, **task}))
    return folder


def numbers(values: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of a task without its name and what has no standard error."""
    return {name: v for name, v in values.items() if isinstance(v, float)}


NAMES = ["tiny_choice", "tiny_write", "tiny_text"]


def manager_of(folder: Path) -> TaskManager:
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluate(lm: Any, folder: Path, **settings: Any) -> dict[str, dict[str, Any]]:
    """Return the metrics and, for each request of a task, the model's answers."""
    manager = manager_of(folder)
    found = simple_evaluate(model=lm, tasks=NAMES, task_manager=manager, **settings)
    answers = {
        task: {"answers": [s["resps"] for s in found["samples"][task]]} for task in found["samples"]
    }
    return {task: {**values, **answers[task]} for task, values in found["results"].items()}


@pytest.mark.parametrize("batch_size", [1, 4, "auto"])
def test_strength_0_scores_as_lm_evals_own_model(batch_size):
    requests = loglikelihoods()
    lm = ours(strength=0.0, batch_size=batch_size)
    assert_same(lm.loglikelihood(requests), theirs().loglikelihood(requests))
    texts = [request("loglikelihood_rolling", text) for text in ("abc", "a longer text " * 8)]
    expected = theirs().loglikelihood_rolling(texts)
    assert lm.loglikelihood_rolling(texts) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("positions", ["f2+l3", "l1", "all"])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_an_adapter_scores_as_one_example_at_a_time(positions, batch_size):
    model = reft(positions=positions)
    found = ours(model, batch_size=batch_size).loglikelihood(loglikelihoods())
    expected = [by_hand(model, c, k) for c in CONTEXTS for k in CONTINUATIONS]
    assert_same(found, expected)


def test_lm_evals_own_model_edits_elsewhere():
    """Why there is a model of our own: `hf` with the adapter takes everything for the prompt."""
    model = reft(positions="l3")
    requests = [request("loglikelihood", "The cat", " sat down")]
    (right, _), (wrong, _) = (lm.loglikelihood(requests)[0] for lm in (ours(model), theirs(model)))
    assert right == pytest.approx(by_hand(model, "The cat", " sat down")[0], abs=1e-4)
    assert abs(right - wrong) > 0.1


def test_a_text_has_no_prompt_and_this_is_said(caplog):
    texts = [request("loglikelihood_rolling", "a longer text " * 8)]
    with caplog.at_level(logging.WARNING, "reftune"):
        found = ours().loglikelihood_rolling(texts)
    assert found == pytest.approx(theirs().loglikelihood_rolling(texts), rel=1e-5)
    assert "no prompt" in caplog.text
    steering = reft(positions="f1", edit_generated=True)
    edited = ours(steering).loglikelihood_rolling(texts)
    assert abs(edited[0] - found[0]) > 1, "but an adapter may edit what is not a prompt"


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("num_fewshot", [0, 2])
def test_strength_0_has_the_results_of_lm_evals_own_model(tasks, num_fewshot, chat):
    settings: dict[str, Any] = {
        "num_fewshot": num_fewshot,
        "apply_chat_template": chat,
        "fewshot_as_multiturn": chat,
    }
    lm = ours(strength=0.0, batch_size=4, max_length=400)
    found = evaluate(lm, tasks, **settings)
    expected = evaluate(theirs(max_length=400), tasks, **settings)
    assert found.keys() == expected.keys() == set(NAMES)
    for task, values in expected.items():
        answers, other = found[task].pop("answers"), values.pop("answers")
        if task == "tiny_write":
            assert answers == other
        assert numbers(found[task]) == pytest.approx(numbers(values), rel=1e-4), task


@pytest.mark.parametrize("chat", [False, True])
def test_few_shot_examples_and_the_chats_turns_belong_to_the_prompt(tasks, chat, monkeypatch):
    seen: list[Pair] = []
    score = Scorer.score

    def spy(self: Scorer, pairs: Any, on_scored: Any = None) -> Any:
        seen.extend(pairs)
        return score(self, pairs, on_scored)

    monkeypatch.setattr(Scorer, "score", spy)
    settings: dict[str, Any] = {"apply_chat_template": chat, "fewshot_as_multiturn": chat}
    evaluate(ours(max_length=400), tasks, num_fewshot=2, **settings)
    prompts = [TOKENIZER.decode(pair.context) for pair in seen if pair.has_prompt]
    assert len(prompts) == 18
    for prompt in prompts:
        assert prompt.count("Q: What is") == 3
        assert prompt.endswith("A:\n[assistant]" if chat else "A:")
    assert sum(not pair.has_prompt for pair in seen) == 6, "the texts"


def test_generation_is_that_of_the_engine_with_the_adapter():
    model = reft(positions="f2+l3")
    contexts = ["The cat", "x" * 60, "Hello there"]
    requests = [
        request("generate_until", c, {"until": ["e", "\n\n"], "max_gen_toks": n})
        for c, n in zip(contexts, (12, 12, 5), strict=True)
    ]
    found = ours(model).generate_until(requests)
    for text, context, n in zip(found, contexts, (12, 12, 5), strict=True):
        prompt = TOKENIZER(context).input_ids[-(MAX_LENGTH - n) :]
        sampling = Sampling(max_new_tokens=n, stop=("e", "\n\n"))
        assert text == HFEngine(model, TOKENIZER).generate([prompt], sampling)[0].text
    assert found != ours(model, strength=0.0).generate_until(requests)


@pytest.mark.parametrize(
    "arguments",
    [
        {"until": "e"},
        {"until": [], "max_gen_toks": 20, "do_sample": False, "temperature": 0},
        {"max_new_tokens": 9, "repetition_penalty": 1.5},
        {"until": ["zz"], "num_beams": 3, "max_gen_toks": 9},
    ],
)
@pytest.mark.parametrize("penalty", [None, 1.7])
def test_strength_0_writes_what_lm_evals_own_model_writes(arguments, penalty):
    model, base = reft(), tiny_llama()
    for one in (model.get_base_model(), base):
        one.generation_config.repetition_penalty = penalty
    arguments = (
        {"max_gen_toks": 15, **arguments} if "max_new_tokens" not in arguments else arguments
    )
    requests = [request("generate_until", c, arguments) for c in ("The cat", "A", "x" * 60)]
    lm = ours(model, strength=0.0)
    assert lm.generate_until(requests) == theirs(base, batch_size=1).generate_until(requests)


def test_a_generation_argument_that_is_not_known_is_refused():
    lm = ours()
    with pytest.raises(ReftConfigError, match=r"\['min_p'\] are not known; accepted are until"):
        lm.generate_until([request("generate_until", "a", {"until": ["e"], "min_p": 0.1})])
    with pytest.raises(ReftConfigError, match="leave no room"):
        lm.generate_until([request("generate_until", "a", {"max_gen_toks": MAX_LENGTH})])


def test_drawing_takes_its_settings_from_the_task():
    until, sampling = ours()._sampling(
        {"until": ["\n"], "do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_gen_toks": 3}
    )
    assert until == ["\n", "</s>"]
    assert sampling == Sampling(3, temperature=0.7, top_p=0.9, top_k=50, stop=("\n", "</s>"))
    drawing = {"do_sample": True, "temperature": 0.7, "max_gen_toks": 3}
    assert ours()._sampling(drawing | {"top_k": 0})[1].top_k == 0
    assert ours()._sampling(drawing | {"top_k": 7})[1].top_k == 7


def test_drawing_takes_the_models_own_settings_and_the_tasks_seed():
    model = reft()
    own = model.get_base_model().generation_config
    own.top_k, own.no_repeat_ngram_size = 0, 2
    drawing = {"do_sample": True, "temperature": 0.7, "max_gen_toks": 3, "seed": 5}
    sampling = ours(model)._sampling(drawing)[1]
    assert (sampling.top_k, sampling.no_repeat_ngram_size, sampling.seed) == (0, 2, 5)

    def drawn(seed: int) -> list[str]:
        arguments = drawing | {"seed": seed}
        return ours(model).generate_until([request("generate_until", "Q", arguments)] * 4)

    assert drawn(5) == drawn(5) != drawn(6)
    assert len(set(drawn(5))) > 1, "repeats of a request are draws of their own"


def writing(model: Any, special: int, instead_of: int) -> Any:
    """Let a model write a special token where it writes another one."""
    rows = model.lm_head.weight.data
    rows[[special, instead_of]] = rows[[instead_of, special]]
    return model


def test_a_special_token_stops_as_in_lm_evals_own_model():
    arguments = {"until": ["<s>", "never"], "max_gen_toks": 20}
    requests = [request("generate_until", c, arguments) for c in ("The cat", "A", "Q")]
    free = ours(get_peft_model(tiny_llama(), config()), strength=0.0).generate_until(requests)
    token = TOKENIZER(free[0]).input_ids[4]
    model, base = (writing(tiny_llama(), TOKENIZER.bos_token_id, token) for _ in "ab")
    lm = ours(get_peft_model(model, config()), strength=0.0)
    found = lm.generate_until(requests)
    assert found == theirs(base, batch_size=1).generate_until(requests)
    assert len(TOKENIZER(found[0]).input_ids) == 4
    assert lm._sampling(arguments)[1].stop_token_ids == (TOKENIZER.bos_token_id,)
    thinking = ours(think_end_token="#")._sampling(arguments)[1]
    assert (thinking.stop, thinking.stop_token_ids) == ((), (TOKENIZER.bos_token_id,))


def test_contexts_that_are_cut_are_counted_once_for_a_call(caplog):
    lm = ours()

    def said(run: Callable[..., Any], requests: list[Instance]) -> list[str]:
        caplog.clear()
        run(requests)
        return [record.message for record in caplog.records if record.name == "reftune"]

    (scoring,) = said(lm.loglikelihood, loglikelihoods())
    assert scoring.startswith("The contexts of 6 of 30 requests do not fit in 40 tokens")
    assert "edits the first of what is left" in scoring
    requests = [
        request("generate_until", c, {"until": ["e"], "max_gen_toks": n})
        for c, n in (("The cat", 12), ("x" * 60, 12), ("y" * 60, 5), ("Q", 5))
    ]
    (writing,) = said(lm.generate_until, requests)
    assert writing.startswith("The contexts of 2 of 4 requests do not fit in 40 tokens")
    assert said(lm.generate_until, requests[:1]) == []
    assert said(lm.loglikelihood, [request("loglikelihood", "The cat", " sat")]) == []


def test_what_is_thought_before_an_answer_is_left_out():
    requests = [request("generate_until", "The cat", {"until": ["zz"], "max_gen_toks": 20})]
    model = tiny_llama()
    whole = ours(get_peft_model(model, config()), strength=0.0).generate_until(requests)[0]
    ids = TOKENIZER(whole).input_ids
    mark = TOKENIZER.decode(ids[3:4])
    for token in (mark, ids[3]):
        lm = ours(get_peft_model(tiny_llama(), config()), strength=0.0, think_end_token=token)
        expected = theirs(think_end_token=token).generate_until(requests)
        assert lm.generate_until(requests) == expected


def assert_same_results(found: Any, expected: Any) -> None:
    for task in NAMES:
        for who in ("base", "adapter"):
            values = numbers(expected[task][who])
            assert numbers(found[task][who]) == pytest.approx(values, rel=1e-4)


def test_base_and_adapter_are_evaluated_and_a_killed_evaluation_goes_on(
    tasks, tmp_path, monkeypatch
):
    settings: dict[str, Any] = {"manager": manager_of(tasks)}
    model = reft(positions="f2+l3")
    whole = run_tasks(ours(model, max_length=400), NAMES, **settings)
    assert all(list(scores) == ["base", "adapter"] for scores in whole.values())
    base = evaluate(theirs(max_length=400), tasks)
    for task in NAMES:
        expected = pytest.approx(numbers(base[task]), rel=1e-4)
        assert numbers(whole[task]["base"]) == expected
    text = whole["tiny_text"]
    assert numbers(text["adapter"]) == pytest.approx(numbers(text["base"]), rel=1e-4)

    scored: list[int] = []
    likelihoods = Scorer._likelihoods

    def counting(self: Scorer, rows: Any, pairs: Any) -> Any:
        if len(scored) == 5:
            raise KeyboardInterrupt
        scored.append(len(pairs))
        return likelihoods(self, rows, pairs)

    monkeypatch.setattr(Scorer, "_likelihoods", counting)
    with pytest.raises(KeyboardInterrupt):
        run_tasks(ours(model, max_length=400, batch_size=4), NAMES, cache=tmp_path, **settings)
    scored.append(0)
    lm = ours(model, max_length=400, batch_size=4)
    resumed = run_tasks(lm, NAMES, cache=tmp_path, **settings)
    assert_same_results(resumed, whole)
    assert scored[6] < 18, "what was scored is not scored again"
    scored.clear()
    monkeypatch.setattr(HFEngine, "generate", lambda *args, **kwargs: pytest.fail("generates"))
    assert_same_results(run_tasks(lm, NAMES, cache=tmp_path, **settings), whole)
    assert scored == []


def test_a_cache_takes_no_answers_after_its_evaluation(tasks, tmp_path, monkeypatch):
    lm, settings = ours(max_length=400), {"manager": manager_of(tasks), "base": False}
    whole = run_tasks(lm, NAMES[:2], cache=tmp_path, **settings)
    (file,) = tmp_path.glob(f"adapter-{lm.cache_key()}*")

    def kept() -> dict[str, Any]:
        with SqliteDict(str(file)) as answers:
            return dict(answers)

    before = kept()
    assert len(before) > 18
    set_strength(lm.model, 0.0)
    run_tasks(lm, NAMES[:2], **settings)
    assert kept() == before
    set_strength(lm.model, 1.0)
    assert run_tasks(lm, NAMES[:2], cache=tmp_path, **settings) == whole
    monkeypatch.setattr(Scorer, "_likelihoods", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_tasks(lm, NAMES[:1], cache=tmp_path / "other", **settings)
    assert lm.cache_hook.dbdict is None, "nor after one that failed"


def test_what_changes_answers_has_a_cache_of_its_own():
    model = reft()
    settings: list[dict[str, Any]] = [
        {},
        {"max_length": 50},
        {"softmax_dtype": "float64"},
        {"add_bos_token": True},
        {"prefix_token_id": 7},
        {"think_end_token": "#"},
        {"enable_thinking": False},
        {"chat_template_args": {"tools": None}},
        {"strength": 0.5},
    ]
    keys = [ours(model, **one).cache_key() for one in settings]
    assert len(set(keys)) == len(settings)
    assert ours(model, batch_size=3).cache_key() == keys[0], "but not what does not"


def test_a_task_that_runs_what_is_written_must_be_confirmed(tasks, tmp_path):
    task = yaml.safe_load((tasks / "tiny_choice.yaml").read_text())
    text = yaml.safe_dump(task | {"task": "tiny_unsafe", "unsafe_code": True})
    (tmp_path / "unsafe.yaml").write_text(text)
    settings: dict[str, Any] = {"manager": manager_of(tmp_path), "base": False, "limit": 1}
    with pytest.raises(ValueError, match="marked as unsafe"):
        run_tasks(ours(max_length=400), ["tiny_unsafe"], **settings)
    found = run_tasks(
        ours(max_length=400), ["tiny_unsafe"], confirm_run_unsafe_code=True, **settings
    )
    assert set(found) == {"tiny_unsafe"}


def test_an_unknown_task_is_named(tasks):
    with pytest.raises(ReftConfigError, match="no task 'tiny_chioce'"):
        run_tasks(ours(), ["tiny_choice", "tiny_chioce"], manager=manager_of(tasks))


def test_strength_belongs_to_a_reft():
    lora = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    requests = loglikelihoods()
    assert_same(ours(lora).loglikelihood(requests), theirs().loglikelihood(requests))
    with pytest.raises(ReftConfigError, match="no ReFT"):
        ours(lora, strength=0.5)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of an adapter whose base model is beside it."""
    folder = tmp_path_factory.mktemp("saved")
    model = strong(get_peft_model(tiny_llama(), config(positions="f2+l3")))
    model.peft_config["default"].base_model_name_or_path = str(tiny_model_directory(folder))
    TOKENIZER.save_pretrained(folder / "model")  # with the template
    model.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
    return folder / "adapter"


@pytest.mark.parametrize("name", ["adapter", "peft"])
def test_it_is_registered_and_made_from_lm_evals_arguments(saved, name):
    assert get_model("reftune") is ReftuneLM
    text = f"{name}={saved},strength=0,max_length={MAX_LENGTH},trust_remote_code=False"
    lm = ReftuneLM.create_from_arg_string(text, {"batch_size": "4", "device": "cpu"})
    requests = loglikelihoods()
    assert_same(lm.loglikelihood(requests), theirs().loglikelihood(requests))
    info = lm.get_model_info()
    assert (info["adapter"], info["strength"]) == (str(saved), 0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "none of adapter= and peft="),
        ({"adapter": "a", "peft": "a"}, "both of adapter= and peft="),
        ({"adapter": "a", "trust_remote_code": True}, "trust_remote_code=True is not accepted"),
    ],
)
def test_arguments_that_are_not_accepted_are_named(arguments, message):
    with pytest.raises(ReftConfigError, match=message):
        ReftuneLM.create_from_arg_obj(arguments)


def test_commits_are_those_of_what_was_loaded(tmp_path):
    with hub_in_place(tmp_path) as hub:
        base = hub.model(BASE).branches["main"]
        model = get_peft_model(tiny_llama(), config())
        told = model.peft_config["default"]
        told.base_model_name_or_path, told.revision = BASE, base
        model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
        repository = hub.add("user/adapter", files_in(tmp_path / "adapter"))
        repository.tags["v1"] = repository.branches["main"]
        for one in (repository, hub.model(BASE)):
            one.commit("main", {"README.md": b"later"})
        info = ReftuneLM("user/adapter@v1", device="cpu").get_model_info()
    assert (info["model_revision"], info["model_sha"]) == (base, base)
    assert info["peft_sha"] == repository.tags["v1"] != repository.branches["main"]


def test_a_folder_is_not_looked_for_on_the_hub(saved, monkeypatch):
    monkeypatch.chdir(saved.parent.parent)
    here = f"{saved.parent.name}/{saved.name}"  # a name that the Hub could have, too
    lm = ReftuneLM(peft=here, device="cpu")
    monkeypatch.setattr("lm_eval.models.huggingface.HfApi", lambda: pytest.fail("asks the Hub"))
    info = lm.get_model_info()
    assert (info["model_revision"], info["model_sha"], info["peft_sha"]) == ("main", "", "")
    assert info["model_num_parameters"] == lm.model.num_parameters()


def test_the_command_line_evaluates_lm_evals_tasks(saved, tasks, tmp_path):
    arguments = ["--include-path", str(tasks), "--out", str(tmp_path), "--limit", "3"]
    found = CliRunner().invoke(
        app, ["evaluate", str(saved), "--lm-eval", "tiny_choice,tiny_write", *arguments]
    )
    assert found.exit_code == 0, found.output
    kept = json.loads((tmp_path / "lm-eval.json").read_text())
    results = kept["tasks"]
    assert set(results) == {"tiny_choice", "tiny_write"}
    assert set(results["tiny_choice"]) == {"base", "adapter"}
    assert "acc_norm" in found.output
    assert kept["n-shot"] == {"tiny_choice": 0, "tiny_write": 0}
    assert kept["n-samples"]["tiny_write"] == {"original": 6, "effective": 3}
    assert set(kept["versions"]) == set(results)
    assert kept["configs"]["tiny_write"]["generation_kwargs"]["max_gen_toks"] == 8
    assert (kept["chat_template"], kept["fewshot_as_multiturn"]) == (None, False)
    assert (kept["config"]["limit"], kept["config"]["fewshot_seed"]) == (3, 1234)
    assert kept["config"]["use_cache"].startswith(str(tmp_path / "lm-eval-cache" / "adapter-"))
    for wrong in (["--lm-eval", "a", "--tasks", "b"], []):
        found = CliRunner().invoke(app, ["evaluate", str(saved), *wrong])
        assert found.exit_code == 1
        assert "either --tasks or --lm-eval" in found.output


def test_how_tasks_were_evaluated_is_kept(saved, tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "LARGEST_CONFIGS", 100)
    arguments = ["--include-path", str(tasks), "--out", str(tmp_path), "--limit", "1", "--no-base"]
    how = ["--num-fewshot", "2", "--chat-template"]
    found = CliRunner().invoke(
        app, ["evaluate", str(saved), "--lm-eval", "tiny_choice", *arguments, *how]
    )
    assert found.exit_code == 0, found.output
    kept = json.loads((tmp_path / "lm-eval.json").read_text())
    assert kept["n-shot"] == {"tiny_choice": 2}
    assert (kept["chat_template"], kept["fewshot_as_multiturn"]) == (TEMPLATE, True)
    assert "configs" not in kept, "they are too long"
    assert not evaluation._is_small_json({(1, 2): 3})


@pytest.mark.slow
def test_lm_evals_command_line_knows_the_model(saved, tasks, tmp_path):
    arguments = ["--model", "reftune", "--model_args", f"peft={saved}", "--device", "cpu"]
    where = ["--tasks", "tiny_choice", "--include_path", str(tasks), "--output_path", str(tmp_path)]
    command = [sys.executable, "-m", "reftune.harness", "run", *arguments, *where]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (results,) = tmp_path.rglob("results_*.json")
    assert results.parent.name.endswith("__adapter")
    assert json.loads(results.read_text())["config"]["model"] == "reftune"
