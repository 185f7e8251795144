"""Methods that are not ReFT, through the same runner: what is trained, kept and counted."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from reftune.data import TokenDataset
from reftune.errors import ReftConfigError, RunInterrupted
from reftune.generate import HFEngine, Sampling
from reftune.methods import BASELINES, PEFT_METHODS, as_base, count_parameters, settings_of
from reftune.plots import read_log
from reftune.run import execute, load_adapter
from reftune.settings import RunConfig, describe, parse_config
from reftune.speed.plan import describe as seen_by_shortcuts
from reftune.train import TrainSettings, shortcuts
from reftune_cli import app
from runs import InterruptAt, tiny_run
from tiny import tiny_llama, tiny_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    # PEFT's remarks on BEFT without a bias, and on norms that are no LayerNorm
    pytest.mark.filterwarnings("ignore:.*no bias term.*"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type.*"),
    # PEFT drops the positions that transformers counts: without padding they are the same
    pytest.mark.filterwarnings("ignore:Position ids are not supported.*"),
]

TRAINED = [name for name in BASELINES if name != "none"]
LEARNING_RATE = {"prompt_tuning": 0.3, "prefix_tuning": 0.1, "full": 2e-3, "lora": 2e-2}


def run_of(tmp_path: Path, method: str, **sections: dict[str, Any]) -> RunConfig:
    """Return a tiny run of a method, on a model with biases where the method needs them."""
    tmp_path.mkdir(exist_ok=True)
    if method == "bitfit":
        biased_llama().save_pretrained(tmp_path / "model")
        tiny_tokenizer().save_pretrained(tmp_path / "model")
    config = tiny_run(tmp_path, train={"learning_rate": LEARNING_RATE.get(method, 5e-2)})
    values = config.model_dump(mode="json")
    values["adapter"] = {"method": method}
    for name, section in sections.items():
        values[name] = {**values[name], **section}
    return parse_config(values, "tiny")


def biased_llama() -> Any:
    from transformers import LlamaForCausalLM

    config = tiny_llama().config
    config.attention_bias = config.mlp_bias = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(3, 15)[None]).logits


@pytest.mark.parametrize("method", TRAINED)
def test_a_run_trains_saves_and_reloads_and_leaves_the_base_as_it_was(
    tmp_path: Path, method: str
) -> None:
    config = run_of(tmp_path, method, train={"epochs": 20, "save_steps": 100})
    results = execute(config)
    losses = [row["loss"] for row in read_log(config.directory / "log.jsonl") if "loss" in row]
    assert losses[-1] < losses[0] - 0.3, losses[:: len(losses) - 1]
    assert (results["method"], results["seed"]) == (method, 42)
    loaded = load_adapter(config.directory, dtype="float32")
    model, base = loaded.model, AutoModelForCausalLM.from_pretrained(config.model)
    trained = logits(model)
    assert trained.shape[-1] == 259
    assert not torch.allclose(trained[:, -12:], logits(base), atol=1e-2)
    with as_base(model):
        assert torch.equal(logits(model), logits(base))
    assert torch.equal(logits(model), trained)
    assert (config.directory / "adapter" / "README.md").read_text().count(method)


@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "bitfit", "full"])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path: Path, method: str) -> None:
    whole, broken = run_of(tmp_path / "a", method), run_of(tmp_path / "b", method)
    execute(whole)
    with pytest.raises(RunInterrupted):
        execute(broken, reporter=InterruptAt(3))
    execute(broken, resume=True)
    a, b = (load_adapter(c.directory, dtype="float32").model for c in (whole, broken))
    assert torch.equal(logits(a), logits(b))
    (broken.directory / "results.json").unlink()  # as if killed while it was evaluated
    results = execute(broken, resume=True)
    assert torch.equal(logits(load_adapter(broken.directory, dtype="float32").model), logits(b))
    assert results["train"]["seconds"] > 0
    log = read_log(broken.directory / "log.jsonl")
    assert results["train"]["cpu_seconds"] == pytest.approx(log[-1]["cpu_seconds"], abs=0.1)


def test_trainable_parameters_are_what_the_formulas_say() -> None:
    d, m, L, kv, V = 32, 64, 2, 16, 259  # of tiny_llama
    weights = 2 * V * d + d + L * (2 * d * d + 2 * d * kv + 3 * d * m + 2 * d)
    biases = L * (2 * d + 2 * kv + 2 * m + d)
    # q (d to d), k and v (d to kv), up (d to m), down (m to d)
    lora = 32 * L * ((d + d) + 2 * (d + kv) + (d + m) + (m + d))
    expected = {
        "lora": lora,
        "prompt_tuning": 20 * d,
        "prefix_tuning": 10 * L * 2 * kv,
        "ia3": L * (2 * kv + m),
        "ln_tuning": d + L * 2 * d,
        "beft": L * kv,
        "full": weights,
        "bitfit": biases,
    }
    for method in TRAINED:
        model = biased_llama() if method == "bitfit" else tiny_llama()
        trained, base = count_parameters(attached(model, method))
        assert trained == expected[method], method
        assert base == (weights + biases if method == "bitfit" else weights), method


def test_the_default_prefix_is_the_papers_share_of_llama_7b() -> None:
    settings = settings_of("prefix_tuning")()
    parameters = settings.num_virtual_tokens * 32 * 2 * 4096  # type: ignore[attr-defined]
    assert round(100 * parameters / 6_738_415_616, 3) == 0.039


def attached(model: Any, method: str, **fields: Any) -> Any:
    from reftune.methods import peft_config, train_weights

    if method not in PEFT_METHODS:
        return train_weights(model, method)
    values = settings_of(method)(**fields).model_dump()
    return peft.get_peft_model(model, peft_config(method, values, "CAUSAL_LM"))


# --- the same training ----------------------------------------------------------------------------


def test_every_method_sees_the_same_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A comparison differs in the method alone: data, order and grouping by length are the same."""
    seen: list[int] = []
    read = TokenDataset.__getitem__

    def watched(self: TokenDataset, index: int) -> Any:
        seen.append(index)
        return read(self, index)

    monkeypatch.setattr(TokenDataset, "__getitem__", watched)
    orders = {}
    for method in ("loreft", "lora", "prompt_tuning", "full"):
        seen.clear()
        execute(run_of(tmp_path / method, method))
        orders[method] = seen[-36:]  # 3 epochs of 12; before them, rows that shortcuts are tried on
    assert sorted(orders["loreft"]) == sorted([*range(12)] * 3)
    assert all(order == orders["loreft"] for order in orders.values())


