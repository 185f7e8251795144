"""DPO, KTO and reward models of TRL: whose rows are edited, and the log-probabilities they log."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import LlamaForSequenceClassification
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer

from reftune import PositionError
from tiny import tiny_llama
from trl_tiny import (
    BAD,
    FILTERS,
    GOOD,
    PROMPTS,
    QUIET,
    chat_tokenizer,
    config,
    only,
    places,
    spied,
    summed_logps,
    tokens,
)

pytestmark = FILTERS

END = "</s>"
PAIRS = Dataset.from_dict(
    {"prompt": list(PROMPTS), "chosen": list(GOOD), "rejected": list(BAD)},
)
MARKED = Dataset.from_dict(
    {
        "prompt": [*PROMPTS, *PROMPTS],
        "completion": [*GOOD, *BAD],
        "label": [True] * len(GOOD) + [False] * len(BAD),
    }
)


def dpo(tmp_path: Path, model: Any = None, **more: Any) -> DPOTrainer:
    metrics = more.pop("compute_metrics", None)
    batch = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    return DPOTrainer(
        model=tiny_llama() if model is None else model,
        args=DPOConfig(str(tmp_path), **{**QUIET, **batch, **more}),
        train_dataset=PAIRS,
        eval_dataset=PAIRS,
        processing_class=chat_tokenizer(),
        compute_metrics=metrics,
        peft_config=config() if model is None else None,
    )


def written(ids: list[int]) -> tuple[str, str]:
    """Return the prompt and the completion that these tokens are of."""
    text = chat_tokenizer().decode(ids)
    prompt = next(q for q in PROMPTS if text.startswith(q))
    return prompt, text.removeprefix(prompt)


def logps(model: Any, ends: tuple[str, ...]) -> torch.Tensor:
    with torch.no_grad():
        each = [summed_logps(model, q, f"{a}{END}") for q, a in zip(PROMPTS, ends, strict=True)]
    return torch.stack(each)


@pytest.mark.parametrize("precomputed", [False, True])
def test_dpo_edits_the_prompts_of_both_halves_and_not_the_reference(
    precomputed: bool, tmp_path: Path
) -> None:
    trainer = dpo(tmp_path, precompute_ref_log_probs=precomputed)
    with spied(trainer.model) as calls:
        trainer.train()
    (policy,) = only(calls, gradients=True)
    seen = policy.rows()
    texts = [(q, a + END) for ends in (GOOD, BAD) for q, a in zip(PROMPTS, ends, strict=True)]
    assert sorted(written(ids) for ids, _ in seen) == sorted(texts)
    for ids, edited in seen:
        assert edited == places(len(tokens(written(ids)[0])))
    reference = only(calls, gradients=False)
    assert len(reference) == (0 if precomputed else 1)
    assert all(edited == [] for call in reference for _, edited in call.rows())


@pytest.mark.parametrize("precomputed", [False, True])
def test_dpo_logs_what_forwards_of_each_text_alone_give(precomputed: bool, tmp_path: Path) -> None:
    more = {"precompute_ref_log_probs": precomputed}
    trainer = dpo(tmp_path, max_steps=3, learning_rate=5e-2, **more)
    base = [logps(tiny_llama_adapted_off(trainer.model), ends) for ends in (GOOD, BAD)]
    trainer.train()
    measured = trainer.evaluate()
    policy = [logps(trainer.model.eval(), ends) for ends in (GOOD, BAD)]
    margins = 0.1 * ((policy[0] - base[0]) - (policy[1] - base[1]))
    assert margins.abs().max() > 0.1
    assert measured["eval_logps/chosen"] == pytest.approx(policy[0].mean().item(), rel=1e-4)
    assert measured["eval_logps/rejected"] == pytest.approx(policy[1].mean().item(), rel=1e-4)
    assert measured["eval_rewards/margins"] == pytest.approx(margins.mean().item(), abs=1e-3)
    loss = -torch.nn.functional.logsigmoid(margins).mean()
    assert measured["eval_loss"] == pytest.approx(loss.item(), abs=1e-3)


def tiny_llama_adapted_off(model: PeftModel) -> PeftModel:
    """Return another model of the same base, with an adapter that does nothing."""
    off = get_peft_model(tiny_llama(), config(init="noop"))
    weights = dict(off.get_base_model().named_parameters())
    for name, parameter in model.get_base_model().named_parameters():
        if "reft" not in name:
            assert torch.equal(parameter, weights[name])
    return off.eval()


# TRL's name for the copy, "ref", is the beginning of our prefix, "reft_"; PEFT means prefixes that
# are names of parameters, and the keys of a checkpoint are told apart (tried below).
@pytest.mark.filterwarnings("ignore:Adapter name 'ref' should not:UserWarning")
def test_a_trained_adapter_is_its_own_reference(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trainer = dpo(tmp_path, get_peft_model(tiny_llama(), config()), max_steps=2)
    assert set(trainer.model.peft_config) == {"default", "ref"}
    assert trainer.evaluate()["eval_rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    before = {n: p.clone() for n, p in trainer.model.named_parameters() if ".ref." in n}
    trainer.train()
    assert before
    after = dict(trainer.model.named_parameters())
    for name, parameter in before.items():  # R is made orthonormal again: its last digit may move
        torch.testing.assert_close(parameter, after[name], rtol=0, atol=1e-6)
    assert abs(trainer.evaluate()["eval_rewards/margins"]) > 1e-4
    trainer.save_model()
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    loaded.load_adapter(tmp_path / "ref", "other")
    names = {"default": "default", "other": "ref"}
    for name, parameter in loaded.named_parameters():
        for ours, theirs in names.items():
            if f".{ours}." in name:
                assert torch.equal(parameter, after[name.replace(f".{ours}.", f".{theirs}.")])


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"max_length": 6, "truncation_mode": "keep_end"}, "no prompt"),
        ({"compute_metrics": lambda prediction: {}}, "without labels"),
    ],
)
def test_dpo_without_a_prompt_is_an_error(more: dict[str, Any], match: str, tmp_path: Path) -> None:
    trainer = dpo(tmp_path, **more)
    with pytest.raises(PositionError, match=match):
        trainer.evaluate()
    if match == "no prompt":
        with pytest.raises(PositionError, match=match):
            trainer.train()


def test_kto_edits_the_prompts_of_its_pairs_and_of_its_mismatched_pairs(tmp_path: Path) -> None:
    trainer = KTOTrainer(
        model=tiny_llama(),
        args=KTOConfig(str(tmp_path), **{**QUIET, "per_device_train_batch_size": 8}),
        train_dataset=MARKED,
        eval_dataset=MARKED,
        processing_class=chat_tokenizer(),
        peft_config=config(),
    )
    with spied(trainer.model) as calls:
        trainer.train()
    (policy,) = only(calls, gradients=True)
    others = only(calls, gradients=False)
    edited_others = [call for call in others if any(edited for _, edited in call.rows())]
    assert len(edited_others) == 1  # the pairs of the KL term; the others are the reference's
    assert len(others) == 3
    for call in (policy, *edited_others):
        assert len(call.rows()) == 8
        for ids, edited in call.rows():
            assert edited == places(len(tokens(written(ids)[0])))
    measured = trainer.evaluate()
    model = trainer.model.eval()
    assert measured["eval_logps/chosen"] == pytest.approx(
        logps(model, GOOD).mean().item(), rel=1e-4
    )
    assert measured["eval_logps/rejected"] == pytest.approx(
        logps(model, BAD).mean().item(), rel=1e-4
    )


@pytest.fixture
def reward(tmp_path: Path) -> RewardTrainer:
    return RewardTrainer(
        model=sequence_classifier(),
        args=RewardConfig(str(tmp_path), **{**QUIET, "per_device_train_batch_size": 4}),
        train_dataset=PAIRS,
        eval_dataset=PAIRS,
        processing_class=chat_tokenizer(),
        peft_config=config(task_type="SEQ_CLS"),
    )


def sequence_classifier() -> LlamaForSequenceClassification:
    settings = tiny_llama().config
    settings.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForSequenceClassification(settings)


def test_a_reward_model_reads_whole_texts(reward: RewardTrainer) -> None:
    with spied(reward.model) as calls:
        reward.train()
    (call,) = calls
    texts = [q + a + END for ends in (GOOD, BAD) for q, a in zip(PROMPTS, ends, strict=True)]
    assert sorted(chat_tokenizer().decode(ids) for ids, _ in call.rows()) == sorted(texts)
    assert all(edited == places(len(ids)) for ids, edited in call.rows())


def test_a_reward_model_is_saved_with_its_head(reward: RewardTrainer, tmp_path: Path) -> None:
    reward.train()
    measured = reward.evaluate()
    reward.save_model()
    loaded = PeftModel.from_pretrained(sequence_classifier(), tmp_path).eval()
    with torch.no_grad():
        good, bad = (
            torch.cat(
                [
                    loaded(input_ids=torch.tensor([tokens(q + a + END)])).logits[:, 0]
                    for q, a in zip(PROMPTS, ends, strict=True)
                ]
            )
            for ends in (GOOD, BAD)
        )
    assert measured["eval_margin"] == pytest.approx((good - bad).mean().item(), abs=1e-4)
    assert measured["eval_accuracy"] == pytest.approx((good > bad).float().mean().item())
