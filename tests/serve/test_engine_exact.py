"""vLLM with the plugin against transformers with reftune's tuner: the same greedy tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from serving_tiny import ARCHITECTURES, expected, prompts, save_adapter, save_base

import reftune

Start = Callable[..., Any]
NAMES = ["f7l7", None, "last", "rank3", "none", "sides", "all", None, "steer", "act", "f7l7"]
LENGTHS = (40, 33, 64, 5, 9, 20, 130, 33, 7, 17, 4)


def save_adapters(folder: Path, architecture: str = "llama") -> dict[str, Path]:
    configs: dict[str, dict[str, Any]] = {
        "f7l7": {"positions": "f7+l7"},
        "last": {"positions": "l1", "layers": [1], "method": "noreft"},
        "rank3": {"positions": "f3", "r": 3, "layers": [0, 2]},
        "none": {"positions": "f3+l2", "tied": "none"},
        "sides": {"positions": "f3+l2", "tied": "sides", "method": "direft"},
        "all": {"positions": "all", "method": "red", "r": None},
        "steer": {"positions": "l2", "edit_generated": True, "method": "lobireft"},
        "act": {"positions": "l4", "act_fn": "relu"},
    }
    return {
        name: save_adapter(folder / name, i, architecture, **config)
        for i, (name, config) in enumerate(configs.items())
    }


def requests(adapters: dict[str, Path], names: Sequence[str | None]) -> list[Any]:
    from vllm.lora.request import LoRARequest

    number = {name: i + 1 for i, name in enumerate(adapters)}
    return [n and LoRARequest(n, number[n], str(adapters[n])) for n in names]


def run(
    llm: Any,
    inputs: Sequence[list[int]],
    lora: Sequence[Any] | None = None,
    tokens: int = 16,
    **params: Any,
) -> list[Any]:
    from vllm import SamplingParams

    given = SamplingParams(temperature=0, max_tokens=tokens, **params)
    return list(
        llm.generate(
            [{"prompt_token_ids": p} for p in inputs], given, lora_request=lora, use_tqdm=False
        )
    )


def tokens_of(outputs: Sequence[Any]) -> list[tuple[int, ...]]:
    found = [list(o.outputs[0].token_ids) for o in outputs]
    return [tuple(ids[:-1] if ids[-1] == 2 else ids) for ids in found]


def state_of(llm: Any) -> Any:
    from reftune.serve.plugin import state_of as find

    return find(llm.llm_engine.vllm_config)


def check(llm: Any, adapters: dict[str, Path], architecture: str = "llama") -> None:
    """Each prompt alone in transformers = all mixed in one vLLM batch; each adapter matters."""
    inputs = prompts(*LENGTHS)
    wanted = expected(adapters, inputs, NAMES, architecture)
    assert tokens_of(run(llm, inputs, requests(adapters, NAMES))) == wanted
    bare = expected(adapters, inputs, [None] * len(inputs), architecture)
    changed = {name for name, a, b in zip(NAMES, wanted, bare, strict=True) if a != b}
    assert len(changed) >= len(adapters) - 2


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_adapters(tmp_path_factory.mktemp("adapters"))


def test_mixed_adapters_are_each_alone(start: Start, adapters: dict[str, Path]) -> None:
    check(start(), adapters)


def test_chunked_prefill(start: Start, adapters: dict[str, Path]) -> None:
    llm = start(max_num_batched_tokens=32, enable_prefix_caching=False)
    check(llm, adapters)
    assert state_of(llm).counts.busy_steps > 10  # prompts came in parts


def test_preemption_and_recomputation(start: Start, adapters: dict[str, Path]) -> None:
    """With too few blocks requests are preempted, and what they generated is no prompt then."""
    llm = start(
        num_gpu_blocks_override=12,
        max_model_len=256,
        enable_prefix_caching=False,
        disable_log_stats=False,
    )
    inputs = prompts(60, 50, 64, 40, 30, 62)
    names = ["f7l7", "last", "none", None, "sides", "rank3"]
    from reftune.generate import Sampling

    wanted = expected(adapters, inputs, names, sampling=Sampling(max_new_tokens=60))
    assert tokens_of(run(llm, inputs, requests(adapters, names), tokens=60)) == wanted
    metrics = {m.name: m for m in llm.get_metrics()}
    assert metrics["vllm:num_preemptions"].value > 0


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"llama"}))
def test_every_architecture(architecture: str, start: Start, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", architecture)
    check(start(model=str(base)), save_adapters(tmp_path, architecture), architecture)


def test_base_requests_are_bare_vllms_bit_for_bit(start: Start, adapters: dict[str, Path]) -> None:
    """In a batch of the same shape, whatever the others do."""
    inputs = prompts(*LENGTHS)

    def base_rows(llm: Any, lora: list[Any] | None) -> list[Any]:
        outputs = run(llm, inputs, lora, tokens=6, logprobs=5, ignore_eos=True)
        return [
            [{t: p.logprob for t, p in step.items()} for step in outputs[i].outputs[0].logprobs]
            for i, name in enumerate(NAMES)
            if name is None
        ]

    bare = base_rows(start(reft=False), None)
    assert base_rows(start(), requests(adapters, NAMES)) == bare


def test_decoding_does_no_work(start: Start, adapters: dict[str, Path]) -> None:
    llm = start()
    names = ["f7l7", "last", None, "none"]
    run(llm, prompts(30, 20, 10, 40), requests(adapters, names), tokens=12, ignore_eos=True)
    counts = state_of(llm).counts
    assert (counts.steps, counts.busy_steps) == (12, 1)
    assert counts.rows == 14 + 1 + 5


def test_methods_that_pool_tokens(start: Start, tmp_path: Path) -> None:
    """They need whole prompts: exact without chunked prefill, refused with it."""
    adapters = {
        "pool": save_adapter(tmp_path / "pool", 1, method="reft_r1", r=None, positions="l24")
    }
    inputs = prompts(5, 50, 40, 45)
    llm = start(enable_chunked_prefill=False, max_num_batched_tokens=512)
    lora = requests(adapters, ["pool", "pool", None, "pool"])
    wanted = expected(adapters, inputs, ["pool", "pool", None, "pool"])
    assert wanted != expected(adapters, inputs, [None] * 4)
    for _ in range(2):  # the second time blocks are cached
        assert tokens_of(run(llm, inputs, lora)) == wanted
    with pytest.raises(reftune.errors.ReftConfigError, match="no-enable-chunked-prefill"):
        run(start(), inputs, lora)


def test_strength_and_subspaces_of_each_request(start: Start, tmp_path: Path) -> None:
    from vllm import SamplingParams

    subspaces = {"a": [0, 1], "b": [2]}
    adapters = {
        "one": save_adapter(tmp_path / "one", 1, positions="f3+l3", subspaces=subspaces, scale=4.0)
    }
    (prompt,) = prompts(30)
    options: list[dict[str, Any]] = [
        {},
        {"strength": 0.0},
        {"strength": -1.5},
        {"subspaces": ["a"]},
        {"subspaces": ["b"], "strength": 2},
    ]
    llm = start()
    lora = requests(adapters, ["one"] * len(options))
    for _ in range(2):  # the second time from cached blocks
        outputs = llm.generate(
            [{"prompt_token_ids": prompt}] * len(options),
            [SamplingParams(temperature=0, max_tokens=16, extra_args=o) for o in options],
            lora_request=lora,
            use_tqdm=False,
        )
        wanted = []
        for o in options:
            with reftune.options(strength=o.get("strength"), subspaces=o.get("subspaces")):
                wanted += expected(adapters, [prompt], ["one"])
        assert tokens_of(outputs) == wanted
    assert len(set(wanted)) > 3


def test_beam_search_keeps_to_the_prompt(start: Start, adapters: dict[str, Path]) -> None:
    """vLLM submits each beam as a new prompt: what it generated must not become one."""
    from vllm.sampling_params import BeamSearchParams

    from reftune.generate import Sampling

    inputs = prompts(20, 31)
    names = ["none", "last"]
    outputs = start().beam_search(
        [{"prompt_token_ids": p} for p in inputs],
        BeamSearchParams(beam_width=1, max_tokens=8, ignore_eos=True),
        lora_request=requests(adapters, names),
    )
    wanted = expected(adapters, inputs, names, sampling=Sampling(max_new_tokens=8))
    for output, prompt, tokens in zip(outputs, inputs, wanted, strict=True):
        assert tuple(output.sequences[0].tokens[len(prompt) :])[: len(tokens)] == tokens


def test_eviction_changes_nothing(start: Start, adapters: dict[str, Path]) -> None:
    """With memory for hardly one adapter they come and go; a pinned one stays."""
    llm = start(additional_config={"reftune": {"memory": 0.01}}, max_num_seqs=2)
    check(llm, adapters)
    assert state_of(llm).bank.evictions > 5


def test_a_bad_request_leaves_the_others_unharmed(
    start: Start, adapters: dict[str, Path], tmp_path: Path
) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    llm = start()
    inputs = prompts(20)
    broken = save_adapter(tmp_path / "broken", 1)
    (broken / "adapter_model.safetensors").write_bytes(b"")
    for path in (broken, tmp_path / "none"):
        with pytest.raises(reftune.errors.AdapterMismatchError):
            run(llm, inputs, [LoRARequest("broken", 99, str(path))])
    with pytest.raises(reftune.errors.ReftConfigError, match="names none"):
        llm.generate(
            [{"prompt_token_ids": inputs[0]}],
            SamplingParams(extra_args={"strength": 2.0}),
            use_tqdm=False,
        )
    check(llm, adapters)


def test_an_adapter_that_overflows_harms_nobody(start: Start, adapters: dict[str, Path]) -> None:
    """Its states are not finite, and the blocks that they were in are used again."""
    from vllm import SamplingParams

    llm = start(num_gpu_blocks_override=24, enable_prefix_caching=False)
    wild = [SamplingParams(temperature=0, max_tokens=40, extra_args={"strength": 1e38})] * 6
    lora = requests(adapters, ["all"] * 6)
    inputs = [{"prompt_token_ids": p} for p in prompts(*[60] * 6)]
    llm.generate(inputs, wild, lora_request=lora, use_tqdm=False)
    check(llm, adapters)
    mixed = prompts(40, 33)
    outputs = llm.generate(
        [{"prompt_token_ids": p} for p in mixed],
        [wild[0], SamplingParams(temperature=0, max_tokens=16)],
        lora_request=requests(adapters, ["all", "f7l7"]),
        use_tqdm=False,
    )
    assert tokens_of(outputs)[1:] == expected(adapters, mixed[1:], ["f7l7"])
