"""What the Hub refuses, in words: what we got and what to do, and never a traceback."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import fake_hub
import reftune
from fake_hub import FakeHub
from hub_tiny import BASE, DATA, files_in, hub_in_place, online
from reftune.data import load_rows, source_name
from reftune.errors import DataError, RunError
from reftune.hub import commit_of, is_hub_name, split_revision
from reftune.models import load_model
from reftune.stored import find_adapter
from reftune.tasks import get_task
from reftune_cli import app

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    """Serve an adapter: public, private and gated."""
    folder = tmp_path_factory.mktemp("hub")
    with hub_in_place(folder) as served:
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(BASE)
        config = reftune.ReftConfig(task_type="CAUSAL_LM", r=2, positions="f2+l2")
        get_peft_model(base, config).save_pretrained(str(folder / "adapter"))
        files = files_in(folder / "adapter")
        served.add("user/adapter", files)
        served.add("user/secret", files, private=True)
        served.add("user/gated", files, gated=True)
        served.add("user/gated-base", served.files(BASE), gated=True)
        about = json.loads(files["adapter_config.json"])
        for name, changed in (("on-gated", "user/gated-base"), ("on-nothing", "user/nothing")):
            config_file = json.dumps(about | {"base_model_name_or_path": changed}).encode()
            served.add(f"user/{name}", files | {"adapter_config.json": config_file})
        yield served


def refused(*args: str) -> str:
    """Run a command that fails; return what it says, on one line."""
    result = CliRunner().invoke(app, list(args), env={"COLUMNS": "400"})
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


@pytest.mark.parametrize("verb", ["generate", "info", "evaluate"])
@pytest.mark.parametrize(
    ("name", "token", "says"),
    [
        ("user/nowhere", fake_hub.OTHER_TOKEN, "has no adapter of that name"),
        ("user/nowhere", None, "no token was sent"),
        ("user/secret", fake_hub.OTHER_TOKEN, "a private one that this account may not see"),
        ("user/secret", None, "log in (hf auth login)"),
        ("user/gated", fake_hub.OTHER_TOKEN, "is gated: its owners decide who may load it"),
        ("user/gated", None, "Ask for access at"),
        ("user/adapter@v9", fake_hub.OTHER_TOKEN, "has no revision 'v9'. It has main."),
        ("user/adapter@", None, "names no revision"),
        ("user/adapter", "hf_expired", "does not accept who you are"),
        (BASE, None, "is no adapter: it has no adapter_config.json"),
    ],
)
def test_an_adapter_that_cannot_be_had(
    hub: FakeHub,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    name: str,
    token: str | None,
    says: str,
) -> None:
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    more = {"generate": ["say aa"], "evaluate": ["--tasks", "demo"], "info": []}[verb]
    assert says in refused(verb, name, *more)


def test_the_owner_gets_what_is_private_or_gated(hub: FakeHub) -> None:
    for name in ("user/secret", "user/gated"):
        assert CliRunner().invoke(app, ["info", name]).exit_code == 0


def test_a_file_that_is_too_large_is_not_downloaded(hub: FakeHub) -> None:
    hub.add("user/huge", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x" * 2000})
    before = len(hub.requests)
    with pytest.raises(RunError, match=r"adapter_model.safetensors.*2,000 bytes.*up to 1,999"):
        find_adapter("user/huge", largest=1999)
    assert not any("resolve" in request for request in hub.requests[before:])
    assert (find_adapter("user/huge", largest=2000) / "adapter_model.safetensors").is_file()


def test_a_base_that_cannot_be_had(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", fake_hub.OTHER_TOKEN)
    for name, says in (
        ("user/on-gated", "The model 'user/gated-base' is gated"),
        ("user/on-nothing", "has no model of that name"),
    ):
        assert says in refused("generate", name, "say aa")
    with pytest.raises(RunError, match="has no revision 'v9'"):
        load_model(f"{BASE}@v9")
    commit = hub.model(BASE).branches["main"]
    load_model(f"{BASE}@{commit}")
    assert commit_of(BASE) == commit_of(f"{BASE}@{commit}") == commit


def test_offline_is_said_and_what_was_downloaded_works(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert CliRunner().invoke(app, ["generate", "user/adapter", "say aa"]).exit_code == 0
    online(monkeypatch, False)
    asked = len(hub.requests)
    assert CliRunner().invoke(app, ["generate", "user/adapter", "say aa"]).exit_code == 0
    assert "HF_HUB_OFFLINE=1 is set" in refused("info", "user/never-seen")
    with pytest.raises(RunError, match="HF_HUB_OFFLINE=1 is set"):
        load_model("user/never-seen")
    assert len(hub.requests) == asked, "nobody was asked"


def test_a_hub_that_cannot_be_reached(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = FakeHub()
    closed.close()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", closed.url)
    assert f"({closed.url}) cannot be reached" in refused("info", "user/never-seen")


def test_data_of_the_hub(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from runs import ROWS

    commit = hub.repositories["datasets", DATA].branches["main"]
    for name in (DATA, f"{DATA}@{commit}"):
        assert [dict(row.fields) for row in load_rows(name)] == ROWS
    hub.add("user/hidden", {"train.jsonl": b"{}"}, "datasets", private=True)
    monkeypatch.setenv("HF_TOKEN", fake_hub.OTHER_TOKEN)
    for name, says in (
        ("user/hidden", "has no data set of that name, or a private one"),
        (f"{DATA}@v9", "has no revision 'v9'"),
    ):
        with pytest.raises(DataError, match=says):
            load_rows(name)


def test_data_with_a_loading_script(hub: FakeHub) -> None:
    scripted = hub.add("user/scripted", {"scripted.py": b""}, "datasets")
    there = "user/scripted@refs/convert/parquet"
    with pytest.raises(DataError, match=rf"found scripted\.py\. .* write {there}\."):
        load_rows("user/scripted")
    rows = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", "b"]}), rows)
    scripted.commit("refs/convert/parquet", {"default/train/0000.parquet": rows.getvalue()})
    assert [row.fields["prompt"] for row in load_rows(there)] == ["a", "b"]
    assert source_name(there) == there


def test_sets_that_are_one_file_of_a_repository(hub: FakeHub) -> None:
    sums = b'{"input": "Al has 3 hats ?", "target": 3.0}\n'
    files = {"data/mawps/addsub.jsonl": sums, "data/mawps/singleop.jsonl": b"{", "x.py": b""}
    hub.add("HuggingFaceTB/math_tasks", files, "datasets")
    replies = json.dumps([{"instruction": "Hi", "output": "Ho", "generator": "it"}]).encode()
    with pytest.raises(DataError, match=r"no data set of that name.* give data\.data_dir"):
        get_task("alpaca_eval")
    script = {"alpaca_eval.py": b"", "alpaca_eval.json": replies}
    hub.add("tatsu-lab/alpaca_eval", script, "datasets")
    task = get_task("AddSub")
    assert (task.num_examples, task.gold(task.example(0))) == (1, "3")
    instruct = get_task("alpaca_eval", "hub")
    assert instruct.gold(instruct.example(0)) == "Ho"
    with pytest.raises(DataError, match=r"data/mawps/multiarith\.jsonl.* give data\.data_dir"):
        get_task("MultiArith")


def test_what_is_here_is_no_name_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "a@b").mkdir(parents=True)
    assert not is_hub_name("runs/a@b")
    assert split_revision("runs/a@b") == ("runs/a@b", None)
    assert is_hub_name("runs/c@d")
    assert split_revision("runs/c@d") == ("runs/c", "d")
    for name in ("./runs/c", "/runs/c", "a/b/c", "demo", "smollm2-135m", "../x"):
        assert not is_hub_name(name), name
