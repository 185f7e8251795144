"""One engine of `serving.py`, in a process of its own: JSON lines in, JSON lines out.

python serving_worker.py bare|reftune|small|lora|hf SETTINGS_JSON

{"op": "run", "adapters": 8, "requests": 64, "prompt": 64, "new": 64}      -> seconds, ttft, ...
{"op": "registered", "adapters": 10000}                                    -> milliseconds, MiB
{"op": "hot", "parameters": 2000000, ...}                                  -> milliseconds
{"op": "answers", "texts": [[...]], "names": [PATH or null], "new": 16}    -> tokens, logprobs
"""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import shutil
import statistics
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


def write_loras(folder: Path, count: int, model: str) -> list[Path]:
    """Write random LoRAs of rank 8 on all linear layers."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    paths = [folder / f"lora-{number}" for number in range(count)]
    if all(path.exists() for path in paths):
        return paths
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    config = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")
    adapted = get_peft_model(base, config, low_cpu_mem_usage=True)
    shapes = {
        name.replace(".default", ""): p.shape
        for name, p in adapted.named_parameters()
        if "lora_" in name
    }
    for number, path in enumerate(paths):
        torch.manual_seed(number)
        path.mkdir(exist_ok=True)
        config.save_pretrained(str(path))
        tensors = {name: 0.01 * torch.randn(shape) for name, shape in shapes.items()}
        save_file(tensors, path / "adapter_model.safetensors")
    return paths


class VLLM:
    """A vLLM engine, with adapters of its kind."""

    def __init__(self, kind: str, settings: dict[str, Any]) -> None:
        from vllm import LLM

        self.kind, self.settings = kind, settings
        self.counter = itertools.count()
        self.numbers: dict[str, int] = {}
        self.warmed: set[str] = set()
        self.folder = Path(settings["folder"])
        options: dict[str, Any] = {"model": settings["model"], **settings["options"]}
        if kind in ("reftune", "small"):
            options["additional_config"] = {"reftune": {"memory": settings["memory"][kind]}}
        if kind == "lora":
            options |= {"enable_lora": True, "max_loras": settings["loras"], "max_lora_rank": 8}
        self.llm = LLM(**options)
        config = self.llm.llm_engine.vllm_config.model_config
        self.shape = config.get_hidden_size(), config.get_total_num_hidden_layers()
        self.vocabulary = range(3, min(40000, config.get_vocab_size()))

    def requests(self, count: int, **config: Any) -> list[Any]:
        """Return the first `count` random adapters of this engine's kind, each used before."""
        if self.kind == "lora":
            paths = write_loras(self.folder, count, self.settings["model"])
        else:
            given = {"r": 8, "layers": "all", "positions": "f7+l7"} | config
            name = "".join(c for c in json.dumps(given, sort_keys=True) if c.isalnum() or c in "+")
            own = self.folder / name
            own.mkdir(exist_ok=True)
            paths = [write_reft(own, number, self.shape, **given) for number in range(count)]
        return [self.named(path) for path in paths]

    def named(self, path: str | Path) -> Any:
        """Return an adapter as vLLM's requests name it."""
        from vllm.lora.request import LoRARequest

        return LoRARequest(
            str(path), self.numbers.setdefault(str(path), len(self.numbers) + 1), str(path)
        )

    def warm(self, adapters: Sequence[Any]) -> None:
        """Use each adapter once, which reads it: a server's steady state is measured."""
        from vllm import SamplingParams

        new = [one for one in adapters if one.lora_path not in self.warmed]
        self.warmed |= {one.lora_path for one in new}
        for one in new:
            if self.kind == "lora":
                self.llm.llm_engine.add_lora(one)
            self.add([self.vocabulary[0]], SamplingParams(temperature=0, max_tokens=1), one)
        while self.llm.llm_engine.has_unfinished_requests():
            self.llm.llm_engine.step()

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
        lora = self.requests(adapters, **config)
        if self.kind != "small":
            self.warm(lora)
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

    def registered(self, adapters: int, served: int) -> dict[str, float]:
        """Return what it costs to register many adapters and to serve some, with little memory."""
        from reftune.serve.catalog import Catalog, CatalogSettings
        from reftune.serve.plugin import state_of

        config = {"r": 4, "layers": list(range(min(4, self.shape[1])))}
        folder = Path(self.requests(adapters, **config)[0].lora_path).parent
        start = time.perf_counter()
        catalog = Catalog(CatalogSettings(adapters=(str(folder),)))
        took = time.perf_counter() - start
        assert len(catalog.paths) >= adapters
        state = state_of(self.llm.llm_engine.vllm_config)
        assert state is not None
        before, most = memory(), 0.0
        start = time.perf_counter()
        for first in range(0, served, 64):  # in many steps: one step has what it needs
            some = min(64, served - first)
            for one in self.requests(served, **config)[first : first + some]:
                self.add(*self.short(), one)
            while self.llm.llm_engine.has_unfinished_requests():
                self.llm.llm_engine.step()
                most = max(most, state.bank.nbytes / 2**20)
        return {
            "register_ms_each": 1000 * took / len(catalog.paths),
            "serve_ms_each": 1000 * (time.perf_counter() - start) / served,
            "adapters_MiB": most,
            "limit_MiB": self.settings["memory"]["small"],
            "evicted": float(state.bank.evictions),
            "more_MiB": memory() - before,
        }

    def short(self) -> tuple[list[int], Any]:
        """Return a prompt of four tokens, and parameters for one more."""
        from vllm import SamplingParams

        return list(self.vocabulary[:4]), SamplingParams(temperature=0, max_tokens=1)

    def hot(self, parameters: int, requests: int, new: int) -> dict[str, float]:
        """Return how long new adapters take to be read, and to stall requests that run."""
        from vllm import SamplingParams

        from reftune.serve.plugin import frontend_of

        engine: Any = self.llm.llm_engine
        r = max(1, round(parameters / (2 * self.shape[0] * self.shape[1])))
        several = self.requests(5, r=min(r, self.shape[0]), positions="l1")
        frontend = frontend_of(engine.input_processor)
        assert frontend is not None
        texts = prompts(requests, 32, 0, 1, self.vocabulary)
        given = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        for text in texts:
            self.add(text, given)
        engine.step()
        steps = [_timed(engine.step) for _ in range(8)]
        read, stall = [], []
        for one in several:
            # A copy: what was loaded in an earlier round is another version.
            path = self.folder / f"hot-{time.monotonic_ns()}"
            shutil.copytree(one.lora_path, path)
            with (path / "adapter_config.json").open("a") as file:
                file.write(f" {' ' * (time.monotonic_ns() % 99_991)}")
            fresh = self.named(path)
            read.append(_timed(lambda path=path: frontend.adapter(path)))  # in a server: a thread's
            self.add(*self.short(), fresh)
            first = _timed(engine.step)  # its prefill, and its parameters read by the worker
            self.add(*self.short(), fresh)
            stall.append(first - _timed(engine.step))  # a prefill alike, with the parameters there
            shutil.rmtree(path)
        while engine.has_unfinished_requests():
            engine.step()
        return {
            "read_ms": 1000 * statistics.median(read),
            "stall_ms": 1000 * max(0.0, statistics.median(stall)),
            "step_ms": 1000 * statistics.median(steps),
        }

    def paths(self, adapters: int) -> dict[str, Any]:
        """Return the directories of random adapters."""
        return {"paths": [one.lora_path for one in self.requests(adapters)]}

    def answers(
        self, texts: Sequence[list[int]], names: Sequence[str | None], new: int
    ) -> dict[str, Any]:
        """Return what is generated greedily, all in one batch, with the five best log-probs."""
        from vllm import SamplingParams

        self.llm.reset_prefix_cache()
        given = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, logprobs=5)
        outputs = self.llm.generate(
            [{"prompt_token_ids": text} for text in texts],
            given,
            lora_request=[None if name is None else self.named(name) for name in names],
            use_tqdm=False,
        )
        found = [output.outputs[0] for output in outputs]
        return {
            "tokens": [list(one.token_ids) for one in found],
            "logprobs": [
                [sorted((t, p.logprob) for t, p in step.items()) for step in one.logprobs]
                for one in found
            ],
        }


