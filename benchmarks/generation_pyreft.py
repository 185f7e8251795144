"""pyreft's `generate`, in an environment of its own: a job per line in, a result per line out.

    python generation_pyreft.py MODEL ADAPTER.safetensors DTYPE DEVICE THREADS PREFIX SUFFIX

The adapter is LoReFT with the R, W and bias of each layer ("3.R"), tied over `PREFIX` first and
`SUFFIX` last tokens of a prompt. A job has `ids` and `mask` (padded on the left) and `new`, the
number of tokens to generate; its result has the `seconds` that took and the new `tokens`.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import pyreft
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM


def attach(model: Any, adapter: dict[str, Tensor]) -> Any:
    """Return pyreft's model with the adapter's interventions, one per layer."""
    layers = sorted({int(name.partition(".")[0]) for name in adapter})
    representations = []
    for layer in layers:
        R = adapter[f"{layer}.R"]
        intervention = pyreft.LoreftIntervention(
            embed_dim=R.shape[1], low_rank_dimension=R.shape[0], dtype=R.dtype
        )
        intervention.load_state_dict(
            {
                "rotate_layer": R.T.contiguous(),
                "weight": adapter[f"{layer}.W"],
                "bias": adapter[f"{layer}.bias"],
            }
        )
        representations.append(
            {
                "layer": layer,
                "component": "block_output",
                "low_rank_dimension": R.shape[0],
                "intervention": intervention,
            }
        )
    reft_model = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=representations))
    reft_model.set_device(model.device)
    return reft_model


def locations(mask: Tensor, prefix: int, suffix: int) -> list[list[int]]:
    """Return the columns that are edited of each example of a batch padded on the left."""
    T = mask.shape[1]
    starts = (T - mask.sum(-1)).tolist()
    return [[*range(start, start + prefix), *range(T - suffix, T)] for start in starts]


def generate(reft_model: Any, job: dict[str, Any], prefix: int, suffix: int) -> dict[str, Any]:
    """Return the new tokens of a job, and how long they took."""
    device = reft_model.get_device()
    ids, mask = (torch.tensor(job[name], device=device) for name in ("ids", "mask"))
    units = [locations(mask, prefix, suffix)] * len(reft_model.interventions)
    synchronise()
    start = time.perf_counter()
    _, sequences = reft_model.generate(
        {"input_ids": ids, "attention_mask": mask},
        unit_locations={"sources->base": (None, units)},
        intervene_on_prompt=True,
        do_sample=False,
        min_new_tokens=job["new"],
        max_new_tokens=job["new"],
        pad_token_id=job["pad"],
    )
    synchronise()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens": sequences[:, ids.shape[1] :].tolist()}


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    model_name, adapter, dtype, device, threads, prefix, suffix = sys.argv[1:]
    torch.set_num_threads(int(threads))
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=getattr(torch, dtype))
    reft_model = attach(model.to(device).eval(), load_file(adapter))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        result = generate(reft_model, json.loads(line), int(prefix), int(suffix))
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
