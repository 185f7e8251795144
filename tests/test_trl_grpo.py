"""GRPO and its relatives: rows edited while generating and training, and what is not possible."""

from pathlib import Path
from typing import Any

import pytest
import reasoning_gym
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from reftune import MergeError, PositionError
from tiny import tiny_llama
from trl_tiny import FILTERS, QUIET, Call, chat_tokenizer, config, only, places, spied, tokens

pytestmark = FILTERS

GYM = reasoning_gym.create_dataset("chain_sum", size=8, seed=1, max_terms=3, max_digits=2)
PROBLEMS = Dataset.from_list(
    [{"prompt": f"{e['metadata']['expression']} =", "answer": e["answer"]} for e in GYM]
)
LENGTHS = {tuple(tokens(prompt)): len(tokens(prompt)) for prompt in PROBLEMS["prompt"]}


def verified(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Give a random model something to learn: digits; full marks are the verifier's."""
    return [
        GYM.score_answer(text, {"answer": right}) + sum(c.isdigit() for c in text) / 10
        for text, right in zip(completions, answer, strict=True)
    ]


def grpo(tmp_path: Path, kind: Any = GRPOTrainer, **more: Any) -> GRPOTrainer:
    made_by = {GRPOTrainer: GRPOConfig, RLOOTrainer: RLOOConfig}[kind]
    sizes = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 6}
    return kind(
        model=tiny_llama(),
        args=made_by(str(tmp_path), **{**QUIET, **sizes, **more}),
        reward_funcs=verified,
        train_dataset=PROBLEMS,
        processing_class=chat_tokenizer(),
        peft_config=config(),
    )


def prompt_length(ids: list[int]) -> int:
    found = [n for prompt, n in LENGTHS.items() if tuple(ids[:n]) == prompt]
    assert found
    return max(found)


def check(call: Call) -> None:
    for ids, edited in call.rows():
        assert edited == places(prompt_length(ids))


@pytest.mark.parametrize("kind", [GRPOTrainer, RLOOTrainer])
def test_prompts_are_edited_when_generating_and_when_training(kind: Any, tmp_path: Path) -> None:
    trainer = grpo(tmp_path, kind, beta=0.1)
    with spied(trainer.model) as calls:
        trainer.train()
    prefill, *others = only(calls, gradients=False)
    check(prefill)
    decoded = [call for call in others if call.ids.shape[1] == 1]
    assert len(decoded) == 5
    assert not any(call.edited for call in decoded)
    (policy,) = only(calls, gradients=True)
    assert any(len(ids) > prompt_length(ids) for ids, _ in policy.rows())
    check(policy)
    whole = [call for call in others if call.ids.shape[1] > 1]
    edited = [call for call in whole if any(places for _, places in call.rows())]
    assert len(edited) < len(whole)  # the reference's are not
    for call in edited:
        check(call)


def test_what_is_scored_is_what_was_sampled(tmp_path: Path) -> None:
    """The log-probabilities that the loss is made of are those of decoding with the cache."""
    trainer = grpo(tmp_path)
    model = trainer.model.eval()
    prompt = torch.tensor([tokens(PROBLEMS["prompt"][0])])
    out = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    steps = torch.stack(out.logits, dim=1).log_softmax(-1)
    sampled = out.sequences[:, prompt.shape[1] :]
    expected = steps.gather(-1, sampled[..., None])[..., 0]
    padded = torch.nn.functional.pad(out.sequences, (3, 0))  # TRL pads prompts on the left
    mask = torch.nn.functional.pad(torch.ones_like(out.sequences), (3, 0))
    with torch.no_grad():
        scored = trainer._get_per_token_logps_and_entropies(model, padded, mask, 6)[0]
    torch.testing.assert_close(scored, expected, rtol=0, atol=2e-4)


def test_the_reward_rises(tmp_path: Path) -> None:
    more = {"max_steps": 25, "learning_rate": 3e-2, "per_device_train_batch_size": 32}
    trainer = grpo(tmp_path, gradient_checkpointing=False, **more)
    trainer.train()
    rewards = [e["reward"] for e in trainer.state.log_history if "reward" in e]
    assert sum(rewards[-5:]) > 1.5 * sum(rewards[:5])


def test_continuous_batching_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PositionError, match="continuous batching"):
        grpo(tmp_path, use_transformers_continuous_batching=True)


def test_vllm_of_trl_would_merge_and_is_an_error(tmp_path: Path) -> None:
    trainer = grpo(tmp_path)
    with pytest.raises(MergeError, match="cannot be merged"):
        trainer.model.merge_adapter()  # what TRL calls before it sends weights to vLLM


@pytest.mark.filterwarnings("ignore::UserWarning:trl")  # that it is experimental
@pytest.mark.filterwarnings("ignore:.*:FutureWarning:trl")
def test_a_trainer_that_sends_no_labels_is_an_error(tmp_path: Path) -> None:
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    data = Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": "What is it?"},
                    {"role": "assistant", "content": "Nothing"},
                ]
            }
        ]
        * 4
    )
    trainer = GKDTrainer(
        model=tiny_llama(),
        teacher_model=tiny_llama(1),
        args=GKDConfig(str(tmp_path), **{**QUIET, "lmbda": 0.0}),
        train_dataset=data,
        processing_class=chat_tokenizer(),
        peft_config=config(),
    )
    with pytest.raises(PositionError, match="without labels"):
        trainer.train()
