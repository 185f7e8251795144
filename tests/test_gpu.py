"""What only a GPU shows: where models are put, and that training there is training here."""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification
from typer.testing import CliRunner

from adapted_tiny import batch, config, on_gpu, prompts, reft, strong
from reftune import options, reft_layers, trainer
from reftune.errors import RunError
from reftune.orthonormal import is_orthonormal, orthonormalise
from reftune.run import execute, load_adapter
from reftune.settings import RunConfig
from reftune_cli import app
from runs import InterruptAt, tiny_run
from tiny import tiny_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    # inductor imports a part of torch that torch deprecates
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),  # it advises them
    pytest.mark.filterwarnings("ignore:.*Function.> should not be instantiated:DeprecationWarning"),
]

HELDOUT = {"heldout_fraction": 0.25, "template": "none"}
ASKED = {"tasks": ["demo"], "limit": 2}


def losses(config: RunConfig) -> list[float]:
    lines = (config.directory / "log.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"shortcuts": False},
        {"reuse": True, "epochs": 4},
        {"packing": True},
        {"compile": True},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "offload_base": True},
        {"gradient_checkpointing": True, "offload_base": True, "shortcuts": False},
    ],
)
def test_a_run_learns_what_it_learns_on_a_cpu(tmp_path: Path, settings: dict[str, Any]) -> None:
    sections: dict[str, Any] = {"data": HELDOUT, "evaluate": ASKED}
    there = tiny_run(tmp_path / "gpu", train={**settings, "device": "auto"}, **sections)
    here = tiny_run(tmp_path / "cpu", train={**settings, "compile": False}, **sections)
    found, expected = execute(there), execute(here)
    assert losses(there) == pytest.approx(losses(here), rel=1e-3)
    assert found["heldout"]["adapter"] == pytest.approx(expected["heldout"]["adapter"], rel=1e-3)
    assert found["tasks"]["demo"]["adapter"]["n"] == 2
    taken = set(found["train"]["shortcuts"])
    assert ("compile" in taken) == settings.get("compile", False)
    if "compile" not in settings:  # compiled layers compute padding
        unasked = set() if settings.get("reuse") else {"reuse"}
        assert taken == set(expected["train"]["shortcuts"]) - unasked
    assert "cpu_seconds" in expected["train"]
    assert "cpu_seconds" not in found["train"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_run_in_16_bits_learns_about_the_same(tmp_path: Path, dtype: str) -> None:
    there = tiny_run(tmp_path / "gpu", train={"device": "auto"}, data=HELDOUT)
    here = tiny_run(tmp_path / "cpu", data=HELDOUT)
    found = execute(there.model_copy(update={"dtype": dtype}))
    expected = execute(here)
    assert found["heldout"]["adapter"] == pytest.approx(expected["heldout"]["adapter"], rel=0.05)
    assert all(math.isfinite(loss) for loss in losses(there))


def test_an_interrupted_run_resumes_and_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"train": {"device": "auto"}, "adapter": {"dropout": 0.1}}
    whole, broken = (tiny_run(tmp_path / name, **settings) for name in "ab")
    execute(whole)
    with pytest.raises(RunError, match="interrupted at step 3"):
        execute(broken, reporter=InterruptAt(3))
    execute(broken, resume=True)
    assert losses(broken) == pytest.approx(losses(whole), rel=1e-3)


