"""Versions by content: what changes under a server's feet, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save_file
from serving_tiny import save_adapter

from reftune.errors import AdapterMismatchError, ReftConfigError, ReftuneError, RunError
from reftune.serve import catalog as catalogs
from reftune.serve import store
from reftune.serve.adapter import ModelShape
from reftune.serve.catalog import Catalog, CatalogSettings, named_adapters
from reftune.serve.parameters import read_parameters
from reftune.serve.settings import ServeSettings
from reftune.serve.store import Store

# PEFT asks transformers for what it renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

SHAPE = ModelShape(64, 3)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "adapter", 1, layers=[0, 2], positions="f2+l2")


def test_a_version_is_named_by_its_content(adapter: Path, tmp_path: Path) -> None:
    own = Store(SHAPE)
    first = own.get(adapter)
    assert first.layers == (0, 2)
    copy = shutil.copytree(adapter, tmp_path / "elsewhere")
    assert own.get(copy) is first
    assert own.get(first.directory) is first
    save_adapter(copy, 2, layers=[0, 2], positions="f2+l2")
    assert own.get(copy).digest != first.digest
    config = json.loads((copy / CONFIG).read_text())
    before = own.get(copy)
    (copy / CONFIG).write_text(json.dumps({**config, "positions": "f2+l3"}))
    assert own.get(copy).digest != before.digest


def test_what_looks_unchanged_is_read_again_when_told(adapter: Path) -> None:
    own, stat = Store(SHAPE), (adapter / CONFIG).stat()
    first = own.get(adapter)
    text = (adapter / CONFIG).read_text().replace("f2+l2", "f2+l1")
    (adapter / CONFIG).write_text(text)
    os.utime(adapter / CONFIG, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert own.get(adapter) is first
    own.forget(adapter)
    assert own.get(adapter).config.positions == "f2+l1"


def test_a_version_outlives_what_is_written_over_it(adapter: Path) -> None:
    own = Store(SHAPE)
    version = own.get(adapter)
    (adapter / WEIGHTS).write_bytes(b"half of a fi")
    with pytest.raises(AdapterMismatchError, match="cannot be read as safetensors"):
        own.get(adapter)
    shutil.rmtree(adapter)
    assert read_parameters(version.directory)[0] == (0, 2)
    with pytest.raises(AdapterMismatchError, match="no adapter that can be served"):
        own.get(adapter)


def test_what_is_checked_and_hashed_is_what_is_kept(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the directory is written over while it is read."""
    before, read = load((adapter / WEIGHTS).read_bytes()), store._read

    def read_and_lose(path: Path) -> bytes:
        data = read(path)
        path.write_bytes(b"lost")
        return data

    monkeypatch.setattr(store, "_read", read_and_lose)
    own = Store(SHAPE)
    version = own.get(adapter)
    layers, kept = read_parameters(version.directory)
    for i, layer in enumerate(layers):
        (W,) = (t for key, t in before.items() if key.endswith(f"{layer}.reft.reft_phi.W"))
        assert W.equal(kept["W"][i, :, : W.shape[1]])
    monkeypatch.undo()
    with pytest.raises(AdapterMismatchError):
        own.get(adapter)  # and it is looked at again


def test_a_store_goes_with_its_server(adapter: Path) -> None:
    own = Store(SHAPE)
    folder = own.get(adapter).directory.parent
    assert folder.is_dir()
    own._finalizer()
    assert not folder.exists()


def test_what_would_hang_or_fill_the_server_is_refused(adapter: Path, tmp_path: Path) -> None:
    """A pipe that nobody writes to, a file that is larger than all memory for adapters."""
    size = (adapter / WEIGHTS).stat().st_size
    assert Store(SHAPE, largest=size).get(adapter)
    with pytest.raises(AdapterMismatchError, match="served are files of up to"):
        Store(SHAPE, largest=size - 1).get(adapter)
    (adapter / WEIGHTS).unlink()
    os.mkfifo(adapter / WEIGHTS)
    with pytest.raises(AdapterMismatchError, match="is no file"):
        Store(SHAPE).get(adapter)


