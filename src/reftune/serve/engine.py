"""`VLLMEngine`: completions from vLLM in this process, as `HFEngine` gives them."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from reftune.decoding import check_prompt, settled_text, until_first_stop
from reftune.errors import ReftConfigError, did_you_mean
from reftune.generate import Completion, FinishReason, IsDecided, OnDone, Sampling
from reftune.models import resolve
from reftune.serve.settings import KEY
from reftune.serve.version import check_version

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@final
class VLLMEngine:
    """Generate offline with vLLM: a base model and any number of its ReFT adapters.

    Args:
        base: a model as `reftune.models.resolve` takes it.
        adapters: directories of adapters by name.
        active: the adapter that acts where `generate` names none; None is the base model.
        options: of `vllm.LLM`, for instance {"dtype": "float32", "max_model_len": 2048}; those of
            reftune are in its "additional_config" (`reftune.serve.settings.ServeSettings`).

    Raises:
        UnsupportedVersionError: vLLM is missing, or has a version that was not tried.
        AdapterMismatchError, ReftConfigError: an adapter cannot be served on this model.
    """

    def __init__(
        self,
        base: str,
        adapters: Mapping[str, str | Path] | None = None,
        active: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        check_version()
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        from reftune.serve.plugin import frontend_of, install

        install()  # also where the plugin is not installed as one: from a source tree
        given = dict(options or {})
        given["additional_config"] = {KEY: {}, **given.get("additional_config", {})}
        self.base = resolve(base)
        self.llm: Any = LLM(self.base, **given)
        frontend = frontend_of(self.llm.llm_engine.input_processor)
        assert frontend is not None
        versions = {name: frontend.adapter(str(path)) for name, path in (adapters or {}).items()}
        self._digests = {name: version.digest for name, version in versions.items()}
        self._requests: dict[str, Any] = {
            name: LoRARequest(name, i + 1, str(version.directory))
            for i, (name, version) in enumerate(versions.items())
        }
        self._counter = itertools.count()
        self._active = self._named([active], 1)[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer whose ids `generate` takes and gives."""
        tokenizer: PreTrainedTokenizerBase = self.llm.get_tokenizer()
        return tokenizer

    @property
    def identity(self) -> str:
        """Return the base model with its weights' files, its dtype and the active adapter."""
        return self.identity_of(self._active)

    def identity_of(self, adapter: str | None) -> str:
        """Return the identity of the base model with one adapter, or of the base alone.

        Raises:
            ReftConfigError: the engine has no such adapter.
        """
        (name,) = self._named([adapter], 1)
        config = self.llm.llm_engine.vllm_config.model_config
        parts = f"vllm {config.architecture} {config.dtype} base={_files_digest(self.base)}"
        return parts if name is None else f"{parts} adapter={self._digests[name]}"

    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        adapters: Sequence[str | None] | None = None,
        on_done: OnDone | None = None,
        is_decided: IsDecided | None = None,
    ) -> list[Completion]:
        """Complete every prompt, all in one stream of batches, and return them in their order.

        A completion also ends when `is_decided(index, text so far)` says so, in greedy decoding.

        Raises:
            DataError: a prompt has no tokens.
            ReftConfigError: `adapters` has another length than `prompts` or an unknown name, or
                `sampling` asks for what vLLM does not have.
        """
        for i, prompt in enumerate(prompts):
            check_prompt(prompt, f"prompt {i}")
        names = self._named(
            [self._active] * len(prompts) if adapters is None else adapters, len(prompts)
        )
        number: dict[str, int] = {}
        done: dict[int, Completion] = {}
        decided = is_decided if sampling.temperature == 0 else None
        try:
            for name, i in self._submit(prompts, sampling, names, decided is not None):
                number[name] = i
            for i, completion in self._run(number, prompts, sampling, decided):
                done[i] = completion
                if on_done is not None:
                    on_done(i, completion)
        finally:
            self.llm.llm_engine.abort_request([name for name, i in number.items() if i not in done])
        return [done[i] for i in range(len(prompts))]

    def _submit(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        names: Sequence[str | None],
        by_token: bool,
    ) -> Iterator[tuple[str, int]]:
        """Give vLLM the requests, and yield the name and the prompt's number of each."""
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        kind = RequestOutputKind.CUMULATIVE if by_token else RequestOutputKind.FINAL_ONLY
        params = [_params(sampling, i) for i in range(len(prompts))]
        for i, prompt in enumerate(prompts):
            params[i].output_kind = kind
            request, name = f"reftune-{next(self._counter)}", names[i]
            lora = None if name is None else self._requests[name]
            self.llm.llm_engine.add_request(
                request, tokens_input(prompt), params[i], lora_request=lora
            )
            yield request, i

    def _run(
        self,
        number: Mapping[str, int],
        prompts: Sequence[list[int]],
        sampling: Sampling,
        is_decided: IsDecided | None,
    ) -> Iterator[tuple[int, Completion]]:
        engine, seen = self.llm.llm_engine, set[int]()
        while engine.has_unfinished_requests():
            for output in engine.step():
                i = number.get(output.request_id)
                if i is None or i in seen:
                    continue
                found, reason = output.outputs[0], output.outputs[0].finish_reason
                token_ids = list(found.token_ids)
                if not output.finished:
                    if is_decided is None:
                        continue
                    text = settled_text(self.tokenizer, token_ids, sampling.stop)
                    if not is_decided(i, text):
                        continue
                    engine.abort_request([output.request_id])
                    reason = "decided"
                elif reason == "stop" and not isinstance(found.stop_reason, str):
                    token_ids.pop()  # the end-of-sequence token, or one of `stop_token_ids`
                seen.add(i)
                yield i, self._completion(prompts[i], token_ids, reason, sampling)

    def _completion(
        self, prompt: list[int], ids: list[int], reason: FinishReason, sampling: Sampling
    ) -> Completion:
        kept, text = until_first_stop(self.tokenizer, ids, sampling.stop)
        return Completion(tuple(prompt), tuple(kept), text, "stop" if kept is not ids else reason)

    def _named(self, names: Sequence[str | None], count: int) -> list[str | None]:
        if len(names) != count:
            raise ReftConfigError(
                f"got {len(names)} adapters for {count} prompts: give one name per prompt "
                "(None: the base model)."
            )
        known = list(self._requests)
        for name in names:
            if name is not None and name not in self._requests:
                raise ReftConfigError(
                    f"the engine has no adapter {name!r}; it has {', '.join(known) or 'none'}."
                    + did_you_mean(name, known)
                )
        return list(names)


def _params(sampling: Sampling, index: int) -> Any:
    from vllm import SamplingParams

    if sampling.num_beams > 1 or sampling.no_repeat_ngram_size:
        raise ReftConfigError(
            f"num_beams={sampling.num_beams}, no_repeat_ngram_size={sampling.no_repeat_ngram_size}"
            ": vLLM's sampler has neither. Use num_beams=1 and no_repeat_ngram_size=0, or HFEngine."
        )
    return SamplingParams(
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        repetition_penalty=sampling.repetition_penalty,
        stop=list(sampling.stop),
        stop_token_ids=list(sampling.stop_token_ids),
        seed=None if sampling.seed is None else sampling.seed + index,
    )


def _files_digest(base: str) -> str:
    """Return a digest of the names, sizes and times of a model's files, or of its Hub id."""
    digest = hashlib.sha256(base.encode())
    if Path(base).is_dir():
        for entry in sorted(os.scandir(base), key=lambda entry: entry.name):
            stat = entry.stat()
            digest.update(f"{entry.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]
