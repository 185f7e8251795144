"""The flaws of pyreft in data and training; docs/pyreft-flaws.md has the list."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from adapted_tiny import EOS, config, logits, phis, reft, strong, trainable
from reftune import DataError
from reftune.data import Collator, TokenDataset
from reftune.prompts import Encoded, Example, encode, encode_examples
from reftune.train import TrainSettings
from tiny import tiny_llama, tiny_tokenizer

# PEFT asks for it by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

OPTIMS = [
    "adamw_torch",
    "adamw_torch_fused",  # the Trainer's default; it does not raise a tensor's version
]


def dataset() -> TokenDataset:
    """Return 8 examples, two of each length."""
    prompt = [1, 30, 31, 32]
    rows = [Encoded([*prompt, *range(60, 62 + i % 4), EOS], len(prompt)) for i in range(8)]
    return TokenDataset(rows)


def trainer(model: nn.Module, path: Path, **settings: Any) -> Trainer:
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.01} | settings
    arguments = TrainingArguments(
        str(path),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        logging_strategy="no",
        **settings,
    )
    data = dataset()
    return Trainer(model, arguments, Collator(0), train_dataset=data, eval_dataset=data)


def test_flaw_02_the_trainer_decays_what_it_says(tmp_path: Path) -> None:
    """Of the groups of the optimizer, and of what a step does where the gradient is zero."""
    model = reft()
    optimizer = trainer(model, tmp_path, weight_decay=0.1).create_optimizer()
    of = {id(p): name for name, p in trainable(model).items()}
    decay = {of[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decay == {name: 0.0 if name.endswith("bias") else 0.1 for name in trainable(model)}
    assert set(trainable(model)) <= set(model.state_dict())
    W = phis(model)[0].get_parameter("W")
    before = W.detach().clone()
    for parameter in trainable(model).values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(W.detach(), before * (1 - 0.01 * 0.1))


def test_flaw_08_masks_and_labels() -> None:
    """An eos that is the pad token counts, there is no sink, a prompt too long is no NaN."""
    tokenizer = tiny_tokenizer()
    assert tokenizer.model_max_length > 1e20, "not stated, as in the flaw"
    one = encode(Example("ab", "c"), tokenizer, "none", max_length=16)
    made = Collator(pad_token_id=EOS)(
        [TokenDataset([one])[0], {"input_ids": [1], "labels": [-100]}]
    )
    assert one.input_ids[-1] == EOS
    assert made["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert made["labels"].tolist() == [[-100, -100, one.input_ids[2], EOS], [-100] * 4]
    with pytest.raises(DataError, match="leaves no room for a completion"):
        encode(Example("a" * 16, "c"), tokenizer, "none", max_length=16)


@pytest.mark.parametrize("through", ["model", "trainer"])
def test_flaw_12_a_save_overwrites(through: str, tmp_path: Path) -> None:
    model = reft()
    save: Callable[[], None] = (
        trainer(model, tmp_path).save_model
        if through == "trainer"
        else lambda: model.save_pretrained(tmp_path)
    )
    save()
    strong(model, seed=2)
    save()
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(model))


def test_flaw_16_evaluate(tmp_path: Path) -> None:
    """Of a causal language model: loss and predictions as by hand, the mode as it was."""
    model = reft().train()
    runner = trainer(model, tmp_path, per_device_eval_batch_size=8, label_names=["labels"])
    seen: list[tuple[int, ...]] = []
    runner.compute_metrics = lambda p: {"n": seen.append(p.predictions.shape) or len(seen)}
    found = runner.evaluate()
    data = dataset()
    inputs = Collator(0)([data[i] for i in range(len(data))])
    with torch.no_grad():
        expected = model.eval()(**inputs).loss.item()
    assert found["eval_loss"] == pytest.approx(expected, abs=1e-5)
    assert seen == [(*inputs["input_ids"].shape, 259)]


@pytest.mark.parametrize("problem", ["regression", "single_label_classification"])
def test_flaw_16_a_classifier_trains_and_evaluates(problem: str, tmp_path: Path) -> None:
    base = tiny_llama().config
    base.num_labels, base.problem_type = (1 if problem == "regression" else 3), problem
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(base)
    model = get_peft_model(model, config(task_type="SEQ_CLS", positions="l1"))
    rows: list[dict[str, Any]] = [
        {"input_ids": [1, 7, 8 + i], "labels": float(i) if problem == "regression" else i}
        for i in range(3)
    ]
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    runner = trainer(model, tmp_path, label_names=["labels"])
    runner.data_collator, runner.train_dataset, runner.eval_dataset = None, rows, rows
    runner.data_collator = lambda chosen: {
        name: torch.tensor([row[name] for row in chosen]) for name in ("input_ids", "labels")
    }
    assert runner.evaluate()["eval_loss"] > 0
    runner.train()
    assert model.training
    assert all(not torch.equal(p, before[name]) for name, p in trainable(model).items())
    assert runner.predict(rows).predictions.dtype.name == "float32"


@pytest.mark.parametrize("optim", OPTIMS)
def test_flaw_17_resume_on_the_cpu_goes_on_as_if_never_stopped(optim: str, tmp_path: Path) -> None:
    whole, parts, resumed = reft(), reft(), reft()
    settings = {"save_steps": 2, "lr_scheduler_type": "constant", "optim": optim}
    trainer(whole, tmp_path / "whole", max_steps=4, **settings).train()
    trainer(parts, tmp_path / "parts", max_steps=2, **settings).train()
    checkpoint = str(tmp_path / "parts" / "checkpoint-2")
    trainer(resumed, tmp_path / "parts", max_steps=4, **settings).train(checkpoint)
    assert not torch.equal(logits(parts), logits(whole))
    torch.testing.assert_close(logits(resumed.eval()), logits(whole.eval()), atol=1e-5, rtol=0)


def test_flaw_18_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain, checkpointed = reft(), reft()
    trainer(plain, tmp_path).train()
    trainer(checkpointed, tmp_path, activation_checkpointing=True).train()
    assert not torch.equal(logits(plain.eval()), logits(reft()))
    torch.testing.assert_close(logits(checkpointed.eval()), logits(plain), atol=1e-5, rtol=0)


def test_flaw_21_the_data_loader_obeys_the_arguments(tmp_path: Path) -> None:
    """Workers, the last batch and the seed are transformers'; ours reach it under its names."""

    def order(seed: int) -> list[list[int]]:
        settings = {"per_device_train_batch_size": 3, "dataloader_drop_last": True}
        loader = trainer(reft(), tmp_path, seed=seed, **settings).get_train_dataloader()
        return [made["input_ids"].tolist() for made in loader]

    assert order(0) == order(0) != order(1)
    assert len(order(0)) == 2, "8 examples, batches of 3, the last one dropped"
    arguments = TrainSettings(num_workers=3, group_by_length=True).arguments(tmp_path, 7, 8)
    assert (arguments.dataloader_num_workers, arguments.seed) == (3, 7)
    assert arguments.train_sampling_strategy == "group_by_length"
    overrides = [c for c in Trainer.__subclasses__() if c.__module__.startswith("reftune")]
    assert all("get_train_dataloader" not in vars(c) for c in overrides)


