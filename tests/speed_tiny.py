"""Rows, tiny adapted models and the oracle that the tests of training's shortcuts share.

The oracle is the model itself: its own loss on the one collator's batch, and that loss's gradients.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapted_tiny import config, strong
from reftune.data import Collator, TokenDataset
from reftune.prompts import Encoded
from reftune.speed.frozen import Frozen, Store
from reftune.speed.plan import Model, Shortcuts, describe
from reftune.speed.training import Step, taking

VOCAB = 96
# Tokens of prompt and completion: more padding than not, prompts shorter than the positions.
SHAPES = ((3, 2), (9, 4), (1, 3), (14, 9), (2, 1))
COLLATOR = Collator(pad_token_id=0)
GiB = 1 << 30

Found = tuple[Tensor, dict[str, Tensor]]


def dataset(shapes: Sequence[tuple[int, int]] = SHAPES, seed: int = 0) -> TokenDataset:
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(6, VOCAB, (p + c,), generator=g).tolist() for p, c in shapes]
    return TokenDataset([Encoded(one, p) for one, (p, _) in zip(ids, shapes, strict=True)])


def rows(shapes: Sequence[tuple[int, int]] = SHAPES, seed: int = 0) -> list[Any]:
    data = dataset(shapes, seed)
    return [data[i] for i in range(len(data))]


def adapted(base: nn.Module, method: str = "loreft", **settings: Any) -> PeftModel:
    """Return a model with an adapter far from the identity; by default in its upper layers."""
    torch.manual_seed(0)
    settings = {"positions": "l2", "layers": [1, 2]} | settings
    return strong(get_peft_model(base, config(method, **settings))).train()


def described(model: nn.Module) -> Model:
    seen = describe(model)
    assert seen is not None
    return seen


def frozen(model: nn.Module, store: Store | None) -> Frozen:
    seen = described(model)
    return Frozen(seen.decoder, seen.layers, min(seen.edited), store)


def ways(model: nn.Module, folder: Path) -> dict[str, Shortcuts]:
    """Return the shortcuts, each alone, and all that go together."""
    memory, disk = (lambda: Store(GiB)), (lambda: Store(0, GiB, folder))
    chosen: dict[str, dict[str, Any]] = {
        "labels only": {},
        "unread": {"unread": True},
        "padding": {"padding": True},
        "sharing": {"padding": True, "sharing": True},
        "packed": {"packed": True},
        "packed, unread": {"packed": True, "unread": True},
        "reuse": {"frozen": frozen(model, memory())},
        "heads": {"frozen": frozen(model, None), "heads": True},
        "reuse, heads": {"frozen": frozen(model, memory()), "heads": True},
        "reuse, heads, disk": {"frozen": frozen(model, disk()), "heads": True},
        "everything": {
            **{"frozen": frozen(model, memory()), "heads": True},
            **{"unread": True, "padding": True, "sharing": True},
        },
    }
    return {name: Shortcuts(on=True, **which) for name, which in chosen.items()}


def found(model: nn.Module, batch: dict[str, Any], **kwargs: Any) -> Found:
    """Return the loss, and the gradient of each trainable parameter."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = model(**batch, **kwargs).loss
    grads = torch.autograd.grad(
        loss, list(named.values()), allow_unused=True, materialize_grads=True
    )
    return loss.detach(), dict(zip(named, grads, strict=True))


def oracle(model: nn.Module, examples: Sequence[Any], **kwargs: Any) -> Found:
    return found(model, COLLATOR(list(examples)), **kwargs)


def stepped(model: nn.Module, step: Step, examples: Sequence[Any], **kwargs: Any) -> Found:
    result = found(model, step.before(step.collate(list(examples))), **kwargs)
    step.after()
    return result


def taken(
    model: nn.Module, shortcuts: Shortcuts, examples: Sequence[Any], times: int = 2, **kwargs: Any
) -> list[Found]:
    """Return what some steps with shortcuts find on the same rows: the second may reuse."""
    with taking(described(model), shortcuts, COLLATOR) as step:
        return [stepped(model, step, examples, **kwargs) for _ in range(times)]


def assert_same(got: Found, expected: Found, tolerance: float = 1e-5) -> None:
    """Compare losses, and gradients by their norms: elements near zero are rounding."""
    torch.testing.assert_close(got[0], expected[0], rtol=tolerance, atol=0.0)
    assert got[1].keys() == expected[1].keys()
    largest = max(float(g.norm()) for g in expected[1].values())
    for name, gradient in expected[1].items():
        error = float((got[1][name] - gradient).norm())
        limit = tolerance * (float(gradient.norm()) + 1e-2 * largest)
        assert error <= limit, f"{name}: {error} > {limit}"


def left_behind(model: nn.Module, trained: bool = False) -> dict[str, Any]:
    """Return whatever a shortcut could leave changed, less what training itself may change."""
    state: dict[str, Any] = {}
    for name, m in model.named_modules():
        hooks = (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)
        state[f"{name} forward"] = vars(m).get("forward")
        state[name] = None if trained else (m.training, *map(len, hooks))
        if isinstance(m, PreTrainedModel):
            parts = [getattr(m.config, part) for part in m.config.sub_configs]
            found = [one._attn_implementation for one in (m.config, *parts) if one is not None]
            state[f"{name} attention"] = found
    for name, p in model.named_parameters():
        state[f"{name} itself"] = (id(p), p.data_ptr(), p.device, p.requires_grad)
        state[f"{name} gradient"] = trained or p.grad is None
    return state


@contextmanager
def nothing_left(model: nn.Module, trained: bool = False) -> Iterator[None]:
    """Check that a model is after a block what it was before, however the block ends."""
    before = left_behind(model, trained)
    try:
        yield
    finally:
        assert left_behind(model, trained) == before