class HF:
    """transformers' `generate`, by `HFEngine`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from reftune.generate import HFEngine
        from reftune.models import load_model

        model, tokenizer = load_model(settings["model"], settings["options"]["dtype"])
        assert model.generation_config is not None
        model.generation_config.eos_token_id = None
        self.engine = HFEngine(model.eval(), tokenizer, batch_size=settings["hf_batch"])
        self.vocabulary = range(3, min(40000, model.config.vocab_size))

    def run(
        self, adapters: int, requests: int, prompt: int, new: int, seed: int = 0
    ) -> dict[str, float]:
        """Return the time of a batch."""
        from reftune.generate import Sampling

        assert not adapters
        texts = prompts(requests, prompt, 0, seed, self.vocabulary)
        return {"seconds": _timed(lambda: self.engine.generate(texts, Sampling(new)))}

    def texts(self) -> dict[str, Any]:
        """Return prompts in words, as token ids."""
        from reftune.data import load_rows, to_examples
        from reftune.demo import HELDOUT
        from reftune.prompts import encode_prompt

        examples = to_examples(load_rows(HELDOUT))
        tokenizer = self.engine.tokenizer
        return {"texts": [encode_prompt(e.prompt, tokenizer, "auto") for e in examples]}

    def answers(
        self, texts: Sequence[list[int]], names: Sequence[str | None], new: int
    ) -> dict[str, Any]:
        """Return what is generated greedily, each prompt alone with its adapter, to its end.

        With it the tokens that are an end, before which a completion is cut.
        """
        from peft import PeftModel

        from reftune.completions import eos_ids
        from reftune.generate import HFEngine, Sampling

        own = {path: f"a{i}" for i, path in enumerate(dict.fromkeys(n for n in names if n))}
        (first, *others) = own
        model: Any = PeftModel.from_pretrained(self.engine.model, first, adapter_name=own[first])
        for path in others:
            model.load_adapter(path, adapter_name=own[path])
        alone = HFEngine(model.eval(), self.engine.tokenizer, batch_size=1)
        found = alone.generate(texts, Sampling(new), [name and own[name] for name in names])
        model.unload()
        ends = eos_ids(self.engine.model, self.engine.tokenizer)
        return {"tokens": [list(one.token_ids) for one in found], "ends": sorted(ends)}


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