def test_an_offloaded_base_is_not_on_the_gpu_while_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where: list[set[str]] = []
    compute = trainer.ReftTrainer.compute_loss

    def spy(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        frozen = {n: p.device.type for n, p in model.named_parameters() if not p.requires_grad}
        where.append({device for name, device in frozen.items() if ".layers." in name})
        return compute(self, model, *args, **kwargs)

    monkeypatch.setattr(trainer.ReftTrainer, "compute_loss", spy)
    wanted = {"device": "auto", "gradient_checkpointing": True, "offload_base": True}
    execute(tiny_run(tmp_path, train=wanted, data=HELDOUT))
    assert where
    assert all(devices == {"cpu"} for devices in where)


def test_a_loaded_adapter_is_used_on_the_gpu(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, train={"device": "auto"})
    execute(config)
    loaded = load_adapter(config.directory)
    assert {p.device.type for p in loaded.model.parameters()} == {"cuda"}
    on_cpu = load_adapter(config.directory, device="cpu")
    ids = torch.arange(3, 15)[None]
    with torch.inference_mode():
        found, expected = loaded.model(ids.cuda()).logits.cpu(), on_cpu.model(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    result = CliRunner().invoke(app, ["generate", str(config.directory), "say aa"])
    assert result.exit_code == 0, result.output


def test_retraction_is_exact_where_products_are_rounded() -> None:
    R = torch.nn.init.orthogonal_(torch.empty(8, 576, device="cuda"))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        found = orthonormalise(R + 1e-3 * torch.randn_like(R))
        assert is_orthonormal(found)
    finally:
        torch.set_float32_matmul_precision(before)
    gram = found.double() @ found.double().mT
    assert (gram - torch.eye(8, dtype=gram.dtype, device="cuda")).abs().max() < 1e-6


# --- as the CPU has it, and without waiting -------------------------------------------------------


def waits(run: Callable[[], object]) -> list[str]:
    """Return where the host waits for the GPU while `run` runs, as "file:line"."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waited = [w for w in caught if "called a synchronizing" in str(w.message)]
    return [f"{w.filename}:{w.lineno}" for w in waited]


def steps(model: nn.Module) -> Callable[[], None]:
    """Return what takes three training steps, after four.

    Labels are looked at in the first, second and fourth forward, and seldom later.
    """
    inputs = on_gpu(batch())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()

    def several(count: int) -> None:
        for _ in range(count):
            step()

    several(4)
    return lambda: several(3)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"positions": "all"},
    {"tied": "none"},
    {"dropout": 0.1},
    {"edit_generated": True},
    {"method": "direft"},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_step_waits_for_the_gpu_no_oftener_than_the_bare_model(settings: dict[str, Any]) -> None:
    bare = waits(steps(tiny_llama().cuda().train()))
    found = waits(steps(reft(**settings).cuda().train()))
    assert len(found) <= len(bare), found


@pytest.mark.parametrize("settings", SETTINGS)
def test_generation_waits_for_the_gpu_no_oftener_than_the_bare_model(
    settings: dict[str, Any],
) -> None:
    inputs = on_gpu(prompts())

    def generating(model: Any, **more: Any) -> Callable[[], object]:
        asked = {"do_sample": False, "min_new_tokens": 4, "max_new_tokens": 4}
        return lambda: model.generate(**inputs, **asked, **more)

    bare = generating(tiny_llama().cuda())
    adapted = generating(reft(**settings).cuda())
    bare(), adapted()
    found = waits(adapted)
    assert len(found) <= len(waits(bare)), found


def two_adapters() -> PeftModel:
    model = reft(subspaces={"a": [0, 2], "b": [1, 3]})
    model.add_adapter("other", config("loreft", positions="f2+l1"))
    return strong(model, seed=2)


ON_THE_HOST: list[dict[str, Any]] = [
    {"prompt_lengths": torch.tensor([4, 3])},
    {"prompt_mask": torch.tensor([[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]])},
    {"subspaces": ["a"]},
    {"subspaces": [["a"], ["b"]]},
]


@pytest.mark.parametrize("told", ON_THE_HOST, ids=lambda told: next(iter(told)))
def test_what_is_told_from_the_host_is_not_waited_for(told: dict[str, Any]) -> None:
    model, inputs, bare = two_adapters().cuda().eval(), on_gpu(prompts()), tiny_llama().cuda()

    def run() -> Tensor:
        with options(**told):
            return model(**inputs).logits

    with torch.no_grad():
        found, expected = run(), bare(**inputs).logits
        assert not torch.equal(found, expected)
        assert len(waits(run)) <= len(waits(lambda: bare(**inputs)))


def test_a_batch_of_different_adapters_is_each_alone_and_waits_no_oftener() -> None:
    model, inputs, bare = two_adapters().cuda().eval(), on_gpu(prompts()), tiny_llama().cuda()
    names = ["other", "default"]
    for layer in reft_layers(model).values():
        layer.strength["other"] = 0.5

    def together() -> Tensor:
        return model(**inputs, adapter_names=names).logits

    with torch.no_grad():
        mixed = together()
        for i, name in enumerate(names):
            model.set_adapter(name)
            torch.testing.assert_close(mixed[i], model(**inputs).logits[i], rtol=1e-3, atol=1e-3)
        bare(**inputs)
        assert len(waits(together)) <= len(waits(lambda: bare(**inputs)))


@pytest.mark.parametrize("settings", SETTINGS)
def test_generated_tokens_are_those_of_a_cpu(settings: dict[str, Any]) -> None:
    asked = {"do_sample": False, "max_new_tokens": 8}
    model = reft(**settings)
    expected = model.generate(**prompts(), **asked)
    model.cuda()
    found = model.generate(**on_gpu(prompts()), **asked)
    assert torch.equal(found.cpu(), expected)
    static = model.generate(**on_gpu(prompts()), **asked, cache_implementation="static")
    assert torch.equal(static.cpu(), expected)


def test_a_compiled_model_and_autocast_are_as_the_model() -> None:
    model, inputs = reft().cuda(), on_gpu(batch())
    with torch.no_grad():
        expected = model(**inputs).logits
        found = torch.compile(model)(**inputs).logits
        with torch.autocast("cuda", torch.bfloat16):
            rounded = model(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert float((rounded - expected).norm() / expected.norm()) < 0.05


def test_an_encoder_is_as_on_a_cpu() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    base = BertForSequenceClassification(BertConfig(vocab_size=60, num_attention_heads=4, **shape))
    adapted = get_peft_model(base, config(positions="f1", task_type="SEQ_CLS", r=2))
    model = strong(adapted).eval()
    inputs = {key: value for key, value in batch().items() if key != "labels"}
    with torch.no_grad():
        expected = model(**inputs).logits
        found = model.cuda()(**on_gpu(inputs)).logits
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)
