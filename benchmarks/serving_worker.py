"""One engine of `serving.py`, in a process of its own: JSON lines in, JSON lines out.

python serving_worker.py bare|reftune|lora|hf SETTINGS_JSON

{"op": "run", "adapters": 8, "requests": 64, "prompt": 64, "new": 64}      -> seconds, ttft, ...
{"op": "registered", "adapters": 10000}                                    -> milliseconds, MiB
{"op": "hot", "parameters": 2000000, ...}                                  -> milliseconds
"""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

VOCABULARY = range(1000, 40000)


def prompts(count: int, length: int, shared: int, seed: int, vocabulary: range) -> list[list[int]]:
    """Return random prompts that begin with the same `shared` tokens."""
    draw = random.Random(seed)
    beginning = [draw.choice(vocabulary) for _ in range(shared)]
    return [
        [*beginning, *(draw.choice(vocabulary) for _ in range(length - shared))]
        for _ in range(count)
    ]


def write_reft(folder: Path, number: int, shape: tuple[int, int], **config: Any) -> Path:
    """Write a random LoReFT adapter: a small one, so that decoding goes on as usual."""
    from reftune import ReftConfig

    path = folder / f"reft-{number}"
    if path.exists():
        return path
    hidden, num_layers = shape
    settings = ReftConfig(task_type="CAUSAL_LM", **config)
    layers = range(num_layers) if settings.layers == "all" else settings.layers
    generator = torch.Generator().manual_seed(number)
    r = settings.r or 1
    tensors = {}
    for layer in layers:
        key = f"base_model.model.model.layers.{layer}.reft.reft_phi."
        R = torch.linalg.qr(torch.randn(hidden, r, generator=generator))[0].mT.contiguous()
        tensors[key + "R"] = R[None]
        tensors[key + "W"] = R[None] + 0.01 * torch.randn(1, r, hidden, generator=generator)
        tensors[key + "bias"] = torch.randn(1, r, generator=generator)
    part = folder / f".reft-{number}.part"
    part.mkdir(exist_ok=True)
    settings.save_pretrained(str(part))
    save_file(tensors, part / "adapter_model.safetensors")
    os.replace(part, path)
    return path


