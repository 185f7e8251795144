"""What a step computes of which request, read from vLLM's model runners.

Only requests with edits that may lie in the step are looked at; the test is on arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from reftune.serve.edits import Edits
from reftune.serve.plan import Chunk


def v1_chunks(runner: Any, generating: set[str]) -> Iterator[Chunk]:
    """Yield the chunks of a step of vLLM's V1 `GPUModelRunner` (and those derived from it).

    Positions count from the start of the sequence and prompts end where they were submitted to
    end, so chunks, cached prefixes and recomputation after a preemption need no case of their own.
    `generating` collects the requests whose generated tokens are edited, too.
    """
    batch = runner.input_batch
    n = batch.num_reqs
    prompt, computed = batch.num_prompt_tokens[:n], batch.num_computed_tokens_cpu[:n]
    wanted = (computed < prompt).nonzero()[0].tolist()
    if generating:
        generating.intersection_update(runner.requests)
        index = batch.req_id_to_index
        wanted = sorted({*wanted, *(index[name] for name in generating if name in index)})
    starts = runner.query_start_loc.np
    for i in wanted:
        name = batch.req_ids[i]
        params = runner.requests[name].sampling_params
        edits = None if params is None else Edits.read(params.extra_args)
        if edits is None:
            continue
        if edits.edit_generated:
            generating.add(name)
        row, end = int(starts[i]), int(starts[i + 1])
        yield Chunk(edits, int(prompt[i]), int(computed[i]), row, end - row)


def v2_chunks(batch: Any, requests: Mapping[str, tuple[Edits, int]]) -> Iterator[Chunk]:
    """Yield the chunks of a step of vLLM's V2 model runner.

    `requests` has the edits and the prompt length of those that have edits; what V2 calls the
    prefill of a request also holds what it generated before a preemption.
    """
    if not requests:
        return
    starts = batch.query_start_loc_np
    for i, name in enumerate(batch.req_ids):
        if name in requests:
            edits, prompt = requests[name]
            row, end = int(starts[i]), int(starts[i + 1])
            yield Chunk(edits, prompt, int(batch.num_computed_tokens_np[i]), row, end - row)
