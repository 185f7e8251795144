"""Real data sets for tests, where a folder with them is named."""

import os
from pathlib import Path

import pytest

HERE = os.environ.get("REFTUNE_TEST_DATA")
needs_data = pytest.mark.skipif(
    HERE is None,
    reason="REFTUNE_TEST_DATA names no folder: data sets are others' and not in this repository",
)
DATA = Path(HERE or "nowhere")
LLM_ADAPTERS = DATA / "llm_adapters/dataset"