@pytest.mark.parametrize("method", TRAINED)
def test_the_loss_of_a_step_is_the_plain_models(tmp_path: Path, method: str) -> None:
    """Shortcuts are taken where they are exact, and for prompt learning not at all."""
    from reftune.data import Collator

    model = attached(biased_llama() if method == "bitfit" else tiny_llama(), method)
    rows = [row(index, prompt=3 + 5 * index, completion=2 + index) for index in range(4)]
    collator = Collator(0)
    model.eval()  # LoRA's dropout
    expected = model(**collator(rows)).loss
    with shortcuts(model, Rows(rows), collator, TrainSettings(device="cpu"), tmp_path) as step:
        found = model(**step.before(step.collate(rows))).loss
    assert torch.allclose(found, expected, atol=1e-5)
    assert expected.requires_grad
    taken = seen_by_shortcuts(model) is not None
    assert taken == (method not in ("prompt_tuning", "prefix_tuning", "full"))


class Rows(list[Any]):
    @property
    def lengths(self) -> list[int]:
        return [len(one["input_ids"]) for one in self]

    @property
    def prompt_lengths(self) -> list[int]:
        return [int((one["labels"] == -100).sum()) for one in self]


def row(index: int, prompt: int, completion: int) -> dict[str, Any]:
    ids = torch.randint(
        3, 259, (prompt + completion,), generator=torch.Generator().manual_seed(index)
    )
    labels = torch.where(torch.arange(len(ids)) < prompt, -100, ids)
    return {"input_ids": ids.numpy(), "labels": labels.numpy(), "index": index}


