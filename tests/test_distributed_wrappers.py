"""DDP and FSDP2 around a ReFT model: what one process learns, and nothing sent of the base."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from processes import run_together
from reftune import ReftConfig, reft_layers
from reftune.distributed import Processes, evenly, trained_state, whole
from reftune.errors import RunError
from reftune.orthonormal import STEP_LENGTH, orthonormalise
from tiny import tiny_llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    # torch.utils.checkpoint asks the CPU for a device context that it deprecates itself.
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),
]

STEPS, ROWS, LENGTH, PROMPT = 4, 4, 12, 6
WAYS = ("ddp", "ddp, checkpointed", "layers", "whole", "checkpointed", "wrapper")


def adapted(tied: str = "sides", **config: Any) -> PeftModel:
    torch.manual_seed(0)
    given = {"task_type": "CAUSAL_LM", "r": 2, "positions": "f2+l2", "tied": tied, **config}
    return get_peft_model(tiny_llama(), ReftConfig(**given)).train()


def batches(accumulation: int) -> Iterator[list[Tensor]]:
    g = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        yield [torch.randint(3, 259, (ROWS, LENGTH), generator=g) for _ in range(accumulation)]


def after_prompt(ids: Tensor) -> Tensor:
    """Return the labels of rows whose first tokens are the prompt."""
    return ids.index_fill(1, torch.arange(PROMPT), -100)


def wrap(model: PeftModel, way: str) -> Any:
    if "checkpointed" in way:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if way.startswith("ddp"):
        return DistributedDataParallel(model)
    if way == "wrapper":
        apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, LlamaDecoderLayer))
    if way != "whole":
        for layer in model.get_base_model().model.layers:
            fully_shard(layer)
    return fully_shard(model)


@contextmanager
def reduced_elements(model: Any) -> Iterator[list[int]]:
    """Yield the numbers of elements of which gradients are reduced over the processes."""
    found: list[int] = []
    if isinstance(model, DistributedDataParallel):

        def hook(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            found.append(bucket.buffer().numel())
            work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
            return work.get_future().then(lambda done: done.value()[0])

        model.register_comm_hook(None, hook)
        yield found
        return
    # torch 2.13's name, and the one before
    name = next(n for n in ("reduce_scatter_single", "reduce_scatter_tensor") if hasattr(dist, n))
    scatter = getattr(dist, name)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        found.append((kwargs.get("input") if "input" in kwargs else args[1]).numel())
        return scatter(*args, **kwargs)

    setattr(dist, name, recorded)
    try:
        yield found
    finally:
        setattr(dist, name, scatter)


def learn(way: str | None, accumulation: int) -> dict[str, Any]:
    """Return what a few steps of AdamW lead to, in one process or in this one of several."""
    model = adapted()
    wrapped = model if way is None else wrap(model, way)
    count, rank = (1, 0) if way is None else (dist.get_world_size(), dist.get_rank())
    share = slice(rank * ROWS // count, (rank + 1) * ROWS // count)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    losses = []
    with reduced_elements(wrapped) as reduced:
        for step in batches(accumulation):
            total = torch.zeros(())
            for ids in step:
                labels = after_prompt(ids)
                loss = wrapped(input_ids=ids[share], labels=labels[share]).loss / accumulation
                loss.backward()
                total += loss.detach() / count
            if count > 1:
                dist.all_reduce(total)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(total))
    return {
        "losses": losses,
        "state": {name: t.numpy() for name, t in trained_state(model).items()},
        "reduced": sum(reduced) / (STEPS * accumulation),
        "trained": sum(p.numel() for p in trained),
        "base": sum(p.numel() for p in model.parameters() if not p.requires_grad),
    }


def learn_in_all_ways() -> dict[tuple[str, int], dict[str, Any]]:
    dist.init_process_group("gloo")
    return {(way, n): learn(way, n) for way in WAYS for n in (1, 2)}


@pytest.fixture(scope="module")
def in_two() -> dict[tuple[str, int], dict[str, Any]]:
    first, second = run_together(2, learn_in_all_ways)
    for key, found in first.items():  # every process has learned the same
        for name, value in found["state"].items():
            assert (value == second[key]["state"][name]).all(), (key, name)
    return first


@pytest.fixture(scope="module")
def in_one() -> dict[int, dict[str, Any]]:
    return {n: learn(None, n) for n in (1, 2)}


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_learn_what_one_does(in_one, in_two, way, accumulation):
    expected, found = in_one[accumulation], in_two[way, accumulation]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["state"].keys() == expected["state"].keys()
    for name, value in expected["state"].items():
        torch.testing.assert_close(
            torch.from_numpy(found["state"][name]), torch.from_numpy(value), rtol=1e-3, atol=1e-5
        )
        if name.endswith(".R"):
            R = torch.from_numpy(found["state"][name])
            torch.testing.assert_close(R @ R.mT, torch.eye(2).expand(2, 2, 2), rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_the_base_are_never_reduced(in_two, way):
    found = in_two[way, 1]
    assert found["trained"] <= found["reduced"] <= 1.2 * found["trained"] < 0.1 * found["base"]


# --- in one process, sharded all the same -------------------------------------------------------


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("tied", ["all", "sides", "none"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_retracts_a_sharded_r_as_it_does_a_whole_one(alone, tied, fused):
    states = []
    for way in (None, "layers", "whole"):
        model = adapted(tied)
        model = model if way is None else wrap(model, way)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, fused=fused)
        for (ids,) in batches(1):
            model(input_ids=ids, labels=after_prompt(ids)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        states.append(trained_state(model))
    for state in states[1:]:
        for name, value in states[0].items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6)


def test_an_r_that_is_cut_through_its_rows_is_gathered(alone):
    """`fully_shard` cuts between groups; a placement of a user's own may cut anywhere."""
    phi = next(iter(reft_layers(adapted()).values())).phi("default")
    before = phi.raw_R().detach().clone()
    mesh = init_device_mesh("cpu", (1,))
    phi.R = torch.nn.Parameter(distribute_tensor(before, mesh, [Shard(2)]))
    direction = torch.randn_like(before)
    phi.R.grad = distribute_tensor(direction, mesh, [Shard(2)])
    torch.optim.SGD([phi.R], lr=0.1).step()
    assert isinstance(phi.R, DTensor)
    expected = orthonormalise(before - STEP_LENGTH * 0.1 * direction)
    torch.testing.assert_close(whole(phi.R.detach()), expected, rtol=1e-4, atol=1e-6)


