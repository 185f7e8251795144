"""`reftune serve` from outside: a process, HTTP on loopback, SIGTERM."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from serving_tiny import expected, prompts, save_adapter

import reftune
from tiny import tiny_tokenizer

REPOSITORY = Path(__file__).parents[2]
KEY = "open sesame"
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"


@dataclass
class Server:
    """A running server and what it may load from."""

    process: subprocess.Popen[str]
    port: int
    adapters: dict[str, Path]
    root: Path
    log: Path

    def ask(
        self, path: str, body: Any = None, key: str | None = KEY, method: str | None = None
    ) -> tuple[int, Any]:
        """Return the status and the body of an answer."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, method=method)
        request.add_header("Content-Type", "application/json")
        if key is not None:
            request.add_header("Authorization", f"Bearer {key}")
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                text, status = answer.read().decode(), answer.status
        except urllib.error.HTTPError as error:
            text, status = error.read().decode(), error.code
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text

    def complete(self, model: str, prompt: list[int], **more: Any) -> tuple[int, Any]:
        """Return the status, and the tokens or the error."""
        body = {"model": model, "prompt": prompt, "max_tokens": 16, "temperature": 0}
        status, answer = self.ask("/v1/completions", body | {"return_token_ids": True} | more)
        if status != 200:
            return status, answer["error"]["message"]
        ids = answer["choices"][0]["token_ids"]
        return status, tuple(ids[:-1] if ids and ids[-1] == 2 else ids)


def launch(base: str, log: Path, *arguments: str) -> tuple[subprocess.Popen[str], int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "reftune_cli", "serve", base, *arguments]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "256", "--block-size", "32"]
    process = subprocess.Popen(
        command,
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
    )
    return process, port


def wait(server: Server) -> Server:
    for _ in range(1800):
        if server.process.poll() is not None:
            break
        try:
            if server.ask("/health")[0] == 200:
                return server
        except OSError:
            pass
        time.sleep(0.2)
    server.process.kill()
    raise AssertionError(server.log.read_text()[-4000:])


