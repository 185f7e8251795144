"""The verbs, run in this process on a tiny model."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from reftune.errors import ReftConfigError
from reftune.generate import Completion, HFEngine
from reftune.run import RESULTS, execute
from reftune.stored import quantization_of, template_of
from reftune_cli import app
from reftune_cli.chat import Chat, load_chat
from runs import tiny_run

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
]

VERBS = {
    *("train", "experiment", "report", "evaluate", "generate", "chat", "info", "config"),
    *("version", "serve", "push", "convert"),
}


def invoke(*args: str, text: str | None = None) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(args), input=text, env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a run that was trained."""
    config = tiny_run(
        tmp_path_factory.mktemp("cli"),
        adapter={"r": 8},
        train={"epochs": 40, "learning_rate": 5e-2, "save_steps": 50},
    )
    execute(config)
    return config.directory


def test_the_verbs_and_their_flags_are_these() -> None:
    names = {(command.name or command.callback.__name__) for command in app.registered_commands}  # type: ignore[union-attr]
    assert names == VERBS


def test_train_runs_a_yaml_with_overrides(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    code, output = invoke("train", str(path), "name=other", "adapter.r=3", "train.max_steps=2")
    assert code == 0, output
    results = json.loads((tmp_path / "runs" / "other" / "results.json").read_text())
    assert results["train"]["steps"] == 2
    assert f"{results['parameters']:,}" in output
    code, output = invoke("train", str(path), "name=other")
    assert code == 1
    assert "holds a run already" in output


def test_a_wrong_key_is_one_line_and_no_traceback(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: x\nmodle: y\ndata: {train: demo}\n")
    code, output = invoke("train", str(path))
    assert code == 1
    assert "Did you mean 'model'" in output
    assert "Traceback" not in output


def test_info_describes_the_adapter(finished: Path) -> None:
    code, output = invoke("info", str(finished))
    assert code == 0
    for text in ("LoReFT", "f2+l2", "parameters"):
        assert text in output
    code, output = invoke("info", str(finished / "nowhere"))
    assert code == 1
    assert "is no adapter" in output


def test_generate_differs_from_the_base_and_is_what_compare_shows(finished: Path) -> None:
    options = ("--max-new-tokens", "6", "--dtype", "float32")
    code, alone = invoke("generate", str(finished), "say aa", *options)
    assert code == 0, alone
    code, both = invoke("generate", str(finished), "say aa", "--compare", *options)
    assert code == 0
    assert "prompt" in both
    code, lines = invoke("generate", str(finished), "-", *options, text="say aa\n\nsay bb\n")
    assert code == 0
    assert lines.startswith(alone.split("\n")[0])


def test_evaluate_writes_and_resumes(finished: Path, tmp_path: Path) -> None:
    args = ("evaluate", str(finished), "--tasks", "demo", "--limit", "2", "--out", str(tmp_path))
    code, output = invoke(*args)
    assert code == 0, output
    first = (tmp_path / "samples" / "adapter" / "demo.jsonl").read_text()
    code, output = invoke(*args)
    assert code == 0, output
    assert (tmp_path / "samples" / "adapter" / "demo.jsonl").read_text() == first
    code, output = invoke("evaluate", str(finished), "--tasks", "dmo")
    assert code == 1
    assert "Did you mean 'demo'" in output


def test_evaluate_takes_a_tasks_split_decoding_and_length(finished: Path, tmp_path: Path) -> None:
    args = ("evaluate", str(finished), "--tasks", "demo", "--limit", "2", "--no-base")
    code, output = invoke(*args, "--max-new-tokens", "1", "--out", str(tmp_path))
    assert code == 0, output
    lines = (tmp_path / "samples" / "adapter" / "demo.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines[1:]]
    assert len(samples) == 2
    assert all(sample["tokens"] <= 1 for sample in samples)
    for option, value, accepted in (
        ("--split", "dev", "validation"),
        ("--decoding", "beams", "sampling"),
    ):
        code, output = invoke(*args, option, value)
        assert code == 1
        assert accepted in output
    code, output = invoke("evaluate", str(finished), "--lm-eval", "x", "--split", "validation")
    assert code == 1
    assert "are for --tasks" in output


def test_evaluate_leaves_a_runs_own_results(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = (run / RESULTS).read_text()
    args = ("evaluate", str(run), "--tasks", "demo", "--limit", "2", "--out")
    code, output = invoke(*args, str(run))
    assert code == 1
    assert "Give another folder" in output
    assert (run / RESULTS).read_text() == before
    for _ in range(2):
        code, output = invoke(*args, str(run / "evaluated"))
        assert code == 0, output
    assert (run / RESULTS).read_text() == before


def test_config_prints_every_key_and_a_schema() -> None:
    code, output = invoke("config")
    assert code == 0
    assert "train.learning_rate" in output
    code, output = invoke("config", "--schema")
    assert "learning_rate" in json.dumps(json.loads(output))


def test_a_reply_is_printed_as_it_is(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reply = "Use :100: or [bold]: " + "x " * 200
    completion = Completion((1,), (2,), reply, "stop")
    monkeypatch.setattr(HFEngine, "generate", lambda *_: [completion])
    code, output = invoke("generate", str(finished), "say aa")
    assert code == 0
    assert output == reply.strip() + "\n"


def test_a_name_before_one_adapter_is_a_name(finished: Path, tmp_path: Path) -> None:
    code, output = invoke("evaluate", f"mine={finished}", "--tasks", "demo", "--limit", "1")
    assert code == 0, output
    shutil.copytree(finished, tmp_path / "lr=0.01")  # and a directory's own "=" is not one's end
    args = ("evaluate", str(tmp_path / "lr=0.01"), "--tasks", "demo", "--limit", "1")
    code, output = invoke(*args)
    assert code == 0, output


@pytest.mark.parametrize(
    "text", ["", "- a\n", "data: x.json\n", "data: {path: x}\n", "data: [\n", "train: 1\n"]
)
def test_a_config_beside_an_adapter_may_be_of_something_else(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "config.yaml").write_text(text)
    assert template_of(tmp_path / "adapter") == "auto"
    assert quantization_of(tmp_path / "adapter") is None


def test_a_chat_has_adapters_of_one_base(finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(finished / "adapter", other)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "someone/else"})
    )
    named = [f"one={finished}", f"two={other}"]
    with pytest.raises(ReftConfigError, match="trained on someone/else.*--model"):
        load_chat(named, None, "float32")
    assert load_chat(named, config["base_model_name_or_path"], "float32")[1] == ["one", "two"]


def test_chat_switches_between_adapter_strength_and_base(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from reftune.generate import Sampling

    loaded, names, template = load_chat(
        [f"one={finished}", f"two={finished / 'adapter'}"], None, "float32"
    )
    assert names == ["one", "two"]
    chat = Chat(loaded, names, template, Sampling(max_new_tokens=12), None)
    replies = {}
    for commands in ((), ("/base",), ("/adapter two",), ("/strength 0",), ("/strength 1",)):
        for command in commands:
            chat.handle(command)
        chat.reset()
        chat.handle("say aa")
        replies[commands] = chat.messages[-1]["content"]
    assert replies[()] != replies[("/base",)]
    assert replies[()] == replies[("/adapter two",)] == replies[("/strength 1",)]
    assert replies[("/strength 0",)] == replies[("/base",)]
    capsys.readouterr()
    for command, says in (
        ("/adapter tow", "Did you mean 'two'"),
        ("/strength much", "is no number"),
        ("/adaptr", "Did you mean '/adapter'"),
        ("/help", "/strength X"),
    ):
        chat.handle(command)
        assert says in capsys.readouterr().out
