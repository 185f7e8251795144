"""What only a GPU runs, on stand-ins: full CUDA graphs, and the V2 model runner's state."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from serving_tiny import save_adapter
from torch import nn

from reftune.errors import ReftConfigError
from reftune.serve.adapter import ModelShape
from reftune.serve.attach import STREAM_ALONE, State, _require_whole_states
from reftune.serve.bank import Bank
from reftune.serve.edits import Edits
from reftune.serve.plugin import _is_draft
from reftune.serve.store import Store


def test_a_step_with_edits_leaves_the_full_graph() -> None:
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import ForwardContext, override_forward_context

    from reftune.serve.plugin import _leave_full_graph

    for before, after in (("FULL", "NONE"), ("PIECEWISE", "PIECEWISE"), ("NONE", "NONE")):
        context = ForwardContext({}, {}, {}, cudagraph_runtime_mode=CUDAGraphMode[before])
        with override_forward_context(context):
            _leave_full_graph()
        assert context.cudagraph_runtime_mode == CUDAGraphMode[after]


def test_the_op_is_a_splitting_op() -> None:
    from vllm.config import CompilationConfig, CompilationMode

    from reftune.serve.plugin import install

    install()
    config = CompilationConfig(mode=CompilationMode.VLLM_COMPILE)
    config.set_splitting_ops_for_v1("naive")
    assert "reftune::edit" in (config.splitting_ops or [])
    assert config.splitting_ops_contain_attention()


def test_v2_plans_from_its_own_request_records(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A request that was preempted comes again with what it generated: its prompt is as before."""

    class Base:
        def add_request(self, req_index: int, new_req_data: Any) -> None: ...
        def remove_request(self, req_id: str) -> None: ...
        def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, int]:
            return {"kept": 1}

    stand_in: Any = ModuleType("model_states")
    stand_in.resolve_model_state_cls = lambda vllm_config, model: Base
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.gpu.model_states", stand_in)
    from reftune.serve.model_state import edited_model_state

    store = Store(ModelShape(64, 3))
    adapter = store.get(save_adapter(tmp_path / "a", 1, positions="l2"))
    state = State(Bank(64, torch.device("cpu"), 1e9, 0))
    runner: Any = edited_model_state(nn.Module(), None, state)()
    extra = {"reftune": Edits.of(adapter).write()}
    for name, params in (("edited", SimpleNamespace(extra_args=extra)), ("base", None)):
        data = SimpleNamespace(req_id=name, sampling_params=params, prompt_token_ids=[5] * 6)
        runner.add_request(0, data)

    def step(computed: int, length: int) -> list[int]:
        batch = SimpleNamespace(
            req_ids=["base", "edited"],
            query_start_loc_np=np.array([0, 3, 3 + length]),
            num_computed_tokens_np=np.array([0, computed]),
        )
        assert runner.prepare_inputs(batch, None) == {"kept": 1}
        return [] if state.plan is None else state.plan.entries[0].rows.tolist()

    assert step(0, 4) == []
    assert step(4, 2) == [3, 4]
    assert step(6, 1) == []
    assert step(0, 9) == [7, 8]  # recomputed with three generated tokens
    runner.remove_request("edited")
    assert step(0, 6) == []


@pytest.mark.parametrize("splits", [{"ubatch_size": 2}, {"enable_dbo": True}])
def test_what_splits_a_steps_tokens_is_refused(splits: dict[str, Any]) -> None:
    from vllm.config import ParallelConfig

    from reftune.serve.attach import _require_whole_steps

    _require_whole_steps(SimpleNamespace(parallel_config=ParallelConfig()))
    with pytest.raises(ReftConfigError, match="splits the tokens"):
        _require_whole_steps(SimpleNamespace(parallel_config=ParallelConfig(**splits)))


@pytest.mark.parametrize(
    ("layer", "dtype", "says"),
    [
        ({}, torch.float16, None),
        ({"use_sequence_parallel_moe": False, "routed_scaling_factor": 2.5}, torch.bfloat16, None),
        ({"use_sequence_parallel_moe": True}, torch.bfloat16, "splits the tokens"),
        ({"routed_scaling_factor": 2.5}, torch.float16, "Serve the model in bfloat16"),
    ],
)
def test_layers_that_do_not_return_whole_states_are_refused(
    layer: dict[str, Any], dtype: torch.dtype, says: str | None
) -> None:
    module: Any = nn.Module()
    for name, value in layer.items():
        setattr(module, name, value)
    if says is None:
        _require_whole_states(module, dtype)
    else:
        with pytest.raises(ReftConfigError, match=says):
            _require_whole_states(module, dtype)


def test_the_layers_that_have_added_the_residual_are_known() -> None:
    """Read from vLLM's sources: they add `residual`, and return (hidden_states, residual)."""
    import vllm

    found = set()
    for path in (Path(vllm.__file__).parent / "model_executor" / "models").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ClassDef) or "Layer" not in node.name:
                continue
            if "mtp" in path.name:  # drafts
                continue
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == "forward":
                    text = ast.unparse(method)
                    adds = r"hidden_states = (residual \+|hidden_states \+ residual)"
                    both = re.search(r"return \(hidden_states, residual\)", text)
                    if both and re.search(adds, text):
                        found.add(node.name)
    assert found == STREAM_ALONE


def test_a_request_that_pools_is_refused() -> None:
    from vllm.lora.request import LoRARequest
    from vllm.pooling_params import PoolingParams

    from reftune.serve.frontend import Frontend

    frontend: Any = Frontend.__new__(Frontend)
    frontend._has_lora = False
    wanted = LoRARequest("tea", 1, "somewhere")
    assert frontend.edits(None, PoolingParams(task="embed"), {}) is None
    with pytest.raises(ReftConfigError, match="is for generation"):
        frontend.edits(wanted, PoolingParams(task="embed"), {})


def config_with(draft: Any, target: Any) -> Any:
    speculative = SimpleNamespace(draft_model_config=draft, target_model_config=target)
    return SimpleNamespace(speculative_config=speculative)


def test_a_draft_model_is_not_edited() -> None:
    draft, target = object(), object()
    assert _is_draft(config_with(draft, target), draft)
    assert not _is_draft(config_with(draft, target), target)
    assert not _is_draft(config_with(target, target), target)  # n-grams propose, and no model
    assert not _is_draft(SimpleNamespace(speculative_config=None), target)


def test_v2_has_what_we_hang_into() -> None:
    """Read, not imported: its modules need Triton."""
    import vllm

    gpu = Path(vllm.__file__).parent / "v1" / "worker" / "gpu"

    def members(file: str, name: str) -> dict[str, list[str]]:
        tree = ast.parse((gpu / file).read_text())
        (found,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
        methods = [n for n in found.body if isinstance(n, ast.FunctionDef)]
        fields = [n for n in found.body if isinstance(n, ast.AnnAssign)]
        return {m.name: [a.arg for a in m.args.args] for m in methods} | {
            ast.unparse(f.target): [] for f in fields
        }

    state = members("model_states/interface.py", "ModelState")
    assert state["add_request"] == ["self", "req_index", "new_req_data"]
    assert state["remove_request"] == ["self", "req_id"]
    assert state["prepare_inputs"] == ["self", "input_batch", "req_states"]
    assert {"prepare_dummy_inputs", "get_additional_cg_support"} <= set(state)
    batch = members("input_batch.py", "InputBatch")
    assert {"req_ids", "query_start_loc_np", "num_computed_tokens_np"} <= set(batch)
    assert "get_model_state_cls" in (gpu / "model_states" / "__init__.py").read_text()
