"""64 clients at once, some of them rude, while adapters are replaced and deleted underneath."""

from __future__ import annotations

import http.client
import json
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from serving_tiny import expected, prompts, save_adapter
from test_server import KEY, Server, launch, load, wait

SECONDS = float(os.environ.get("REFTUNE_LOAD_SECONDS", "60"))
CLIENTS = 64


def resident(pid: int) -> float:
    """Return the resident MiB of a process and all below it."""
    total, waiting = 0, [pid]
    while waiting:
        one = Path("/proc") / str(waiting.pop())
        try:
            total += int((one / "statm").read_text().split()[1]) * 4096
            for task in (one / "task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
    return total / 2**20


def cancel(server: Server, model: str, prompt: list[int]) -> None:
    """Ask for a long answer and hang up."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = {"model": model, "prompt": prompt, "max_tokens": 150, "stream": True}
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    connection.getresponse().read(20)
    connection.close()


@pytest.mark.slow
def test_no_answer_is_wrong_and_none_is_lost(base: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    adapters = {
        str(i): save_adapter(root / str(i), i, scale=4.0, positions="f3+l3") for i in range(8)
    }
    versions = [
        save_adapter(tmp_path / f"v{i}", 30 + i, scale=4.0, positions="f2+l4") for i in range(2)
    ]
    shutil.copytree(versions[0], root / "swap")
    (long,) = prompts(104, seed=9)
    inputs = [long[:n] for n in (12, 33, 64, 104)]  # each begins as the next: cached blocks of 32
    right = {
        (name, k): {tokens}
        for name in [*adapters, None]
        for k, tokens in enumerate(expected(adapters, inputs, [name] * 4))
    }
    for k in range(4):
        right["swap", k] = {expected({"v": v}, inputs, ["v"] * 4)[k] for v in versions}
    seven = shutil.copytree(root / "7", tmp_path / "seven")
    process, port = launch(
        str(base), tmp_path / "log", "--adapters", str(root), "--adapter-roots", str(root),
        "--api-key", KEY, "--served-model-name", "tiny", "--max-num-seqs", "64",
        "--adapter-memory", "0.02",
    )  # fmt: skip
    server = wait(Server(process, port, adapters, root, tmp_path / "log"))
    seen, wrong, stop = Counter[str](), list[object](), threading.Event()

    def client(seed: int) -> None:
        draw = random.Random(seed)
        while not stop.is_set():
            name, k = draw.choice([*adapters, "swap", "7", None]), draw.randrange(4)
            kind = draw.choice(["ask"] * 7 + ["cancel", "malformed", "unknown"])
            try:
                if kind == "cancel":
                    cancel(server, name or "tiny", inputs[k])
                elif kind == "malformed":
                    status, _ = server.ask("/v1/completions", draw.randbytes(30))
                    if not 400 <= status < 500:
                        wrong.append((kind, status))
                elif kind == "unknown":
                    if server.complete("nobody", inputs[k])[0] != 404:
                        wrong.append(kind)
                else:
                    status, found = server.complete(name or "tiny", inputs[k])
                    gone = name == "7" and status in (400, 404)  # deleted underneath
                    if not gone and (status != 200 or found not in right[name, k]):
                        wrong.append((name, k, status, found))
                seen[kind] += 1
            except Exception as error:
                wrong.append((kind, repr(error)))

    clients = [threading.Thread(target=client, args=(i,)) for i in range(CLIENTS)]
    for thread in clients:
        thread.start()
    sizes, ends, turn = [], time.monotonic() + SECONDS, 0
    while time.monotonic() < ends and not wrong:
        turn += 1
        shutil.copytree(versions[turn % 2], root / "swap", dirs_exist_ok=True)
        assert load(server, "swap", root / "swap", inplace=True)[0] == 200
        if turn % 2:
            server.ask("/v1/unload_lora_adapter", {"lora_name": "7"})
            shutil.rmtree(root / "7")
            assert load(server, "7", root / "7")[0] == 400
        else:
            shutil.copytree(seven, root / "7")
            assert load(server, "7", root / "7")[0] == 200
        sizes.append(resident(process.pid))
        time.sleep(0.5)
    stop.set()
    for thread in clients:
        thread.join()
    assert not wrong, wrong[:5]
    assert seen["ask"] > CLIENTS
    assert all(status == 200 for status in (server.complete("0", p)[0] for p in inputs))
    cached = [
        float(line.split(" ")[1])
        for line in server.ask("/metrics")[1].splitlines()
        if line.startswith("reftune:prefix_cache_hits_total")
    ]
    assert sum(cached) > 0  # answers were right although blocks were reused
    assert min(seen[kind] for kind in ("cancel", "malformed", "unknown")) > 0
    # The first half fills pools and caches.
    assert max(sizes[len(sizes) // 2 :]) < 1.05 * max(sizes[: len(sizes) // 2])
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
