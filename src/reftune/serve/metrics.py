"""What a server counts of each adapter, at its Prometheus endpoint beside vLLM's own."""

from __future__ import annotations

from typing import final

from prometheus_client import REGISTRY, Counter, Histogram


def _counter(name: str, text: str) -> Counter:
    # One registry for a process, which in tests has several servers.
    known = REGISTRY._names_to_collectors.get(name)
    return known if isinstance(known, Counter) else Counter(name, text, ["adapter"])


@final
class Metrics:
    """Counters by adapter."""

    def __init__(self) -> None:
        self._requests = _counter("reftune:requests", "Requests of an adapter")
        self._edited = _counter("reftune:prompt_tokens_edited", "Prompt tokens that are edited")
        self._queried = _counter("reftune:prefix_cache_queries", "Prompt tokens looked up")
        self._hit = _counter("reftune:prefix_cache_hits", "Prompt tokens found in the prefix cache")
        known = REGISTRY._names_to_collectors.get("reftune:load_seconds")
        self._load = (
            known
            if isinstance(known, Histogram)
            else Histogram("reftune:load_seconds", "Time to read and check an adapter", ["adapter"])
        )

    def loaded(self, adapter: str, seconds: float) -> None:
        """Count that an adapter was read."""
        self._load.labels(adapter).observe(seconds)

    def requested(self, adapter: str, edited: int) -> None:
        """Count a request, and how many tokens of its prompt are edited."""
        self._requests.labels(adapter).inc()
        self._edited.labels(adapter).inc(edited)

    def finished(self, adapter: str, prompt_length: int, cached: int) -> None:
        """Count how much of a finished request's prompt came from the prefix cache."""
        self._queried.labels(adapter).inc(prompt_length)
        self._hit.labels(adapter).inc(cached)