def test_prompt_tuning_trains_on_completions_behind_its_virtual_tokens() -> None:
    """The oracle: embeddings put together by hand, a batch of one, its own cross-entropy."""
    from reftune.data import Collator

    model = attached(tiny_llama(), "prompt_tuning", num_virtual_tokens=5)
    rows = [row(0, prompt=4, completion=3), row(1, prompt=9, completion=5)]
    base = tiny_llama()
    virtual = model.get_prompt(1)
    losses, count = [], 0
    for one in rows:
        ids = torch.as_tensor(one["input_ids"])[None]
        states = torch.cat([virtual, base.get_input_embeddings()(ids)], dim=1)
        predicted = base(inputs_embeds=states).logits[0, 4:-1]  # from the last virtual token on
        labels = torch.as_tensor(one["labels"])
        losses.append(F.cross_entropy(predicted, labels, ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
    found = model(**Collator(0)(rows)).loss
    assert torch.allclose(found, sum(losses) / count, atol=1e-5)


# --- generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", TRAINED)
def test_batched_generation_is_what_each_prompt_gives_alone(method: str) -> None:
    """PEFT's prompt tuning leaves padding between virtual tokens and prompt: other positions."""
    torch.manual_seed(0)
    fields = {"num_virtual_tokens": 4} if method in ("prompt_tuning", "prefix_tuning") else {}
    model = attached(biased_llama() if method == "bitfit" else tiny_llama(), method, **fields)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    tokenizer = tiny_tokenizer()
    prompts = [tokenizer(text)["input_ids"] for text in ("hello there, friend", "hi", "what", "he")]
    engine, sampling = HFEngine(model.eval(), tokenizer, 8), Sampling(max_new_tokens=12)
    together = engine.generate(prompts, sampling)
    for prompt, completion in zip(prompts, together, strict=True):
        assert completion == engine.generate([prompt], sampling)[0]
        assert completion.token_ids == recomputed(model, prompt, 12)


def recomputed(model: Any, prompt: list[int], count: int) -> tuple[int, ...]:
    """Return a greedy continuation without a cache."""
    ids = list(prompt)
    for _ in range(count):
        with torch.inference_mode():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == 2:
            break
        ids.append(token)
    return tuple(ids[len(prompt) :])


# --- what is said ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        ({"method": "lorra"}, "Did you mean 'lora'"),
        ({"method": "lora", "positions": "f1"}, "no key 'adapter.positions'"),
        ({"method": "lora", "lora_alhpa": 4}, "Did you mean 'adapter.lora_alpha'"),
        ({"method": "lora", "r": "many"}, "adapter.r is 'many'"),
        (
            {"method": "lora", "target_modules": "q_proj", "layers_to_transform": [1]},
            "PEFT does not accept this for lora.*layers_to_transform",
        ),
        ({"method": "loreft", "lora_alpha": 4}, "no key 'adapter.lora_alpha'"),
        ({"method": "full", "r": 4}, "no key 'adapter.r'"),
    ],
)
def test_a_wrong_section_says_what_is_accepted(adapter: dict[str, Any], says: str) -> None:
    with pytest.raises(ReftConfigError, match=says):
        parse_config({"name": "x", "data": {"train": "demo"}, "adapter": adapter}, "run.yaml")


def test_every_key_of_a_baseline_has_a_meaning_and_a_config_reads_back_as_itself() -> None:
    for method in BASELINES:
        keys = [row for row in describe(method) if row[0].startswith("adapter.")]
        assert all(meaning for *_, meaning in keys)
        config = parse_config(
            {"name": "x", "data": {"train": "demo"}, "adapter": {"method": method}}, "here"
        )
        assert parse_config(config.model_dump(mode="json"), "there") == config
    lora = parse_config(
        {"name": "x", "data": {"train": "demo"}, "adapter": {"method": "lora", "use_dora": True}},
        "x",
    ).peft_config()
    assert isinstance(lora, peft.LoraConfig)
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.use_dora) == (32, 64, 0.05, True)
    assert lora.target_modules == {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}


def test_what_does_not_fit_a_model_is_said_before_training(tmp_path: Path) -> None:
    for method, says in (("bitfit_", "has none.*ln_tuning"), ("none", "for classifiers")):
        config = run_of(tmp_path / method, method.removesuffix("_"))
        if method == "bitfit_":
            tiny_llama().save_pretrained(config.model)  # without biases
        with pytest.raises(ReftConfigError, match=says):
            execute(config)
    config = run_of(tmp_path / "x", "lora", adapter={"target_modules": ["nowhere"]})
    with pytest.raises(ReftConfigError, match=r"lora does not fit.*nowhere"):
        execute(config)


@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "full"])
def test_the_verbs_work_on_it(tmp_path: Path, method: str) -> None:
    config = run_of(tmp_path, method, evaluate={"tasks": ["demo"], "limit": 2, "show": 1})
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    invoke("train", str(path))
    run = str(config.directory)
    assert method in invoke("info", run)
    assert "prompt" in invoke("generate", run, "say aa", "--compare", "--max-new-tokens", "4")
    output = invoke(
        "evaluate", run, "--tasks", "demo", "--limit", "2", "--out", str(tmp_path / "e")
    )
    assert "demo" in output
    saved = json.loads((tmp_path / "e" / "results.json").read_text())["tasks"]
    own = json.loads((config.directory / "results.json").read_text())["tasks"]
    assert {k: v["value"] for k, v in saved["demo"].items()} == {
        k: v["value"] for k, v in own["demo"].items()
    }


def invoke(*args: str) -> str:
    result = CliRunner().invoke(app, list(args), env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output