def test_a_layer_of_fsdps_returns_no_view(alone):
    """An in-place operation on a view would drop the hook that gathers for the backward."""
    model = wrap(adapted(), "layers")
    seen = []
    layer = model.get_base_model().model.layers[0]
    layer.register_forward_hook(lambda m, args, out: seen.append(out._is_view()))
    ids = next(batches(1))[0]
    model(input_ids=ids, labels=after_prompt(ids)).loss.backward()
    assert seen == [False]


# --- how a step is shared -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "batch_size", "accumulation", "expected"),
    [
        (1, 16, 2, (16, 2)),
        (2, 16, 2, (16, 1)),
        (2, 16, 1, (8, 1)),
        (3, 4, 3, (4, 1)),
        (4, 6, 2, (3, 1)),
        (2, 3, 4, (3, 2)),
        (2, 6, 3, (3, 3)),
    ],
)
def test_a_step_has_the_same_examples_on_however_many_processes(
    count, batch_size, accumulation, expected
):
    size, times = Processes(count).share(batch_size, accumulation)
    assert (size, times) == expected
    assert size * times * count == batch_size * accumulation


def test_a_step_that_cannot_be_shared_is_an_error():
    with pytest.raises(RunError, match="3 processes cannot share"):
        Processes(3).share(4, 2)


def test_the_rest_of_an_epoch_is_filled_with_rows_that_do_not_count():
    assert list(evenly([4, 2, 7], 2)) == [4, 2, 7, -5]
    assert list(evenly([4], 4)) == [4, -5, -5, -5]
    assert list(evenly([4, 2], 2)) == [4, 2]
