"""TRL's trainers on a tiny model, and a spy that sees which tokens a forward edits."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from reftune import ReftConfig, reft_layers
from tiny import tiny_tokenizer

FILTERS = [
    # TRL's configs set gradient_checkpointing, which transformers 5.23 renames.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),
]

# What the tests' chat looks like: <s> is a turn's end, so that it is not the end of the text.
CHAT = (
    "{% for m in messages %}{{ m.role[0] }}:"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}"
    "{% else %}{{ m.content }};{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
QUIET = {
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "max_steps": 1,
    "learning_rate": 1e-2,
}
PROMPTS = ("What is a lake", "Why", "Name some fruit, please", "How are you")
GOOD = ("Water.", "Because it is.", "Figs!", "Fine")
BAD = ("No idea whatsoever.", "So", "Stones, I think", "Bad, bad, bad")


def config(**more: Any) -> ReftConfig:
    given: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 4, "positions": "f2+l3", **more}
    return ReftConfig(**given)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


@dataclass
class Call:
    """A forward: its tokens, which are attended, and which of them every layer changed."""

    ids: Tensor
    attended: Tensor
    adapted: bool = False
    gradients: bool = False
    edited: list[Tensor] = field(default_factory=list)

    def rows(self) -> list[tuple[list[int], list[int]]]:
        """Return the tokens of each row, without padding, and the places of the edited ones."""
        assert all(torch.equal(one, self.edited[0]) for one in self.edited)
        changed = self.edited[0] if self.edited else torch.zeros_like(self.attended)
        assert not (changed & ~self.attended).any(), "padding was edited"
        return [
            (ids[on].tolist(), changed[on].nonzero().flatten().tolist())
            for ids, on, changed in zip(self.ids, self.attended, changed, strict=True)
        ]


@contextmanager
def spied(model: nn.Module) -> Iterator[list[Call]]:
    """Record each forward of the base model, by what the edited layers put in and give out."""
    calls: list[Call] = []
    base = model.get_base_model()

    def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        mask = kwargs.get("attention_mask")
        attended = torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :]
        calls.append(Call(ids, attended.bool(), gradients=torch.is_grad_enabled()))

    def look(module: nn.Module, args: Any, output: Any) -> None:
        before, after = (o[0] if isinstance(o, tuple) else o for o in (args[0], output))
        calls[-1].edited.append((before != after).any(-1).detach())

    handles = [base.register_forward_pre_hook(begin, with_kwargs=True)]
    handles += [layer.register_forward_hook(look) for layer in reft_layers(model).values()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def places(n: int, start: int = 0, p: int = 2, s: int = 3) -> list[int]:
    """Return which tokens of a prompt of `n` are edited, by the paper's rule (section 4.1)."""
    if n < p + s:
        p, s = min(p, n // 2), min(s, -(-n // 2))
    return [start + i for i in [*range(p), *range(n - s, n)]]


def tokens(text: str) -> list[int]:
    return tiny_tokenizer()(text, add_special_tokens=False).input_ids


def summed_logps(model: nn.Module, prompt: str, completion: str) -> Tensor:
    """Return log p(completion | prompt) by a forward of this text alone, told where it is."""
    before, after = tokens(prompt), tokens(completion)
    ids = torch.tensor([before + after])
    logits = model(input_ids=ids, prompt_lengths=torch.tensor([len(before)])).logits[0, :-1]
    each = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    return each[len(before) - 1 :].sum()


def only(calls: Sequence[Call], gradients: bool) -> list[Call]:
    return [call for call in calls if call.gradients is gradients]
