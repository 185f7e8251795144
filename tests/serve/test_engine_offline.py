"""`VLLMEngine` gives the completions of `HFEngine`; the version is looked at first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from serving_tiny import prompts, save_adapter, with_adapters
from typer.testing import CliRunner

from reftune.errors import ReftConfigError, UnsupportedVersionError
from reftune.generate import Completion, Sampling
from reftune.serve.engine import VLLMEngine
from reftune_cli import app

HERE = Path(__file__).parent
OPTIONS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "block_size": 32}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: save_adapter(folder / name, i) for i, name in enumerate("ab")}


@pytest.fixture(scope="module")
def engine(base: Path, adapters: dict[str, Path]) -> VLLMEngine:
    return VLLMEngine(str(base), adapters, active="a", options=OPTIONS)


def test_completions_are_those_of_transformers(
    engine: VLLMEngine, adapters: dict[str, Path]
) -> None:
    inputs = prompts(30, 9, 50, 21, 4)
    names = ["a", "b", None, "a", "b"]
    oracle = with_adapters(adapters)
    texts = [c.text for c in oracle.generate(inputs, Sampling(max_new_tokens=20), names)]
    stop = texts[0][3:5]
    for sampling in (Sampling(max_new_tokens=20), Sampling(max_new_tokens=20, stop=(stop,))):
        seen: dict[int, Completion] = {}
        found = engine.generate(inputs, sampling, names, on_done=seen.__setitem__)
        assert found == oracle.generate(inputs, sampling, names)
        assert [seen[i] for i in range(len(inputs))] == found
    oracle.model.set_adapter("a")
    assert engine.generate(inputs, Sampling()) == oracle.generate(inputs, Sampling())


def test_what_is_decided_ends(engine: VLLMEngine) -> None:
    (found,) = engine.generate(
        prompts(30), Sampling(max_new_tokens=40), is_decided=lambda i, text: len(text) > 4
    )
    assert found.finish_reason == "decided"
    assert 0 < len(found.token_ids) < 40
    assert not engine.llm.llm_engine.has_unfinished_requests()


def test_a_seed_draws_the_same(engine: VLLMEngine) -> None:
    sampling = Sampling(max_new_tokens=20, temperature=1.0, seed=3)
    first = engine.generate(prompts(20, 20), sampling)
    assert first == engine.generate(prompts(20, 20), sampling)


def test_identity_tells_functions_apart(engine: VLLMEngine) -> None:
    assert engine.identity == engine.identity_of("a")
    assert len({engine.identity_of(name) for name in ("a", "b", None)}) == 3


def test_what_vllm_has_not_is_said(engine: VLLMEngine) -> None:
    with pytest.raises(ReftConfigError, match="num_beams=4"):
        engine.generate(prompts(5), Sampling(num_beams=4))
    with pytest.raises(ReftConfigError, match="no adapter 'c'"):
        engine.generate(prompts(5), Sampling(), ["c"])
    assert not engine.llm.llm_engine.has_unfinished_requests()


def test_an_untried_version_gives_a_sentence(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.99.1")
    with pytest.raises(UnsupportedVersionError, match=r"This is vLLM 0\.99\.1; .* 0\.32"):
        VLLMEngine(str(base))
    done = CliRunner().invoke(app, ["serve", str(base)])
    assert (done.exit_code, "This is vLLM 0.99.1" in " ".join(done.output.split())) == (1, True)


_MIXED = """
if __name__ == "__main__":
    from pathlib import Path
    from reftune.generate import Sampling
    from reftune.serve.engine import VLLMEngine
    from serving_tiny import prompts
    names = ["a", "b", None, "a", "b"]
    folder = Path({folder!r})
    engine = VLLMEngine({base!r}, {{n: folder / n for n in "ab"}}, options={options!r})
    found = engine.generate(prompts(30, 9, 50, 21, 4), Sampling(max_new_tokens=12), names)
    print("TOKENS", [list(c.token_ids) for c in found])
"""


@pytest.mark.parametrize(
    ("options", "environment"),
    [
        pytest.param({"enforce_eager": False}, {}, id="compiled"),
        pytest.param(
            {"tensor_parallel_size": 2},
            {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"},
            id="two workers",
        ),
    ],
)
def test_in_processes_of_its_own(
    options: dict[str, object],
    environment: dict[str, str],
    base: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
) -> None:
    folder = str(adapters["a"].parent)
    script = tmp_path / "mixed.py"  # spawned workers read it again
    script.write_text(
        f"import sys; sys.path[:0] = {[str(HERE), str(HERE.parent)]}"
        + _MIXED.format(folder=folder, base=str(base), options={**OPTIONS, **options})
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("TOKENS"))
    inputs, names = prompts(30, 9, 50, 21, 4), ["a", "b", None, "a", "b"]
    oracle = with_adapters(adapters).generate(inputs, Sampling(max_new_tokens=12), names)
    assert line == f"TOKENS {[list(c.token_ids) for c in oracle]}"
