"""What ``/metrics`` shows: counts and times of the server, and the statistics of the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from atom_jax.engine import EngineStats
from atom_jax.server.compilation import Compilation

# Upper limits of the histograms' buckets, in seconds: for requests and first tokens, and for later tokens.
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)

# Each metric: its name without the prefix atom_jax_, its description, and how it is read from the engine's
# statistics. Prometheus adds _total to the names of counters.
_Read = Callable[[EngineStats], float]
_GAUGES: tuple[tuple[str, str, _Read], ...] = (
    ("requests_waiting", "Requests in the queue.", lambda stats: stats.waiting),
    ("requests_running", "Requests that have pages.", lambda stats: stats.running),
    ("free_pages", "Cache pages that a request can have.", lambda stats: stats.free_pages),
    ("pages", "All cache pages.", lambda stats: stats.num_pages),
    (
        "prefix_cache_hit_ratio",
        "Share of prompt tokens that the prefix cache spared.",
        lambda stats: stats.cached_tokens / max(stats.prompt_tokens, 1),
    ),
)
# What the endpoint picker of the Gateway API inference extension reads from a model server, to choose among
# replicas (docs/scaling.md). It knows these names without being told.
_PICKER_GAUGES: tuple[tuple[str, str, _Read], ...] = (
    ("vllm:num_requests_waiting", "Requests in the queue.", lambda stats: stats.waiting),
    ("vllm:num_requests_running", "Requests that have pages.", lambda stats: stats.running),
    (
        "vllm:kv_cache_usage_perc",
        "Share of cache pages that a request cannot have, 0 to 1.",
        lambda stats: 1 - stats.free_pages / stats.num_pages,
    ),
)
_COUNTERS: tuple[tuple[str, str, _Read], ...] = (
    ("prompt_tokens", "Tokens of admitted prompts.", lambda stats: stats.prompt_tokens),
    ("cached_tokens", "Prompt tokens that the prefix cache spared.", lambda stats: stats.cached_tokens),
    ("generated_tokens", "Tokens of answers.", lambda stats: stats.generated_tokens),
    ("preemptions", "Requests that lost their pages for a while.", lambda stats: stats.preemptions),
    ("steps", "Steps of the engine.", lambda stats: stats.steps),
    ("step_seconds", "Seconds in steps.", lambda stats: stats.step_seconds),
    (
        "host_seconds",
        "Seconds that the device may have waited.",
        lambda stats: stats.host_seconds,
    ),
)


class Metrics:
    """The metrics of one server.

    Args:
      stats: returns the engine's statistics; called when ``/metrics`` is read.
      compilation: of the engine's programs.
      page_size: tokens in a page of the engine's cache.

    Attributes:
      registry: of these metrics only; prometheus_client's default registry is not used.
      first_token: seconds from the submission of a request to its first token.
      per_output_token: mean seconds of a request's tokens after the first.
      whole: seconds from the submission of a request to its end.
      answers: number of HTTP responses by path and status.
    """

    def __init__(self, stats: Callable[[], EngineStats], compilation: Compilation, page_size: int) -> None:
        self.registry = CollectorRegistry()
        self.first_token = self._histogram("time_to_first_token", "To the first token.", _SECONDS)
        self.per_output_token = self._histogram(
            "time_per_output_token", "A token after the first.", _TOKEN_SECONDS
        )
        self.whole = self._histogram("request", "To the end of a request.", _SECONDS)
        self.answers = Counter(
            "atom_jax_http_answers", "HTTP answers.", ("path", "status"), registry=self.registry
        )
        self.registry.register(_EngineCollector(stats, compilation, page_size))

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"atom_jax_{name}_seconds", text, buckets=buckets, registry=self.registry)

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    def __init__(self, stats: Callable[[], EngineStats], compilation: Compilation, page_size: int) -> None:
        self._stats, self._compilation, self._page_size = stats, compilation, page_size

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, text, read in _GAUGES:
            yield GaugeMetricFamily(f"atom_jax_{name}", text, value=read(stats))
        for name, text, read in _PICKER_GAUGES:
            yield GaugeMetricFamily(name, text, value=read(stats))
        cache = {"block_size": str(self._page_size), "num_gpu_blocks": str(stats.num_pages)}
        yield InfoMetricFamily("vllm:cache_config", "Tokens in a cache page, and all pages.", value=cache)
        compiled, total = self._compilation.compiled, self._compilation.total
        yield GaugeMetricFamily("atom_jax_programs_compiled", "Programs that are compiled.", value=compiled)
        yield GaugeMetricFamily("atom_jax_programs", "All programs.", value=total)
        for name, text, read in _COUNTERS:
            yield CounterMetricFamily(f"atom_jax_{name}", text, value=read(stats))
