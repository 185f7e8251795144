"""lm-eval's tasks on a model with an adapter, edited where the adapter was trained to edit.

lm-eval's own `hf` model gives a loglikelihood request to the model as one text without a mask, so
that a suffix position (`l7`) is the end of the continuation, or padding. Here the context is the
prompt:

    loglikelihood          the context's tokens, as lm-eval tells them from the continuation's, are
                           the prompt; what is cut from its left is not part of it
    ... without context    and loglikelihood_rolling: there is no prompt, so nothing is edited and
                           the score is the base model's (but for adapters with `edit_generated`)
    generate_until         as everywhere else: `reftune.generate.HFEngine`

With strength 0 all scores are those of lm-eval's `hf`.

lm-eval finds models by a table of its own that plugins cannot add to, so its command line is:

    python -m reftune.harness run --model reftune --model_args peft=DIR --tasks boolq
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast, final

import torch
from huggingface_hub import try_to_load_from_cache
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.models.utils_hf import get_dtype
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from reftune.controls import reft_layers, set_strength
from reftune.decoding import fingerprint, special_ids
from reftune.errors import ReftConfigError
from reftune.generate import Completion, HFEngine, Sampling
from reftune.hub import is_hub_name, split_revision
from reftune.likelihood import Likelihood, Pair, Scorer
from reftune.methods import WEIGHTS_CONFIG, as_base
from reftune.run import Loaded, load_adapter

log = logging.getLogger("reftune")

Tokens: TypeAlias = list[int]
Request: TypeAlias = tuple[tuple[str, str] | None, Tokens, Tokens]

BATCH_TOKENS = 16384  # what `batch_size="auto"` stands for, with at most `max_batch_size` rows


class _Group(NamedTuple):
    """Requests with the same generation arguments, by their numbers."""

    indices: list[int]
    until: list[str]
    sampling: Sampling
    prompts: list[Tokens]


@register_model("reftune")
@final
class ReftuneLM(HFLM):  # type: ignore[misc]
    """An adapter on its base model, for lm-eval.

    Args:
        adapter: its directory, a run's directory or a Hub name; or a model that is loaded.
        pretrained: the base model, where it is not the one that the adapter names.
        strength: factor on a ReFT's edits; 0 is the base model.
        batch_size: rows in a batch, or "auto": as many as have 16,384 tokens.
        peft: `adapter` by the name that lm-eval calls its folder of results after.
        trust_remote_code: what lm-eval's option of that name adds; true is not accepted.

    The others are those of lm-eval's `hf`.

    Raises:
        ReftConfigError: a setting is not accepted.
        RunError: the adapter or its base cannot be loaded.
    """

    def __init__(
        self,
        adapter: str | Loaded | None = None,
        pretrained: str | None = None,
        strength: float = 1.0,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 16,
        max_batch_size: int | None = 64,
        max_length: int | None = None,
        softmax_dtype: str | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        think_end_token: str | int | None = None,
        enable_thinking: bool | None = None,
        chat_template_args: dict[str, Any] | None = None,
        peft: str | None = None,
        trust_remote_code: bool | None = None,
    ) -> None:
        adapter = _adapter_of(adapter, peft, trust_remote_code)
        if isinstance(adapter, str):
            loaded = load_adapter(adapter, base=pretrained, dtype=dtype, device=device)
        else:
            loaded = adapter
        automatic = str(batch_size).startswith("auto")
        rows = max_batch_size or 64 if automatic else int(batch_size)
        super().__init__(
            pretrained=loaded.model,
            backend="causal",
            tokenizer=loaded.tokenizer,
            max_length=max_length,
            softmax_dtype=softmax_dtype,
            batch_size=rows,
            add_bos_token=add_bos_token,
            prefix_token_id=prefix_token_id,
            think_end_token=think_end_token,
            enable_thinking=enable_thinking,
            chat_template_args=chat_template_args,
        )
        if reft_layers(loaded.model):
            set_strength(loaded.model, float(strength))
        elif float(strength) != 1.0:
            raise ReftConfigError(
                f"strength={strength}, and {adapter!r} is no ReFT: only its edits have a strength."
            )
        # In lm-eval's report these name what was evaluated.
        self.pretrained, revision = split_revision(loaded.base)
        self.revision = loaded.revision or revision or "main"
        self.strength = float(strength)
        self.peft = adapter if isinstance(adapter, str) else None
        tokens = BATCH_TOKENS if automatic else None
        dtype_of_softmax = get_dtype(softmax_dtype) if softmax_dtype is not None else None
        self._scorer = Scorer(loaded.model, rows, tokens, dtype_of_softmax)
        self._engine = HFEngine(loaded.model, loaded.tokenizer, rows, tokens)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Return log-probability and greediness for each request, by lm-eval's tokens.

        A request is ((context, continuation) or None, the tokens of one, those of the other).
        """
        texts = [text for text, _, _ in requests]
        pairs = [
            Pair(tuple(context), tuple(continuation), has_prompt=bool(text and text[0])).cut(
                self.max_length
            )
            for text, context, continuation in requests
        ]
        whole = [len(context) for _, context, _ in requests]
        cut = sum(len(p.context) < n for p, n in zip(pairs, whole, strict=True))
        self._warn_of_cuts(cut, len(requests))
        with tqdm(total=len(pairs), disable=disable_tqdm, desc="loglikelihood requests") as bar:

            def keep(i: int, scored: Likelihood) -> None:
                if (text := texts[i]) is not None:
                    answer = (scored.logprob, scored.is_greedy)
                    self.cache_hook.add_partial("loglikelihood", text, answer)
                bar.update(1)

            found = self._scorer.score(pairs, keep)
        return [(one.logprob, one.is_greedy) for one in found]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-probability of each text, of which nothing is a prompt."""
        log.warning(
            "loglikelihood_rolling scores whole texts. They have no prompt, so an adapter that "
            "edits prompts does nothing there, and the scores are the base model's."
        )
        return cast(list[float], super().loglikelihood_rolling(requests, disable_tqdm))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes after each context, up to a stop string.

        Raises ReftConfigError for a generation argument that is not known here.
        """
        replies: dict[int, str] = {}
        groups = self._groups(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="generate_until requests") as bar:
            for group in groups:

                def keep(k: int, completion: Completion, group: _Group = group) -> None:
                    i = group.indices[k]
                    replies[i] = self._reply(completion, group.until)
                    self.cache_hook.add_partial("generate_until", requests[i].args, replies[i])
                    bar.update(1)

                self._engine.generate(group.prompts, group.sampling, on_done=keep)
        return [replies[i] for i in range(len(requests))]

    def _groups(self, requests: list[Instance]) -> list[_Group]:
        """Return the requests by their generation arguments, with as much context as fits."""
        kinds: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            kinds.setdefault(repr(request.args[1]), []).append(i)
        groups, cut = [], 0
        for indices in kinds.values():
            until, sampling = self._sampling(requests[indices[0]].args[1])
            room = self.max_length - sampling.max_new_tokens
            if room < 1:
                raise ReftConfigError(
                    f"{sampling.max_new_tokens} tokens to generate leave no room for a prompt "
                    f"in {self.max_length}: lower max_gen_toks, or raise max_length."
                )
            prompts = [self.tok_encode(requests[i].args[0]) for i in indices]
            cut += sum(len(prompt) > room for prompt in prompts)
            groups.append(_Group(indices, until, sampling, [p[-room:] for p in prompts]))
        self._warn_of_cuts(cut, len(requests))
        return groups

    def _warn_of_cuts(self, cut: int, requests: int) -> None:
        if cut:
            log.warning(
                f"The contexts of {cut} of {requests} requests do not fit in {self.max_length} "
                "tokens: their left is cut off, and an adapter that edits a prompt's first tokens "
                "edits the first of what is left. Lower num_fewshot, or raise max_length."
            )

    def _sampling(self, arguments: Mapping[str, Any]) -> tuple[list[str], Sampling]:
        """Return the stop strings and how to sample, from lm-eval's generation arguments.

        What they leave out is what the model's own generation config says, as in `hf`.
        """
        given: dict[str, Any] = dict(normalize_gen_kwargs(dict(arguments), self.max_gen_toks))
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(given.pop("until", None), eos=eos)
        sample = given.pop("do_sample")
        temperature = float(given.pop("temperature", 0.0))
        own = self.model.generation_config
        chosen: dict[str, Any] = {
            "max_new_tokens": given.pop("max_gen_toks"),
            "temperature": temperature if sample else 0.0,
        }
        defaults = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1}
        if sample:
            defaults |= {"top_p": 1.0, "top_k": 50}
        for name, default in defaults.items():
            # 0 is an answer, of a task and of a model: top_k 0 takes all tokens.
            said = (given.pop(name, None), getattr(own, name, None), default)
            chosen[name] = next(value for value in said if value is not None)
        chosen["seed"] = given.pop("seed", None)
        for name in ("top_p", "top_k", "use_cache"):  # of no effect in greedy decoding
            given.pop(name, None)
        if given:
            raise ReftConfigError(
                f"generation arguments {sorted(given)} are not known; accepted are until, "
                "do_sample, max_gen_toks, temperature, top_p, top_k, seed, repetition_penalty, "
                "no_repeat_ngram_size and num_beams."
            )
        # Where text may precede the answer, what stops there must not stop the generation. A
        # special token does so anyway: it ends a turn, and none of the text says where it was.
        stop = () if self.think_end_token is not None else tuple(s for s in until if s)
        special = special_ids(self.tokenizer)
        ends = tuple(special[s] for s in until if s in special and s != eos)
        return until, Sampling(stop=stop, stop_token_ids=ends, **chosen)

    def _reply(self, completion: Completion, until: list[str]) -> str:
        end, text = self.think_end_token, completion.text
        if isinstance(end, int):
            ids = list(completion.token_ids)
            thought = len(ids) - ids[::-1].index(end) if end in ids else 0
            text = self.tok_decode(ids[thought:]).lstrip()
        marker = end if isinstance(end, str) else None
        return str(postprocess_generated_text(text, until, marker))

    def get_model_info(self) -> dict[str, Any]:
        """Return lm-eval's facts on the model, and which adapter acted how much."""
        # Not HFLM's: it asks the Hub about any name, and a folder's may be there a stranger's.
        info = {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": self.model.dtype,
            "model_revision": self.revision,
            "model_sha": _commit(self.pretrained, self.revision, "config.json"),
        }
        if self.peft:
            marks = ("adapter_config.json", WEIGHTS_CONFIG)
            info["peft_sha"] = _commit(*split_revision(self.peft), *marks)
        return info | {
            "adapter": self.peft,
            "strength": self.strength,
            "identity": fingerprint(self.model),
        }

    def cache_key(self) -> str:
        """Return a digest of all that changes the answer to a request."""
        text = ("max_length", "add_bos_token", "prefix_token_id")
        thought = ("think_end_token", "enable_thinking", "chat_template_args")
        told = {name: getattr(self, name) for name in (*text, *thought)}
        told |= {"model": fingerprint(self.model), "softmax_dtype": self._scorer.dtype}
        whole = json.dumps(told, sort_keys=True, default=str)
        return hashlib.sha256(whole.encode()).hexdigest()[:16]


