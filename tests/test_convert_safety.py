"""Files that are broken or mean harm: an error in words, nothing run, nothing half-written."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from converted import DATA, base_directory
from reftune import ConversionError, LayersNotFoundError
from reftune.convert import Answers, convert
from reftune_cli import app

KEY = "intkey_layer_0_comp_block_output_unit_pos_nunit_1#0.bin"


@pytest.fixture(scope="session")
def given(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    base = base_directory(tmp_path_factory.mktemp("convert"))
    return Answers(base=base, positions="f2+l3", act_fn="linear", method="loreft")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    shutil.copytree(DATA / "pyreft" / "loreft_tied", folder)
    return folder


class Harm:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def truncated(folder: Path) -> None:
    content = (folder / KEY).read_bytes()
    (folder / KEY).write_bytes(content[: len(content) // 2])


def no_dict(folder: Path) -> None:
    torch.save(torch.zeros(3), folder / KEY)


def no_tensors(folder: Path) -> None:
    torch.save({"weight": [1, 2]}, folder / KEY)


def claims_much(folder: Path) -> None:
    state = dict(torch.load(folder / KEY, weights_only=True))
    state["rotate_layer"] = torch.zeros(1).expand(10**7, 4)
    torch.save(state, folder / KEY)


def not_finite(folder: Path) -> None:
    state = dict(torch.load(folder / KEY, weights_only=True))
    state["bias"][0] = float("nan")
    torch.save(state, folder / KEY)


def wrong_shape(folder: Path) -> None:
    state = dict(torch.load(folder / KEY, weights_only=True))
    state["bias"] = state["bias"][:2].clone()
    torch.save(state, folder / KEY)


def no_tensor(folder: Path) -> None:
    state = dict(torch.load(folder / KEY, weights_only=True))
    del state["bias"]
    torch.save(state, folder / KEY)


def other_rank(folder: Path) -> None:
    state = dict(torch.load(folder / KEY, weights_only=True))
    cut = {k: (t[:, :2] if k == "rotate_layer" else t[:2]).clone() for k, t in state.items()}
    torch.save(cut, folder / KEY)


def no_file(folder: Path) -> None:
    (folder / KEY).unlink()


def strange_name(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / KEY).rename(folder / "intkey_other.bin")


def broken_json(folder: Path) -> None:
    (folder / "config.json").write_text('{"sorted_keys": [')


def list_json(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def other_class(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("LoreftIntervention", "MyIntervention"))


def outside(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["sorted_keys"][0] = "../../../etc/passwd"
    (folder / "config.json").write_text(json.dumps(config))


def unknown_layer(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / KEY).rename(folder / KEY.replace("layer_0", "layer_7"))


BROKEN: dict[Callable[[Path], None], str] = {
    truncated: "cannot be read as torch tensors",
    no_dict: "holds a Tensor; expected are tensors by name",
    no_tensors: "holds a dict; expected are tensors by name",
    claims_much: "more than the file holds",
    not_finite: "not finite",
    wrong_shape: "does not go with",
    no_tensor: "has no 'bias'",
    other_rank: "different shapes",
    no_file: "there is no file for layer_0",
    strange_name: "intkey_other.bin is named as no",
    broken_json: "cannot be read as JSON",
    list_json: "holds a list; expected is a JSON object",
    other_class: "class 'MyIntervention'",
    outside: "there is no file for",
}


@pytest.mark.parametrize("breaks", BROKEN, ids=lambda f: f.__name__)
def test_broken_checkpoints(
    breaks: Callable[[Path], None], source: Path, given: Answers, tmp_path: Path
) -> None:
    breaks(source)
    with pytest.raises(ConversionError, match=BROKEN[breaks]):
        convert(source, tmp_path / "out", answers=given)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_layer_that_the_base_does_not_have(source: Path, given: Answers, tmp_path: Path) -> None:
    unknown_layer(source)
    with pytest.raises(LayersNotFoundError, match="There is no layer 7"):
        convert(source, tmp_path / "out", answers=given)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_nothing_in_a_pickle_is_run(
    form: str, source: Path, given: Answers, tmp_path: Path
) -> None:
    harm = {"weight": Harm(tmp_path / "harmed")}
    if form == "torch":
        torch.save(harm, source / KEY)
    else:
        (source / KEY).write_bytes(pickle.dumps(harm))
    with pytest.raises(ConversionError, match="Nothing in it was run"):
        convert(source, tmp_path / "out", answers=given)
    assert not (tmp_path / "harmed").exists()


def test_a_truncated_safetensors(given: Answers, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(DATA / "adapters" / "loreft_safetensors", source)
    content = (source / "adapter.safetensors").read_bytes()
    (source / "adapter.safetensors").write_bytes(content[:200])
    with pytest.raises(ConversionError, match="cannot be read as safetensors"):
        convert(source, tmp_path / "out", answers=given)


def test_a_failing_write_leaves_nothing(
    source: Path, given: Answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("reftune.convert.adapter.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        convert(source, tmp_path / "out", answers=given)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_directory_is_replaced_only_when_asked(
    source: Path, given: Answers, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(ConversionError, match="exists already"):
        convert(source, out, answers=given)
    with pytest.raises(ConversionError, match=f"holds no adapter.*{out / source.name}"):
        convert(source, out, answers=given, overwrite=True)
    assert (out / "precious").read_text() == "x"
    (out / "precious").unlink()
    for _ in range(2):
        convert(source, out, answers=given, overwrite=True)
    assert {p.name for p in out.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_what_holds_the_source_is_not_replaced(source: Path, given: Answers) -> None:
    before = {p: p.read_bytes() for p in source.rglob("*") if p.is_file()}
    with pytest.raises(ConversionError, match="which would be replaced"):
        convert(source, source, answers=given, overwrite=True)
    assert {p: p.read_bytes() for p in source.rglob("*") if p.is_file()} == before


def test_other_directories_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ConversionError, match=r"holds notes.txt, which is no checkpoint"):
        convert(tmp_path, tmp_path / "out")
    with pytest.raises(ConversionError, match="is no directory"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ConversionError, match="Did you mean 'pyreft'"):
        convert(tmp_path, tmp_path / "out", to="pyreff")


def test_the_command_asks_and_then_converts(source: Path, given: Answers, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["convert", str(source), str(out)])
    assert done.exit_code == 1
    assert "Give --base --positions --act-fn" in done.output
    flags = ["--base", str(given.base), "--positions", "f2+l3", "--act-fn", "linear"]
    done = CliRunner().invoke(app, ["convert", str(source), str(out), *flags])
    assert done.exit_code == 0, done.output
    assert "loreft, rank 4, 2 layers, positions f2+l3" in done.output
    assert (out / "adapter_model.safetensors").is_file()
    done = CliRunner().invoke(app, ["convert", str(out), str(tmp_path / "p"), "--to", "pyreft"])
    assert done.exit_code == 0, done.output
    assert "note: " in done.output