def test_a_copy_that_somebody_deleted_is_no_version(adapter: Path) -> None:
    """The request is refused; a worker that missed it would end with all requests."""
    own = Store(SHAPE)
    version = own.get(adapter)
    shutil.rmtree(version.directory)
    with pytest.raises(AdapterMismatchError, match="copy of this adapter is gone"):
        own.get(version.directory)


def _without(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def _config(**change: Any) -> Any:
    def write(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text()) | change
        (folder / CONFIG).write_text(json.dumps(config))

    return write


def _tensors(change: Any) -> Any:
    def write(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return write


def _of_dtype(dtype: str) -> bytes:
    header = json.dumps({"x": {"dtype": dtype, "shape": [8], "data_offsets": [0, 4]}}).encode()
    if dtype == "I32":
        header = header.replace(b"[8]", b"[1]")
    return len(header).to_bytes(8, "little") + header + b"\0" * 4


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def _first(tensors: dict[str, torch.Tensor]) -> str:
    return next(key for key in sorted(tensors) if key.endswith("bias"))


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (_without(WEIGHTS), "no adapter that can be served"),
        (_without(CONFIG), "no adapter that can be served"),
        (_pickled, "no adapter that can be served"),
        (lambda f: (f / CONFIG).write_text("{"), "cannot be read"),
        (lambda f: (f / CONFIG).write_text("[]"), "cannot be read"),
        (lambda f: (f / WEIGHTS).write_bytes(b""), "safetensors"),
        (lambda f: (f / WEIGHTS).write_bytes(_of_dtype("F4")), "safetensors"),
        (lambda f: (f / WEIGHTS).write_bytes(_of_dtype("I32")), "no edit of a decoder layer"),
        (_config(peft_type="LORA"), "type 'LORA'"),
        (_config(method="loreeft"), "accepted are"),
        (_config(positions="x7"), "positions is"),
        (_config(layers=[0, 7]), "layers 0 to 2"),
        (_config(layers=[0, 1]), "missing tensors"),
        (_config(target_modules=["mlp"]), "outputs of decoder layers"),
        (_config(modules_to_save=["lm_head"]), "outputs of decoder layers"),
        (_config(r=5), "has shape"),
        (_tensors(lambda t: t.pop(_first(t))), "missing tensors"),
        (_tensors(lambda t: t.update(other=torch.ones(1))), "no edit of a decoder layer"),
        (_tensors(lambda t: t[_first(t)].fill_(float("nan"))), "not finite"),
    ],
)
def test_a_broken_adapter_is_refused_with_the_reason(harm: Any, says: str, adapter: Path) -> None:
    harm(adapter)
    with pytest.raises(ReftuneError, match=says) as raised:
        Store(SHAPE).get(adapter)
    assert "reftune-serve-" not in str(raised.value)  # the user's path, not ours


def test_an_adapter_of_another_model_is_refused(adapter: Path) -> None:
    with pytest.raises(AdapterMismatchError, match="width 64, this one has 32"):
        Store(ModelShape(32, 3)).get(adapter)
    with pytest.raises(AdapterMismatchError, match="layers 0 to 1"):
        Store(ModelShape(64, 2)).get(adapter)


