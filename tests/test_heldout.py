"""The held-out loss: the mean over completion tokens, with logits only where there is a label."""

from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from architectures import ARCHITECTURES
from reftune import heldout
from reftune.heldout import heldout_cross_entropy, labelled_loss
from speed_tiny import COLLATOR, adapted, dataset

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


def expected(model: nn.Module, data: Any) -> float:
    """Return the mean over tokens, one example at a time, by the model's own loss."""
    total, count = 0.0, 0
    model.eval()
    for i in range(len(data)):
        batch = COLLATOR([data[i]])
        n = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            total, count = total + float(model(**batch).loss) * n, count + n
    model.train()
    return total / count


def rows_of_head(model: Any, run: Any) -> list[int]:
    """Return how many rows of hidden states the model's head was given, call by call."""
    seen = []
    head = model.get_base_model().get_output_embeddings()
    handle = head.register_forward_hook(lambda _, given, out: seen.append(out[..., 0].numel()))
    run()
    handle.remove()
    return seen


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_it_is_the_mean_over_tokens_whatever_the_batches(name: str, batch_size: int) -> None:
    model, data = adapted(ARCHITECTURES[name].make()), dataset()
    found = heldout_cross_entropy(model, data, COLLATOR, batch_size)
    assert found == pytest.approx(expected(model, data), rel=1e-5)
    with model.disable_adapter():
        base = heldout_cross_entropy(model, data, COLLATOR, batch_size)
        assert base == pytest.approx(expected(model, data), rel=1e-5)
    assert abs(base - found) > 1e-3
    assert model.training


def test_logits_are_computed_of_labelled_rows_alone() -> None:
    model, data = adapted(ARCHITECTURES["llama"].make()), dataset()
    batch = COLLATOR([data[i] for i in range(len(data))])
    labelled = int((batch["labels"][:, 1:] != -100).sum())
    assert rows_of_head(model, lambda: labelled_loss(model, batch)) == [labelled]
    # The shortest batch is computed both ways, to see whether the model's loss is that.
    calls = rows_of_head(model, lambda: heldout_cross_entropy(model, data, COLLATOR, 2))
    assert len(calls) == 3 + 2
    assert sum(calls) < 3 * labelled


def test_a_forward_has_few_labels_whatever_the_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of 128k words and of 16 long completions would be tens of GB."""
    model, data = adapted(ARCHITECTURES["llama"].make()), dataset()
    whole = heldout_cross_entropy(model, data, COLLATOR, len(data))
    own = [int((torch.as_tensor(data[i]["labels"]) != -100).sum()) for i in range(len(data))]
    monkeypatch.setattr(heldout, "MOST_LABELS", max(own))
    found = []
    calls = rows_of_head(
        model, lambda: found.append(heldout_cross_entropy(model, data, COLLATOR, len(data)))
    )
    assert max(calls[2:]) <= max(own)  # two of the first batch: whether the loss is the model's own
    assert found == [pytest.approx(whole, rel=1e-5)]


class OwnLoss(LlamaForCausalLM):
    """A model whose loss is more than the cross-entropy of its logits."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        if out.loss is not None:
            out.loss = out.loss + kwargs["input_ids"].float().mean() * 0 + out.logits.shape[1]
        return out


def test_a_model_with_a_loss_of_its_own_is_believed() -> None:
    torch.manual_seed(0)
    small = LlamaConfig(
        vocab_size=96,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        pad_token_id=0,
    )
    model, data = adapted(OwnLoss(small)), dataset()
    found = heldout_cross_entropy(model, data, COLLATOR, 1)
    assert found == pytest.approx(expected(model, data), rel=1e-5)


def test_virtual_tokens_before_the_prompt_do_not_shift_the_labels() -> None:
    base, data = ARCHITECTURES["llama"].make(), dataset()
    torch.manual_seed(0)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(base, config)
    found = heldout_cross_entropy(model, data, COLLATOR, 4)
    assert found == pytest.approx(expected(model, data), rel=1e-4)