def test_flaw_26_tokenised_in_one_go_and_batched_by_length(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    calls: list[int] = []

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return tokenizer(*args, **kwargs)

    class Counting:
        """The tokenizer, counting its calls."""

        __call__ = staticmethod(counting)

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

    counts = []
    for n in (2, 40):
        calls.clear()
        examples = [Example(f"question {i}", "answer" * (1 + i % 3)) for i in range(n)]
        data = TokenDataset(encode_examples(examples, Counting(), "none", 64))  # type: ignore[arg-type]
        assert len([data[i] for i in range(n)] * 2) == 2 * n
        counts.append(len(calls))
    assert counts[0] == counts[1], "not per example, and not when an example is fetched"


def test_flaw_26_batches_hold_similar_lengths(tmp_path: Path) -> None:
    """Grouped by length, a data set has less than half of the padding that it has at random."""
    rows = [Encoded([1, 30, *[60] * (i % 20), EOS], 2) for i in range(160)]
    padding = {}
    for strategy in ("random", "group_by_length"):
        runner = trainer(reft(), tmp_path, train_sampling_strategy=strategy)
        runner.train_dataset = TokenDataset(rows)
        loader = runner.get_train_dataloader()
        padding[strategy] = sum(int(made["attention_mask"].eq(0).sum()) for made in loader)
    assert 2 * padding["group_by_length"] < padding["random"]
