"""Prometheus metrics, named after vLLM's: the same stems behind `sluice:`; and those of every process.

Counts are kept in plain objects that only the event loop touches, because a token is counted in
less than a microsecond that way, and are turned into samples when somebody scrapes. Labels take
values from fixed sets only: served models, replicas, finish reasons, error codes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from engines.wire import Stats
from gateway.response_store import ResponseStore
from gateway.router import ServedModel

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
TTFT_BUCKETS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0)
ITL_BUCKETS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
)
E2E_BUCKETS = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 240.0, 480.0)
_GROUP_LABELS = ("model_name", "engine")
_STAGE_LABELS = (*_GROUP_LABELS, "stage")


class Histogram:
    """Counts per bucket, and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def cumulated(self) -> list[tuple[str, float]]:
        total, buckets = 0, []
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else str(bound), float(total)))
        return buckets


class ModelMetrics:
    """What is counted of one served model."""

    def __init__(self) -> None:
        self.time_to_first_token = Histogram(TTFT_BUCKETS)
        self.inter_token_latency = Histogram(ITL_BUCKETS)
        self.e2e_request_latency = Histogram(E2E_BUCKETS)
        self.finished: Counter[str] = Counter({"stop": 0, "length": 0, "abort": 0, "error": 0})
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0
        self.resumed: Counter[str] = Counter({"replica": 0, "restarted": 0})
        self.num_poisoned = 0
        self.recovery_failed: Counter[str] = Counter({"timeout": 0, "changed": 0, "failed": 0, "stopping": 0})
        self.num_queued = 0  # sequences that wait in the gateway
        self.queue_time = Histogram(TTFT_BUCKETS)


class SequenceTimer:
    """The clock of one sequence, started when it is sent."""

    def __init__(self, metrics: ModelMetrics) -> None:
        self._metrics = metrics
        self._started = perf_counter()
        self._last = 0.0

    def on_tokens(self, count: int) -> None:
        """`count` tokens arrived together."""
        now = perf_counter()
        metrics = self._metrics
        if self._last:
            metrics.inter_token_latency.observe((now - self._last) / count)
        else:
            metrics.time_to_first_token.observe(now - self._started)
        self._last = now
        metrics.num_generated_tokens += count

    def on_end(self, reason: str) -> None:
        """`reason`: stop, length, abort or error."""
        self._metrics.finished[reason] += 1
        self._metrics.e2e_request_latency.observe(perf_counter() - self._started)


