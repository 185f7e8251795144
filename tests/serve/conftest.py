"""Serving tests. Those that start vLLM (test_engine_*.py) run where it is: `make test-serve`."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # tiny.py

HAS_VLLM = importlib.util.find_spec("vllm") is not None
collect_ignore_glob = [] if HAS_VLLM else ["test_engine_*.py", "test_server*.py"]

if HAS_VLLM:
    os.environ.update(
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",  # not all test processes to one core
        VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine in this process, its state in reach
        VLLM_LOGGING_LEVEL="WARNING",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == HERE and item.path.name.startswith(("test_engine_", "test_server")):
            item.add_marker(pytest.mark.serve)
            item.add_marker(pytest.mark.filterwarnings("ignore"))  # vLLM's and its libraries' own


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a tiny Llama."""
    from serving_tiny import save_base

    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def start(base: Path) -> Iterator[Callable[..., Any]]:
    """Return a function that starts a vLLM engine; at most one is kept at a time."""
    running: list[Any] = []

    def stop() -> None:
        import gc

        while running:
            running.pop().llm_engine.engine_core.shutdown()
        gc.collect()

    def start(reft: bool = True, **options: Any) -> Any:
        from vllm import LLM

        stop()
        given = {"model": str(base), "dtype": "float32", "enforce_eager": True, "seed": 0}
        given |= {"max_model_len": 512, "max_num_seqs": 16, "block_size": 32}
        if reft:
            given["additional_config"] = {"reftune": {}}
        running.append(LLM(**(given | options)))
        return running[-1]

    yield start
    stop()
