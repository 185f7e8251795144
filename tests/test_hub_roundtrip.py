"""Push and pull through PEFT, huggingface_hub and `reftune`: what comes back is what was pushed."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import fake_hub
import reftune
from fake_hub import FakeHub
from hub_tiny import BASE, DATA, hub_in_place
from reftune import publish
from reftune.errors import RunError
from reftune.publish import push
from reftune.run import execute, load_adapter
from reftune_cli import app
from runs import tiny_run

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    # huggingface_hub 2.4 uploads large files in a way that httpx2 deprecates
    pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw:DeprecationWarning"),
]
IDS = torch.arange(3, 15)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def hub(folder: Path) -> Iterator[FakeHub]:
    with hub_in_place(folder) as served:
        yield served


@pytest.fixture(scope="module")
def run(hub: FakeHub, folder: Path) -> Path:
    """Return a run on a base and data of the Hub."""
    config = tiny_run(folder, data={"train": DATA}, evaluate={"tasks": ["demo"], "limit": 2})
    execute(config.model_copy(update={"model": BASE}))
    return config.directory


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def invoke(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(args), env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_a_pushed_run_comes_back_the_same(hub: FakeHub, run: Path) -> None:
    code, output = invoke("push", str(run), "user/run", "--private")
    assert code == 0, output
    assert f"{hub.url}/user/run/commit/" in output
    assert hub.model("user/run").private
    here, there = load_adapter(run, dtype="float32"), load_adapter("user/run", dtype="float32")
    assert torch.equal(logits(here.model), logits(there.model))
    with here.model.disable_adapter():
        assert not torch.equal(logits(here.model), logits(there.model))
    assert there.base == f"{BASE}@{hub.model(BASE).branches['main']}"
    sent, kept = hub.files("user/run"), run / "adapter"
    assert sent["adapter_model.safetensors"] == (kept / "adapter_model.safetensors").read_bytes()
    results = json.loads((run / "results.json").read_text())
    assert results.pop("system")["accelerator"], "kept here, and nobody else's business"
    assert json.loads(sent["results.json"]) == results
    assert str(run.parent).encode() not in b"".join(sent.values()), "no folder of this machine"


def test_the_verbs_take_a_name_of_the_hub(hub: FakeHub, run: Path) -> None:
    push(run, "user/verbs")
    options = ("--max-new-tokens", "6", "--dtype", "float32")
    here, there = (
        invoke("generate", str(name), "say aa", *options) for name in (run, "user/verbs")
    )
    assert here == there
    assert there[0] == 0
    code, output = invoke("info", "user/verbs")
    assert code == 0
    assert "f2+l2" in output
    assert hub.model(BASE).branches["main"] in output
    code, output = invoke("evaluate", "user/verbs", "--tasks", "demo", "--limit", "1")
    assert code == 0, output
    assert "demo" in output


def test_revisions_are_told_apart(hub: FakeHub, run: Path, tmp_path: Path) -> None:
    push(run, "user/versions")
    HfApi().create_tag("user/versions", tag="v1")
    first = logits(load_adapter("user/versions", dtype="float32").model)
    base = AutoModelForCausalLM.from_pretrained(BASE)
    torch.manual_seed(1)
    other = get_peft_model(base, reftune.ReftConfig(task_type="CAUSAL_LM", r=2, positions="f2+l2"))
    other.save_pretrained(str(tmp_path))
    push(tmp_path, "user/versions")
    push(run, "user/versions", revision="branch")
    assert torch.equal(logits(load_adapter("user/versions", dtype="float32").model), logits(other))
    for name in ("user/versions@v1", "user/versions@branch"):
        assert torch.equal(logits(load_adapter(name, dtype="float32").model), first), name
    plain = AutoModelForCausalLM.from_pretrained(BASE)
    assert torch.equal(
        logits(PeftModel.from_pretrained(plain, "user/versions", revision="v1")), first
    )


def test_push_to_hub_of_peft_is_pulled_by_peft(hub: FakeHub) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(BASE),
        reftune.ReftConfig(task_type="CAUSAL_LM", r=2, positions="f2+l2"),
    ).eval()
    model.push_to_hub("user/through-peft", private=True)
    assert hub.model("user/through-peft").private
    base = AutoModelForCausalLM.from_pretrained(BASE)
    assert torch.equal(logits(PeftModel.from_pretrained(base, "user/through-peft")), logits(model))


def test_the_card_is_what_the_hub_reads(hub: FakeHub, run: Path) -> None:
    push(run, "user/card")
    text = hub.files("user/card")["README.md"].decode()
    card = ModelCard(text)
    facts = card.data.to_dict()
    assert (facts["library_name"], facts["base_model"]) == ("peft", BASE)
    assert (facts["base_model_relation"], facts["pipeline_tag"]) == ("adapter", "text-generation")
    assert facts["datasets"] == [DATA]
    assert {"reft", "loreft"} <= set(facts["tags"])
    (result,) = card.data.eval_results
    scored = json.loads((run / "results.json").read_text())["tasks"]["demo"]["adapter"]
    assert result.dataset_name == "demo"
    assert (result.metric_type, result.metric_value) == (scored["metric"], scored["value"])
    for fact in ("f2+l2", "none", DATA, hub.model(BASE).branches["main"]):
        assert fact in card.text
    assert yaml.safe_load(text.split("---")[1]) == facts


def test_the_cards_lines_load_the_adapter(hub: FakeHub, run: Path) -> None:
    push(run, "user/lines")
    text = hub.files("user/lines")["README.md"].decode()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert torch.equal(logits(names["model"]), logits(load_adapter(run, dtype="float32").model))


def test_the_base_of_the_recorded_revision_is_loaded(hub: FakeHub, run: Path) -> None:
    push(run, "user/pinned")
    before = logits(load_adapter("user/pinned", dtype="float32").model)
    repository = hub.model(BASE)
    kept = repository.branches["main"]
    config = json.loads(hub.files(BASE)["config.json"])
    repository.commit("main", {"config.json": json.dumps(config | {"rms_norm_eps": 0.5}).encode()})
    try:
        assert torch.equal(logits(load_adapter("user/pinned", dtype="float32").model), before)
        moved = load_adapter("user/pinned", base=BASE, dtype="float32").model
        assert not torch.equal(logits(moved), before)
    finally:
        repository.branches["main"] = kept


def test_an_adapter_on_a_folder_needs_a_name_for_its_base(
    hub: FakeHub, folder: Path, tmp_path: Path
) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        reftune.ReftConfig(task_type="CAUSAL_LM", r=2, positions="f2+l2"),
    ).eval()
    model.save_pretrained(str(tmp_path))
    with pytest.raises(RunError, match="others do not have.*--base-model"):
        push(tmp_path, "user/local")
    assert ("models", "user/local") not in hub.repositories
    push(tmp_path, "user/local", base_model=BASE)
    assert str(folder).encode() not in b"".join(hub.files("user/local").values())
    assert torch.equal(logits(load_adapter("user/local", dtype="float32").model), logits(model))


def test_of_a_trainers_directory_the_adapter_is_pushed(
    hub: FakeHub, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        reftune.ReftConfig(task_type="CAUSAL_LM", r=2, positions="f2+l2"),
    )
    for place in ("", "edits", "checkpoint-5"):
        model.save_pretrained(str(tmp_path / place))
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth", "trainer_state.json"):
        (tmp_path / name).write_bytes(b"hf_secret")
    (tmp_path / "tokenizer.json").write_text("{}")
    commit = hub.model(BASE).branches["main"]
    push(tmp_path, "user/trained", base_model=f"{BASE}@{commit}")
    assert sorted(set(hub.files("user/trained")) - {".gitattributes"}) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json")
    ]
    written = json.loads(hub.files("user/trained")["adapter_config.json"])
    assert (written["base_model_name_or_path"], written["revision"]) == (BASE, commit)
    assert "edits is another adapter, which is not pushed" in caplog.text
    assert "checkpoint-5" not in caplog.text
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(RunError, match="no weights in safetensors"):
        push(tmp_path, "user/trained", base_model=BASE)


def test_tags_are_left_alone_where_no_base_was_recorded(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("---\ntags: [lora, reft]\n---\ntext\n")
    publish._rename_base(card, "", "org/base")
    found = ModelCard.load(card)
    assert (found.data.tags, found.data.base_model) == (["lora", "reft"], "org/base")


def test_private_is_not_pushed_to_what_is_public(hub: FakeHub, run: Path) -> None:
    push(run, "user/public")
    commit = hub.model("user/public").branches["main"]
    with pytest.raises(RunError, match="is public, and --private"):
        push(run, "user/public", private=True)
    assert hub.model("user/public").branches["main"] == commit


def test_what_may_not_be_pushed_is_said(
    hub: FakeHub, run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for token, repo, says in (
        (fake_hub.OTHER_TOKEN, "user/theirs", "does not allow this.*permission to write"),
        (fake_hub.READ_TOKEN, "user/theirs", "does not allow this.*permission to write"),
        ("hf_expired", "user/theirs", "does not accept who you are"),
        (fake_hub.OWNER_TOKEN, "theirs", "no name for a repository"),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(RunError, match=says):
            push(run, repo)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RunError, match="needs a token.*hf auth login"):
        push(run, "user/theirs")
    with pytest.raises(RunError, match="no adapter to push"):
        push(tmp_path, "user/theirs")
    assert ("models", "user/theirs") not in hub.repositories


@pytest.mark.slow  # each command is a process of its own
def test_the_commands_ask_the_hub_that_hf_endpoint_names(
    hub: FakeHub, run: Path, folder: Path
) -> None:
    """As a user types them: the endpoint, the token and the cache come from the environment."""
    env = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_CACHE": str(folder / "home" / "hub"),
        "HF_HUB_DISABLE_XET": "1",
    }

    def reftune(*args: str, **changed: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "reftune_cli", *args]
        done = subprocess.run(command, env=env | changed, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    code, output = reftune("push", str(run), "user/typed", "--private", "--revision", "v2")
    assert code == 0, output
    assert "adapter_model.safetensors" in hub.files("user/typed", "v2")
    assert hub.model("user/typed").private
    code, output = reftune("info", "user/typed@v2")
    assert code == 0, output
    assert "LoReFT" in output
    code, output = reftune("info", "user/typed@v2", HF_TOKEN=fake_hub.OTHER_TOKEN, HF_HOME="/none")
    assert code == 0, "it is in the cache"
    code, output = reftune(
        "info", "user/typed@v3", HF_TOKEN=fake_hub.OTHER_TOKEN, HF_HUB_CACHE=str(folder / "empty")
    )
    assert code == 1
    assert "a private one that this account may not see" in output
    assert "Traceback" not in output