class Metrics(Collector):
    """Everything, with a registry of its own."""

    def __init__(self, models: Sequence[ServedModel], responses: ResponseStore) -> None:
        self._models = tuple(models)
        self._responses = responses
        self._by_model = {model.name: ModelMetrics() for model in models}
        self.errors: Counter[str] = Counter()  # by error code, from the table in errors.py
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)  # process_*: memory, processor time, descriptors, start

    def of(self, model: ServedModel) -> ModelMetrics:
        return self._by_model[model.name]

    def exposition(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        yield from self._request_metrics()
        yield from self._recovery_metrics()
        yield from self._group_metrics()
        yield from self._pipeline_metrics()
        yield from self._stored_metrics()
        errors = CounterMetricFamily("sluice:request_errors", "Requests refused or failed.", labels=("code",))
        for code, count in sorted(self.errors.items()):
            errors.add_metric((code,), count)
        yield errors

    def _request_metrics(self) -> Iterator[Metric]:
        prompt = _counter("prompt_tokens", "Prompt tokens of the sequences that were sent.")
        generated = _counter("generation_tokens", "Tokens that were generated.")
        finished = CounterMetricFamily(
            "sluice:request_success", "Sequences that ended.", labels=("model_name", "finished_reason")
        )
        ttft = _histogram("time_to_first_token_seconds", "From sending a sequence to its first token.")
        itl = _histogram("inter_token_latency_seconds", "Between tokens of a sequence.")
        e2e = _histogram("e2e_request_latency_seconds", "From sending a sequence to its end.")
        queued = GaugeMetricFamily(
            "sluice:num_requests_queued",
            "Sequences that wait in the gateway for a place in a group.",
            labels=("model_name",),
        )
        queue_time = _histogram("queue_time_seconds", "In the gateway's queue, of those that had to wait.")
        for name, metrics in self._by_model.items():
            queued.add_metric((name,), metrics.num_queued)
            queue_time.add_metric((name,), metrics.queue_time.cumulated(), metrics.queue_time.sum)
            prompt.add_metric((name,), metrics.num_prompt_tokens)
            generated.add_metric((name,), metrics.num_generated_tokens)
            for reason, count in metrics.finished.items():
                finished.add_metric((name, reason), count)
            ttft.add_metric((name,), metrics.time_to_first_token.cumulated(), metrics.time_to_first_token.sum)
            itl.add_metric((name,), metrics.inter_token_latency.cumulated(), metrics.inter_token_latency.sum)
            e2e.add_metric((name,), metrics.e2e_request_latency.cumulated(), metrics.e2e_request_latency.sum)
        yield from (queued, queue_time, prompt, generated, finished, ttft, itl, e2e)

    def _recovery_metrics(self) -> Iterator[Metric]:
        resumed = CounterMetricFamily(
            "sluice:streams_resumed",
            "Sequences that went on after their group died: on another replica, or once one was restarted.",
            labels=("model_name", "where"),
        )
        poisoned = _counter("requests_poisoned", "Sequences refused because two groups died with them.")
        failed = CounterMetricFamily(
            "sluice:recovery_failed",
            "Sequences lost with their group: none was ready in time, or would go on with them.",
            labels=("model_name", "reason"),
        )
        for name, metrics in self._by_model.items():
            poisoned.add_metric((name,), metrics.num_poisoned)
            for where, count in metrics.resumed.items():
                resumed.add_metric((name, where), count)
            for reason, count in metrics.recovery_failed.items():
                failed.add_metric((name, reason), count)
        yield from (resumed, poisoned, failed)

    def _group_metrics(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("sluice:group_ready", "1 when the group is ready.", labels=_GROUP_LABELS)
        first_start = GaugeMetricFamily(
            "sluice:group_first_start",
            "1 while the group starts for the first time and has not failed yet.",
            labels=_GROUP_LABELS,
        )
        restarts = CounterMetricFamily(
            "sluice:group_restarts", "Restarts of the group.", labels=_GROUP_LABELS
        )
        families = [_family(*row[:3]) for row in _STATS]
        for model in self._models:
            for (engine, stats, num_restarts, _), status in zip(model.stats(), model.statuses(), strict=True):
                labels = (model.name, engine)
                up.add_metric(labels, float(status.state == "ready"))
                first_start.add_metric(labels, float(status.state == "starting" and num_restarts == 0))
                restarts.add_metric(labels, num_restarts)
                for family, (*_, read) in zip(families, _STATS, strict=True):
                    if stats is not None:
                        family.add_metric(labels, read(stats))
        yield from (up, first_start, restarts, *families)

    def _pipeline_metrics(self) -> Iterator[Metric]:
        """Of groups with stages on CPUs: a host clock says nothing of GPUs. For the shares of a window,
        divide the rates of the two counters."""
        busy = CounterMetricFamily(
            "sluice:pipeline_stage_busy_seconds",
            "Time that a stage computed (on CPUs).",
            labels=_STAGE_LABELS,
        )
        active = CounterMetricFamily(
            "sluice:pipeline_active_seconds", "Time with steps under way.", labels=_GROUP_LABELS
        )
        share = GaugeMetricFamily(
            "sluice:pipeline_stage_busy_share", "Busy over active seconds since start.", labels=_STAGE_LABELS
        )
        bubble = GaugeMetricFamily(
            "sluice:pipeline_bubble", "Share of the stages' active time without work.", labels=_GROUP_LABELS
        )
        for labels, stats in self._staged_groups():
            active.add_metric(labels, stats.active_seconds)
            shares = [seconds / stats.active_seconds for seconds in stats.stage_busy_seconds]
            bubble.add_metric(labels, 1 - sum(shares) / len(shares))
            for stage, seconds in enumerate(stats.stage_busy_seconds):
                busy.add_metric((*labels, str(stage)), seconds)
                share.add_metric((*labels, str(stage)), shares[stage])
        yield from (busy, active, share, bubble)

    def _stored_metrics(self) -> Iterator[Metric]:
        stored = self._responses
        yield GaugeMetricFamily(
            "sluice:responses_stored", "Responses that others may go on with.", stored.num_responses
        )
        yield GaugeMetricFamily(
            "sluice:responses_stored_bytes", "Memory that these are counted as.", stored.num_bytes
        )

    def _staged_groups(self) -> Iterator[tuple[tuple[str, str], Stats]]:
        """Pipelines that have done a step."""
        for model in self._models:
            for engine, stats, *_ in model.stats():
                if stats is not None and stats.stage_busy_seconds and stats.active_seconds:
                    yield (model.name, engine), stats


def _kv_usage(stats: Stats) -> float:
    total = stats.num_blocks_used + stats.num_blocks_cached + stats.num_blocks_free
    return stats.num_blocks_used / total if total else 0.0


_STATS: tuple[tuple[str, str, str, Callable[[Stats], float]], ...] = (
    ("num_requests_running", "gauge", "Sequences in the batch.", lambda s: float(s.num_running)),
    ("num_requests_waiting", "gauge", "Sequences that wait.", lambda s: float(s.num_waiting)),
    ("kv_cache_usage_perc", "gauge", "Share of the K/V blocks in use, 0 to 1.", _kv_usage),
    (
        "kv_cache_account_faults",
        "counter",
        "Times that blocks were found lost while idle, and taken back.",
        lambda s: float(s.num_account_faults),
    ),
    ("num_preemptions", "counter", "Sequences put back to wait.", lambda s: float(s.num_preemptions)),
    ("prefix_cache_queries", "counter", "Prompt tokens looked up.", lambda s: float(s.num_prefix_queries)),
    ("prefix_cache_hits", "counter", "Prompt tokens found.", lambda s: float(s.num_prefix_hits)),
    (
        "spec_decode_num_draft_tokens",
        "counter",
        "Tokens that promptLookup has guessed.",
        lambda s: float(s.num_drafted_tokens),
    ),
    (
        "spec_decode_num_accepted_tokens",
        "counter",
        "Of them, those that the model gave as well.",
        lambda s: float(s.num_accepted_tokens),
    ),
)


def _family(name: str, kind: str, text: str) -> GaugeMetricFamily | CounterMetricFamily:
    family = GaugeMetricFamily if kind == "gauge" else CounterMetricFamily
    return family(f"sluice:{name}", text, labels=_GROUP_LABELS)


def _counter(name: str, text: str) -> CounterMetricFamily:
    return CounterMetricFamily(f"sluice:{name}", text, labels=("model_name",))


def _histogram(name: str, text: str) -> HistogramMetricFamily:
    return HistogramMetricFamily(f"sluice:{name}", text, labels=("model_name",))
