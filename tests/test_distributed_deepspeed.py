"""DeepSpeed's ZeRO-2 and 3 around a ReFT model: what one process learns; where it is installed."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from processes import run_together
from test_distributed_wrappers import LENGTH, PROMPT, ROWS, adapted, batches, learn

pytest.importorskip("deepspeed", reason="DeepSpeed is installed by hand, see docs/distributed.md")

pytestmark = [
    pytest.mark.slow,
    # PEFT 0.21 and transformers 5.23 rename gradient checkpointing, each at its own pace.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]


def learn_with_zero(stage: int) -> dict[str, Any]:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    # CPUs have a shared-memory kernel that would be compiled here; gloo does as well
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    model = adapted()
    trained = [p for p in model.parameters() if p.requires_grad]
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    numbers = sum(p.numel() for p in trained)
    engine, optimizer, _, _ = deepspeed.initialize(
        model=model,
        model_parameters=trained,
        optimizer=torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1),
        config={
            "train_micro_batch_size_per_gpu": ROWS // dist.get_world_size(),
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    flat = optimizer.single_partition_of_fp32_groups if stage == 2 else None
    stepped = sum(p.numel() for p in flat or optimizer.fp32_partitioned_groups_flat)
    rank, count = dist.get_rank(), dist.get_world_size()
    share = slice(rank * ROWS // count, (rank + 1) * ROWS // count)
    losses = []
    for (ids,) in batches(1):
        assert ids.shape == (ROWS, LENGTH)
        labels = ids.clone()
        labels[:, :PROMPT] = -100
        loss = engine(input_ids=ids[share], labels=labels[share]).loss
        engine.backward(loss)
        engine.step()
        total = loss.detach() / count
        dist.all_reduce(total)
        losses.append(float(total))
    state = {n: safe_get_full_fp32_param(p) for n, p in zip(names, trained, strict=True)}
    return {
        "losses": losses,
        "state": {name: t.detach().numpy() for name, t in state.items()},
        "stepped": stepped,
        "trained": numbers,
    }


@pytest.fixture(scope="module", params=[2, 3])
def in_two(request: Any) -> dict[str, Any]:
    first, _ = run_together(2, learn_with_zero, request.param)
    found: dict[str, Any] = first
    return found


def test_two_processes_learn_what_one_does(in_two):
    expected = learn(None, 1)
    assert in_two["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    for name, value in expected["state"].items():
        got = torch.from_numpy(in_two["state"][name])
        torch.testing.assert_close(got, torch.from_numpy(value), rtol=1e-3, atol=1e-5)
        if name.endswith(".R"):
            torch.testing.assert_close(
                got @ got.mT, torch.eye(2).expand(2, 2, 2), rtol=0, atol=1e-6
            )


def test_the_optimizer_has_a_process_share_of_what_is_trained_and_no_more(in_two):
    assert in_two["trained"] / 2 <= in_two["stepped"] <= in_two["trained"] / 2 + 64