def test_names_come_from_adapters_runs_and_folders(adapter: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "tea"
    shutil.copytree(adapter, run / "adapter")
    assert dict(named_adapters(str(adapter))) == {"adapter": adapter}
    assert dict(named_adapters(f"mine={adapter}")) == {"mine": adapter}
    assert dict(named_adapters(str(run))) == {"tea": run / "adapter"}
    shutil.copytree(adapter, tmp_path / "runs" / "coffee")
    (tmp_path / "runs" / "notes").mkdir()
    assert dict(named_adapters(str(tmp_path / "runs"))) == {
        "coffee": tmp_path / "runs" / "coffee",
        "tea": run / "adapter",
    }
    for wrong in (
        str(tmp_path / "nothing"),
        f"x={tmp_path / 'runs'}",
        str(tmp_path / "runs/notes"),
    ):
        with pytest.raises(ReftConfigError, match="no adapter, no run"):
            list(named_adapters(wrong))
    with pytest.raises(ReftConfigError, match="without a colon"):
        Catalog(CatalogSettings((f"a:b={adapter}",)))
    with pytest.raises(ReftConfigError, match="Two adapters are named 'tea'"):
        Catalog(CatalogSettings((str(run), f"tea={adapter}")))


def test_adapters_are_named_on_the_hub(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the Hub gives and how it refuses is tested against one, in test_hub_errors.py."""

    def find(name: str, largest: int | None) -> Path:
        if name != "user/tea@v1":
            raise RunError(f"The adapter {name!r} is not there.")
        return adapter

    monkeypatch.setattr(catalogs, "find_adapter", find)
    assert dict(named_adapters("user/tea@v1")) == {"tea": adapter}
    assert dict(named_adapters("mine=user/tea@v1")) == {"mine": adapter}
    asks_the_hub = Catalog(CatalogSettings(roots=("hub",)))
    assert asks_the_hub.locate("user/tea@v1") == adapter
    with pytest.raises(ReftConfigError, match="is not there"):
        asks_the_hub.locate("user/coffee")
    with pytest.raises(ReftConfigError, match="without --adapter-roots"):
        Catalog(CatalogSettings()).locate("user/tea@v1")


def test_adapters_are_loaded_from_allowed_roots_only(adapter: Path, tmp_path: Path) -> None:
    allowed, outside = tmp_path / "allowed", adapter
    inside = shutil.copytree(adapter, allowed / "one")
    catalog = Catalog(CatalogSettings(roots=(str(allowed),)))
    assert catalog.locate(str(inside)) == inside
    os.symlink(outside, allowed / "link")
    linked = shutil.copytree(adapter, allowed / "two")
    (linked / WEIGHTS).unlink()
    os.symlink(outside / WEIGHTS, linked / WEIGHTS)
    for path in (
        outside,
        allowed / ".." / "adapter",
        allowed / "link",
        linked,
        f"{inside}/../../adapter",
        "/etc",
    ):
        with pytest.raises(ReftConfigError, match="outside"):
            catalog.locate(str(path))
    for missing in (allowed / "none", "org/name", "a\0b"):
        with pytest.raises(ReftConfigError, match="no directory"):
            catalog.locate(str(missing))
    with pytest.raises(ReftConfigError, match="without --adapter-roots"):
        Catalog(CatalogSettings()).locate(str(inside))


def test_settings_are_checked() -> None:
    assert ServeSettings.read({}) is None
    assert ServeSettings.read({"reftune": {"memory": 5}}) == ServeSettings(memory=5)
    for wrong in ({"memry": 5}, {"memory": -1}, {"memory": "5"}, 5):
        with pytest.raises(ReftConfigError):
            ServeSettings.read({"reftune": wrong})


def test_ten_thousand_adapters_are_registered_unread(adapter: Path, tmp_path: Path) -> None:
    """In less than 1 ms each; what is read is what is asked for."""
    folder = tmp_path / "many"
    for i in range(10_000):
        (folder / str(i)).mkdir(parents=True)
        for name in (CONFIG, WEIGHTS):
            os.link(adapter / name, folder / str(i) / name)
    start = time.process_time()
    catalog = Catalog(CatalogSettings((str(folder),)))
    assert time.process_time() - start < 10.0
    assert len(catalog.paths) == 10_000
    own = Store(SHAPE)
    assert own.get(catalog.paths["1234"]).layers == (0, 2)
    assert len(list(own.directory.iterdir())) == 1


def test_a_version_holds_what_the_tuner_computes_with(tmp_path: Path) -> None:
    """R on its manifold where the checkpoint has it off, ranks padded with rows that do nothing."""
    folder = save_adapter(tmp_path / "adapter", 1, layers=[1], r=3)
    tensors = load((folder / WEIGHTS).read_bytes())
    (key,) = (key for key in tensors if key.endswith(".R"))
    tensors[key] = 1.5 * tensors[key] + 0.01
    save_file(tensors, folder / WEIGHTS)
    own = Store(SHAPE)
    version = own.get(folder)
    phi = version.config.build(64)
    phi.load_state_dict({k.rpartition(".")[2]: t for k, t in tensors.items()})
    layers, kept = read_parameters(version.directory)
    assert layers == (1,)
    for name, value in phi.named_parameters():
        assert kept[name].shape[2] == 4
        torch.testing.assert_close(kept[name][0, :, :3], value.detach(), rtol=0, atol=1e-6)
        assert not kept[name][:, :, 3:].any()
