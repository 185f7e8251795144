"""docs/models.md says what was found, and a sample of what was found is so."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import transformers
from transformers.models.auto import modeling_auto

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import models_matrix
from zoo import page

RESULTS = json.loads(models_matrix.RESULTS.read_text())
SAMPLE = {
    "causal": ["llama", "mamba2", "qwen3_next", "deepseek_v4", "gemma3n_text", "xlm", "hrm_text"],
    "seq-cls": ["albert", "roberta", "gpt2"],
    "seq2seq": ["t5", "voxtral"],
    "image": ["vit", "resnet"],
}


def test_the_page_is_of_the_results() -> None:
    assert models_matrix.PAGE.read_text() == page.render(RESULTS)


def test_every_causal_class_was_tried() -> None:
    if RESULTS["versions"]["transformers"] != transformers.__version__:
        pytest.skip("the results are of another release of transformers")
    rows = RESULTS["kinds"]["causal"]
    names = {k: v["class"] for k, v in rows.items()}
    assert names == dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    for row in rows.values():
        failed = [c for c in row.get("checks", {}).values() if c.startswith("no")]
        assert (row["status"] == "works") == ("checks" in row and not failed)


# Models of transformers warn in their own ways; what is asked here is what they compute.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "model_type"), [(kind, name) for kind, names in SAMPLE.items() for name in names]
)
def test_a_sample_is_as_the_results_say(kind: str, model_type: str) -> None:
    if RESULTS["versions"]["transformers"] != transformers.__version__:
        pytest.skip("the results are of another release of transformers")
    found = models_matrix.try_out(models_matrix.subjects(kind)[model_type])
    assert found == RESULTS["kinds"][kind][model_type]