@pytest.fixture(scope="module")
def server(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    root = folder / "root"
    adapters = {
        name: save_adapter(folder / "adapters" / name, i, scale=4.0, positions="f3+l3")
        for i, name in enumerate(["a", "b", "c", "d", "text"])
    }
    save_adapter(folder / "adapters" / "broken", 9)
    (folder / "adapters" / "broken" / "adapter_model.safetensors").write_bytes(b"x")
    save_adapter(root / "late", 5, scale=4.0)
    log = folder / "log"
    (folder / "chat.jinja").write_text(TEMPLATE)
    process, port = launch(
        str(base), log, "--chat-template", str(folder / "chat.jinja"),
        "--adapters", str(folder / "adapters"), "--adapter-roots", str(root),
        "--pin", "a", "--api-key", KEY, "--served-model-name", "tiny",
    )  # fmt: skip
    yield wait(Server(process, port, adapters, root, log))
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0, log.read_text()[-4000:]


def test_adapters_are_models(server: Server) -> None:
    status, models = server.ask("/v1/models")
    assert status == 200
    cards = {card["id"]: card for card in models["data"]}
    assert {"tiny", "a", "b", "c", "d", "broken"} <= set(cards)
    assert cards["a"]["parent"] == "tiny"
    assert cards["tiny"]["parent"] is None


def test_answers_are_transformers(server: Server) -> None:
    names = ["a", "b", None, "c", "a"]
    inputs = prompts(30, 20, 40, 9, 30)
    wanted = expected(server.adapters, inputs, names)
    for name, prompt, tokens in zip(names, inputs, wanted, strict=True):
        for model in (name or "tiny", f"tiny:{name}" if name else "tiny"):
            assert server.complete(model, prompt) == (200, tokens)
    assert wanted[0] != wanted[1]


def test_options_of_a_request(server: Server) -> None:
    (prompt,) = prompts(30)
    with reftune.options(strength=-2.0):
        wanted = expected(server.adapters, [prompt], ["a"])[0]
    assert server.complete("a", prompt, vllm_xargs={"strength": -2.0}) == (200, wanted)
    base = expected(server.adapters, [prompt], [None])[0]
    assert server.complete("a", prompt, vllm_xargs={"strength": 0}) == (200, base)
    status, why = server.complete("a", prompt, vllm_xargs={"strength": "x"})
    assert (status, "strength is 'x'" in why) == (400, True)
    status, why = server.complete("a", prompt, vllm_xargs={"subspaces": ["x"]})
    assert (status, "no subspace 'x'" in why) == (400, True)
    status, why = server.complete("tiny", prompt, vllm_xargs={"strength": 1.0})
    assert (status, "names none" in why) == (400, True)


def test_options_beside_openais_keys(server: Server) -> None:
    (prompt,) = prompts(30)
    base = expected(server.adapters, [prompt], [None])[0]
    assert server.complete("a", prompt, strength=0) == (200, base)
    for more in ({"strength": "x"}, {"subspaces": ["x"]}, {"vllm_xargs": {"reftune": "x"}}):
        assert server.complete("tiny", prompt, **more)[0] == 400
    for more in ({"strength": "x"}, {"subspaces": ["x"]}):
        assert server.complete("a", prompt, **more)[0] == 400
    adapted = expected(server.adapters, [prompt], ["a"])[0]
    assert server.complete("a", prompt, vllm_xargs={"reftune": "x"}) == (200, adapted)
    status, why = server.complete("a", prompt, strength=0.5, use_beam_search=True, n=2)
    assert (status, "exclude each other" in why) == (400, True)


def chat(server: Server, model: str, content: object) -> tuple[str, str]:
    """Return the reply, and the model that is said to have given it."""
    messages = [{"role": "user", "content": content}]
    body = {"model": model, "messages": messages, "max_tokens": 16, "temperature": 0}
    status, answer = server.ask("/v1/chat/completions", body)
    assert status == 200, answer
    return answer["choices"][0]["message"]["content"].rstrip("\ufffd"), answer["model"]


def test_chat_with_an_adapter_named_like_a_part_of_a_message(server: Server) -> None:
    """vLLM would take the adapter `text` for one that all texts in messages are meant for."""
    ids = tiny_tokenizer()("[user]Tea, please?[assistant]").input_ids
    parts = [{"type": "text", "text": "Tea, please?"}]
    wanted = {}
    for name in ("text", None, "a"):
        (tokens,) = expected(server.adapters, [ids], [name])
        # vLLM gives no part of a character that is not whole.
        text = tiny_tokenizer().decode(tokens, skip_special_tokens=True)
        wanted[name] = text.rstrip("\ufffd")
        for content in ("Tea, please?", parts):
            reply, model = chat(server, name or "tiny", content)
            assert (reply, model) == (wanted[name], name or "tiny")
    assert chat(server, "tiny:a", parts) == (wanted["a"], "a")
    assert len(set(wanted.values())) == 3


def test_all_ways_to_ask_for_a_completion(server: Server) -> None:
    """Several prompts, several samples, echo, logprobs, streams: the adapter's own tokens."""
    inputs = prompts(30, 9, 41, seed=8)
    wanted = [list(t) for t in expected(server.adapters, inputs, ["a"] * 3)]
    ask: dict[str, Any] = {"model": "a", "max_tokens": 16, "return_token_ids": True}

    def tokens(answer: Any) -> list[list[int]]:
        found = [choice["token_ids"] for choice in answer["choices"]]
        return [ids[:-1] if ids[-1] == 2 else ids for ids in found]

    def right(prompt: object, tokens_wanted: list[list[int]], **more: Any) -> None:
        status, answer = server.ask("/v1/completions", ask | {"prompt": prompt} | more)
        assert status == 200, answer
        assert tokens(answer) == tokens_wanted

    right(inputs, wanted, temperature=0)
    right(inputs[0], [wanted[0]] * 3, n=3, top_k=1, temperature=1.0, seed=5)
    right(inputs[:2], [wanted[0]] * 2 + [wanted[1]] * 2, n=2, top_k=1)
    right(inputs[0], [wanted[0]], temperature=0, logprobs=3, prompt_logprobs=2)
    right(inputs[0], [wanted[0]], temperature=0, prompt_logprobs=0, echo=True)
    text = tiny_tokenizer().decode(inputs[1])
    if tiny_tokenizer()(text).input_ids == inputs[1]:
        right(text, [wanted[1]], temperature=0)
    body = ask | {"prompt": inputs[0], "temperature": 0, "stream": True}
    status, stream = server.ask(
        "/v1/completions", body | {"stream_options": {"include_usage": True}}
    )
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    found = [t for e in events for c in e["choices"] for t in c["token_ids"] or []]
    assert (status, found[: len(wanted[0])]) == (200, wanted[0])
    assert events[-1]["usage"]["prompt_tokens"] == 30
    for empty in ("", [], [[]]):
        status, answer = server.ask("/v1/completions", ask | {"prompt": empty})
        assert 400 <= status < 500, answer
    right(inputs[2], [wanted[2]], temperature=0)


def test_no_endpoint_breaks(server: Server) -> None:
    """Each, with an adapter for a model and little else: no 5xx, and the server goes on."""
    _, api = server.ask("/openapi.json")
    bodies: list[dict[str, Any]] = [
        {"model": "a"},
        {"model": "a", "prompt": "tea", "input": "tea", "text": "tea", "max_tokens": 2},
        {"model": "a", "messages": [{"role": "user", "content": "tea"}], "max_tokens": 2},
        {"model": "a", "tokens": [5, 6], "token_ids": [5, 6], "sampling_params": {"max_tokens": 2}},
        {"model": "a", "input": "tea", "max_output_tokens": 2, "queries": "a", "documents": ["b"]},
    ]
    broken = [
        (path, body, found)
        for path, methods in api["paths"].items()
        if "post" in methods and "lora" not in path
        for body in bodies
        if (found := server.ask(path, body))[0] >= 500
        if found[0] != 501  # not implemented for this model, says vLLM
    ]
    assert not broken
    (prompt,) = prompts(30)
    assert server.complete("b", prompt) == (200, expected(server.adapters, [prompt], ["b"])[0])


def test_unknown_and_broken_adapters_are_told(server: Server) -> None:
    (prompt,) = prompts(10)
    status, why = server.complete("nobody", prompt)
    assert (status, "nobody" in why) == (404, True)
    status, why = server.complete("broken", prompt)
    assert (status, "safetensors" in why) == (400, True)
    assert server.complete("a", prompt)[0] == 200


def load(server: Server, name: str, path: object, inplace: bool = False) -> tuple[int, Any]:
    body = {"lora_name": name, "lora_path": str(path), "load_inplace": inplace}
    return server.ask("/v1/load_lora_adapter", body)


def test_load_replace_and_unload(server: Server) -> None:
    (prompt,) = prompts(40)
    path = server.root / "late"
    assert server.complete("late", prompt)[0] == 404
    assert load(server, "late", path)[0] == 200
    (first,) = expected({"late": path}, [prompt], ["late"])
    assert server.complete("late", prompt) == (200, first)
    assert server.complete("tiny:late", prompt) == (200, first)
    assert load(server, "late", path)[0] == 400  # it exists
    save_adapter(path, 6, scale=4.0)
    (second,) = expected({"late": path}, [prompt], ["late"])
    assert first != second
    assert server.complete("late", prompt) == (200, first)  # until it is told to
    assert load(server, "late", path, inplace=True)[0] == 200
    assert server.complete("late", prompt) == (200, second)
    assert server.complete("tiny:late", prompt) == (200, second)
    (path / "adapter_model.safetensors").write_bytes(b"x")
    assert load(server, "late", path, inplace=True)[0] == 400
    assert server.complete("late", prompt) == (200, second)
    assert server.ask("/v1/unload_lora_adapter", {"lora_name": "late"})[0] == 200
    assert server.complete("late", prompt)[0] == 404
    assert server.complete("tiny:late", prompt)[0] == 404
    assert server.ask("/v1/unload_lora_adapter", {"lora_name": "late"})[0] == 404


def test_paths_are_confined(server: Server) -> None:
    outside = server.adapters["a"]
    link = server.root / "link"
    if not link.exists():
        link.symlink_to(outside)
    for path in (outside, link, server.root / ".." / "adapters" / "a", "/etc", "org/name", ""):
        status, answer = load(server, "x", path)
        assert status == 400, answer
    for name in ("tiny", "", "a:b"):
        assert load(server, name, server.root / "late")[0] == 400


def test_malformed_bodies_are_4xx(server: Server) -> None:
    for body in (b"", b"{", b"[]", b'{"model": 5}', b'{"model": "a"}', b"\xff\xfe"):
        for path in ("/v1/completions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            status, _ = server.ask(path, body)
            assert 400 <= status < 500, (path, body)
    assert server.complete("a", prompts(5)[0])[0] == 200


def test_every_endpoint_wants_the_key(server: Server) -> None:
    status, api = server.ask("/openapi.json")
    assert status == 200
    open_to_all = []
    for path, methods in api["paths"].items():
        for method in methods:
            for key in (None, "wrong"):
                url = path.replace("{", "").replace("}", "")
                body = None if method == "get" else {}
                status, _ = server.ask(url, body, key=key, method=method.upper())
                if status != 401:
                    open_to_all.append(path)
    assert set(open_to_all) <= {"/health", "/ping"}
    assert server.ask("/metrics", key=None)[0] == 401
    assert len(api["paths"]) > 10


def test_metrics_by_adapter(server: Server) -> None:
    server.complete("a", prompts(30)[0])
    text = server.ask("/metrics")[1]
    values = {
        line.split(" ")[0]: float(line.split(" ")[1])
        for line in text.splitlines()
        if line.startswith("reftune")
    }
    asked = values['reftune:requests_total{adapter="a"}']
    assert asked >= 1
    assert values['reftune:prompt_tokens_edited_total{adapter="a"}'] <= 6 * asked
    assert values['reftune:load_seconds_count{adapter="a"}'] >= 1
    (prompt,) = prompts(80, seed=12)  # of its blocks of 32 one lies before the suffix
    save_adapter(server.root / "suffix", 7, positions="l1")
    assert load(server, "suffix", server.root / "suffix")[0] == 200
    for _ in range(2):
        assert server.complete("suffix", prompt)[0] == 200
    text = server.ask("/metrics")[1]
    assert 'reftune:prefix_cache_queries_total{adapter="suffix"} 160.0' in text
    assert 'reftune:prefix_cache_hits_total{adapter="suffix"} 64.0' in text


def test_replacing_under_load_mixes_nothing(server: Server) -> None:
    """Clients ask all the time while an adapter is replaced: each answer is of one version."""
    path = server.root / "swap"
    versions = [save_adapter(server.root.parent / f"v{i}", 20 + i, scale=4.0) for i in range(2)]
    inputs = prompts(20, 33, 50, seed=4)
    right = [expected({"v": v}, inputs, ["v"] * 3) for v in versions]
    others = expected(server.adapters, inputs, ["b"] * 3)
    shutil.copytree(versions[0], path)
    assert load(server, "swap", path)[0] == 200
    stop, wrong, answers = threading.Event(), [], [0]

    def client(number: int) -> None:
        i = number % 3
        while not stop.is_set():
            found = server.complete("swap", inputs[i])
            other = server.complete("b", inputs[i])
            if found[1] not in (right[0][i], right[1][i]) or other != (200, others[i]):
                wrong.append((found, other))
            answers[0] += 2

    clients = [threading.Thread(target=client, args=(n,)) for n in range(6)]
    for thread in clients:
        thread.start()
    for k in range(1, 7):
        shutil.copytree(versions[k % 2], path, dirs_exist_ok=True)
        assert load(server, "swap", path, inplace=True)[0] == 200
    stop.set()
    for thread in clients:
        thread.join()
    assert not wrong
    assert answers[0] >= 12
    assert server.complete("swap", inputs[0]) == (200, right[0][0])


def stream_until_sigterm(server: Server, prompt: list[int]) -> str:
    """Return a stream's text, in the midst of which the server is told to stop."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    body = {"model": "tea", "prompt": prompt, "max_tokens": 200, "stream": True}
    body |= {"ignore_eos": True}
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    answer = connection.getresponse()
    begun = answer.read(30)
    server.process.send_signal(signal.SIGTERM)
    return (begun + answer.read()).decode()


def train(base: Path, folder: Path) -> Path:
    """Run `reftune train` in the environment that trains, and return the run's directory."""
    python = os.environ.get("REFTUNE_TRAIN_PYTHON", str(REPOSITORY / ".venv" / "bin" / "python"))
    if not Path(python).exists():
        pytest.skip(f"training has an environment of its own, and there is no {python}")
    run = {
        "name": "tea",
        "output_dir": str(folder),
        "model": str(base),
        "dtype": "float32",
        "adapter": {"r": 4, "layers": "all", "positions": "f4+l4"},
        "data": {"train": "demo", "template": "none", "limit": 16, "cache_dir": None},
        "train": {"epochs": 3, "batch_size": 8, "learning_rate": 0.05},
    }
    (folder / "tea.yaml").write_text(json.dumps(run))  # JSON is YAML
    command = [python, "-m", "reftune_cli", "train", str(folder / "tea.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "tea"


def test_a_run_is_served_right_after_training(base: Path, tmp_path: Path) -> None:
    """`reftune train`, then `reftune serve runs/X`: the base comes from the adapter.

    SIGTERM ends the server with 0.
    """
    run = train(base, tmp_path)
    adapters = {"tea": run / "adapter"}
    log = tmp_path / "log"
    process, port = launch(str(run), log)
    server = wait(Server(process, port, adapters, tmp_path, log))
    (prompt,) = prompts(30)
    wanted, bare = expected(adapters, [prompt] * 2, ["tea", None])
    assert server.complete("tea", prompt) == (200, wanted)
    assert wanted != bare
    text = stream_until_sigterm(server, prompt)
    assert process.wait(120) == 0, log.read_text()[-4000:]
    assert text.rstrip().endswith("data: [DONE]"), text[-500:]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--adapters", "/nowhere"], "no adapter, no run"),
        (["--api-server-count", "2"], "accepted is 1"),
        (["--adapter-roots", "/nowhere"], "no directory"),
        (["--adapters", "tiny={adapter}", "--served-model-name", "tiny"], "are named 'tiny'"),
    ],
)
def test_wrong_arguments_are_a_sentence(
    arguments: list[str], says: str, base: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    adapter = save_adapter(tmp_path / "adapter", 1)
    process, _ = launch(str(base), log, *(a.format(adapter=adapter) for a in arguments))
    assert process.wait(300) == 1
    text = log.read_text()
    assert says in text
    assert "Traceback" not in text