def _adapter_of(
    adapter: str | Loaded | None, peft: str | None, trust_remote_code: bool | None
) -> str | Loaded:
    if trust_remote_code:
        raise ReftConfigError(
            f"trust_remote_code={trust_remote_code} is not accepted: models with code of their "
            "own are not loaded. Leave the option out."
        )
    given = [one for one in (adapter, peft) if one is not None]
    if len(given) != 1:
        raise ReftConfigError(
            f"{'both' if given else 'none'} of adapter= and peft= are given, which mean the same. "
            "Give one: the adapter's directory, a run's, or a name on the Hub."
        )
    return given[0]


def _commit(name: str, revision: str | None, *files: str) -> str:
    """Return the commit of what was loaded by its Hub name, found by one of its files; or ""."""
    if not is_hub_name(name):
        return ""
    cached = (try_to_load_from_cache(name, file, revision=revision) for file in files)
    return next((Path(path).parent.name for path in cached if isinstance(path, str)), "")


def run_tasks(
    lm: ReftuneLM,
    tasks: Sequence[str],
    *,
    base: bool = True,
    num_fewshot: int | None = None,
    limit: int | None = None,
    chat_template: bool = False,
    manager: TaskManager | None = None,
    cache: Path | None = None,
    confirm_run_unsafe_code: bool = False,
    on_found: Callable[[str, Mapping[str, Any]], None] | None = None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Evaluate lm-eval's tasks with the adapter, and the `base`: {task: {who: {metric: value}}}.

    With a folder `cache`, answers are kept there as they come, and a killed evaluation goes on.
    A `manager` knows other tasks than lm-eval's own: TaskManager(include_path=folder of YAMLs).
    Tasks that run what the model writes want `confirm_run_unsafe_code`. `on_found(who, found)` is
    given all that lm-eval says of each: versions, samples, seeds.

    Raises:
        ReftConfigError: lm-eval has no such task.
    """
    manager = manager or TaskManager()
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise ReftConfigError(
            f"lm-eval has no task {', '.join(map(repr, unknown))}; `lm_eval ls tasks` lists them."
        )
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for who in (["base"] if base else []) + ["adapter"]:
        with as_base(lm.model) if who == "base" else nullcontext():
            path = None
            if cache is not None:
                # lm-eval's key is the request alone: another model needs another file.
                cache.mkdir(parents=True, exist_ok=True)
                path = str(cache / f"{who}-{lm.cache_key()}")
            try:
                found = simple_evaluate(
                    model=lm,
                    tasks=list(tasks),
                    num_fewshot=num_fewshot,
                    limit=limit,
                    use_cache=path,
                    apply_chat_template=chat_template,
                    fewshot_as_multiturn=chat_template,
                    task_manager=manager,
                    log_samples=False,
                    confirm_run_unsafe_code=confirm_run_unsafe_code,
                )
            finally:
                # lm-eval leaves the file on the model, which would write other answers into it.
                lm.set_cache_hook(CacheHook(None))
        if on_found is not None:
            on_found(who, found)
        for task, values in found["results"].items():
            results.setdefault(task, {})[who] = values
    return results


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    torch.set_grad_enabled(False)
    cli_evaluate()