def write_lora(folder: Path, number: int, model: str) -> Path:
    """Write a random LoRA of rank 8 on all linear layers."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    path = folder / f"lora-{number}"
    if not path.exists():
        torch.manual_seed(number)
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
        config = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")
        adapted = get_peft_model(base, config, low_cpu_mem_usage=True)
        tensors = {
            name.replace(".default", ""): 0.01 * torch.randn(p.shape)
            for name, p in adapted.named_parameters()
            if "lora_" in name
        }
        path.mkdir()
        config.save_pretrained(str(path))
        save_file(tensors, path / "adapter_model.safetensors")
    return path


class VLLM:
    """A vLLM engine, with adapters of its kind."""

    def __init__(self, kind: str, settings: dict[str, Any]) -> None:
        from vllm import LLM

        self.kind, self.settings = kind, settings
        self.counter = itertools.count()
        self.folder = Path(settings["folder"])
        options: dict[str, Any] = {"model": settings["model"], **settings["options"]}
        if kind == "reftune":
            options["additional_config"] = {"reftune": {}}
        if kind == "lora":
            options |= {"enable_lora": True, "max_loras": settings["loras"], "max_lora_rank": 8}
        self.llm = LLM(**options)
        config = self.llm.llm_engine.vllm_config.model_config
        self.shape = config.get_hidden_size(), config.get_total_num_hidden_layers()
        self.vocabulary = range(3, min(40000, config.get_vocab_size()))

    def request(self, number: int, **config: Any) -> Any:
        """Return the adapter of a number as vLLM's requests name it."""
        from vllm.lora.request import LoRARequest

        if self.kind == "lora":
            path = write_lora(self.folder, number, self.settings["model"])
        else:
            given = {"r": 8, "layers": "all", "positions": "f7+l7"} | config
            name = "".join(c for c in json.dumps(given, sort_keys=True) if c.isalnum() or c in "+")
            own = self.folder / name
            own.mkdir(exist_ok=True)
            path = write_reft(own, number, self.shape, **given)
        return LoRARequest(str(path), number + 1, str(path))

    def add(self, prompt: list[int], params: Any, adapter: Any = None) -> None:
        """Submit a request."""
        from vllm.inputs import tokens_input

        name = f"bench-{next(self.counter)}"
        self.llm.llm_engine.add_request(name, tokens_input(prompt), params, lora_request=adapter)

    def run(
        self,
        adapters: int,
        requests: int,
        prompt: int,
        new: int,
        shared: int = 0,
        seed: int = 0,
        reset: bool = True,
        **config: Any,
    ) -> dict[str, float]:
        """Return the time of a batch, of its first tokens, and the share of cached tokens."""
        from vllm import SamplingParams

        engine: Any = self.llm.llm_engine
        lora = [self.request(i, **config) for i in range(adapters)]
        for one in lora if self.kind == "lora" else ():
            engine.add_lora(one)
        if reset:
            self.llm.reset_prefix_cache()
        given = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        texts = prompts(requests, prompt, shared, seed, self.vocabulary)
        start = time.perf_counter()
        for i, text in enumerate(texts):
            self.add(text, given, lora[i % adapters] if adapters else None)
        first: dict[str, float] = {}
        cached = steps = 0
        longest = 0.0
        while engine.has_unfinished_requests():
            before = time.perf_counter()
            outputs = engine.step()
            now = time.perf_counter()
            steps, longest = steps + 1, max(longest, now - before)
            for output in outputs:
                first.setdefault(output.request_id, now - start)
                cached += (output.num_cached_tokens or 0) if output.finished else 0
        seconds = time.perf_counter() - start
        assert len(first) == requests
        return {
            "seconds": seconds,
            "ttft": sum(first.values()) / requests,
            "cached": cached / (requests * prompt),
            "steps": steps,
        }

    def registered(self, adapters: int) -> dict[str, float]:
        """Return what it costs to register, list and lazily serve many adapters."""
        from reftune.serve.catalog import Catalog, CatalogSettings

        config = {"r": 4, "layers": list(range(min(4, self.shape[1])))}
        folder = Path(self.request(0, **config).lora_path).parent
        for i in range(adapters):
            self.request(i, **config)
        start = time.perf_counter()
        catalog = Catalog(CatalogSettings(adapters=(str(folder),)))
        took = time.perf_counter() - start
        assert len(catalog.paths) >= adapters
        before = memory()
        used = min(adapters, 512)
        served = self.run(used, used, 32, 2, **config)
        return {
            "register_ms_each": 1000 * took / len(catalog.paths),
            "serve_seconds": served["seconds"],
            "more_MiB": memory() - before,
        }

    def hot(self, parameters: int, requests: int, new: int) -> dict[str, float]:
        """Return how long a new adapter takes to be read, and to stall requests that run."""
        from vllm import SamplingParams

        from reftune.serve.plugin import frontend_of

        engine: Any = self.llm.llm_engine
        r = max(1, round(parameters / (2 * self.shape[0] * self.shape[1])))
        r = min(r, self.shape[0])
        one = self.request(random.randrange(10**6, 10**9), r=r)
        texts = prompts(requests, 32, 0, 1, self.vocabulary)
        given = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        for text in texts:
            self.add(text, given)
        times = []
        while len(times) < new // 2:
            times.append(_timed(engine.step))
        frontend = frontend_of(engine.input_processor)
        assert frontend is not None
        read = _timed(lambda: frontend.adapter(one.lora_path))  # a thread's work in the server
        self.add(texts[0], given, one)
        first = _timed(engine.step)  # its prefill, and its parameters read by the worker
        self.add(texts[1], given, one)
        second = _timed(engine.step)  # a prefill alike, with the parameters there
        while engine.has_unfinished_requests():
            engine.step()
        return {
            "read_ms": 1000 * read,
            "stall_ms": 1000 * max(0.0, first - second),
            "step_ms": 1000 * sorted(times)[len(times) // 2],
        }


class HF:
    """transformers' `generate`, by `HFEngine`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from reftune.generate import HFEngine
        from reftune.models import load_model

        model, tokenizer = load_model(settings["model"], settings["options"]["dtype"])
        assert model.generation_config is not None
        model.generation_config.eos_token_id = None
        self.engine = HFEngine(model.eval(), tokenizer, batch_size=16)
        self.vocabulary = range(3, min(40000, model.config.vocab_size))

    def run(self, adapters: int, requests: int, prompt: int, new: int) -> dict[str, float]:
        """Return the time of a batch."""
        from reftune.generate import Sampling

        assert not adapters
        texts = prompts(requests, prompt, 0, 0, self.vocabulary)
        return {"seconds": _timed(lambda: self.engine.generate(texts, Sampling(new)))}


def _timed(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def memory() -> float:
    """Return the resident memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main(arguments: Sequence[str]) -> None:
    """Answer one line after the other."""
    kind, settings = arguments[0], json.loads(arguments[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints, too
    threading.current_thread().name = kind
    engine: Any = HF(settings) if kind == "hf" else VLLM(kind, settings)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        given = json.loads(line)
        result = getattr(engine, given.pop("op"))(**given)
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
