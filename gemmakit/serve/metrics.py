"""What a server counts, for Prometheus, under the names that dashboards made for vLLM read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gemmakit.pytorch.decode.batch import EngineStats, Event
from gemmakit.serve.worker import Job

# The engine's reasons in vLLM's words; what ended before its time is an "abort".
REASONS = {"eos": "stop", "stop": "stop", "length": "length", "error": "error"}
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
PER_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)


class Metrics:
    """Observes a worker: what each answer took is counted when it ends."""

    def __init__(self, model: str):
        self.model, self.registry = model, CollectorRegistry()
        labels = ["model_name"]

        def counter(name: str, what: str) -> Counter:
            return Counter(f"vllm:{name}", what, labels, registry=self.registry).labels(model)

        def seconds(name: str, what: str, buckets: Iterable[float] = SECONDS) -> Histogram:
            made = Histogram(f"vllm:{name}_seconds", what, labels, registry=self.registry, buckets=tuple(buckets))
            return made.labels(model)

        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self.generation_tokens = counter("generation_tokens", "Tokens of answers.")
        self.success = Counter(
            "vllm:request_success", "Answers that ended.", [*labels, "finished_reason"], registry=self.registry
        )
        self.first_token = seconds("time_to_first_token", "From a request to its first token.")
        self.per_token = seconds("time_per_output_token", "A token after the first.", PER_TOKEN_SECONDS)
        self.whole = seconds("e2e_request_latency", "From a request to its end.")
        self.queued = seconds("request_queue_time", "From a request to its first step.")

    # -- in the engine's thread ------------------------------------------------------------------------------------

    def begun(self, job: Job) -> None:
        pass

    def ended(self, job: Job, event: Event) -> None:
        reason = REASONS.get(event.finish_reason or "", "abort")
        self.success.labels(self.model, reason).inc()
        usage = event.usage
        if usage is None:  # of an answer that nobody waited for
            return
        if event.index == 0:
            self.prompt_tokens.inc(usage.prompt_tokens)
        self.generation_tokens.inc(usage.completion_tokens)
        self.whole.observe(max(0.0, usage.total_s))
        self.queued.observe(max(0.0, usage.queued_s))
        if usage.first_token_s is None:
            return
        self.first_token.observe(max(0.0, usage.first_token_s))
        if usage.completion_tokens > 1:
            self.per_token.observe(max(0.0, usage.total_s - usage.first_token_s) / (usage.completion_tokens - 1))

    # -- in any thread ---------------------------------------------------------------------------------------------

    def text(self, stats: EngineStats | None, unknown: Mapping[str, int]) -> bytes:
        """Everything, as Prometheus reads it. unknown: fields nobody reads, and how often they came."""
        now = CollectorRegistry(auto_describe=False)
        now.register(_Now(self.model, stats, unknown))
        return generate_latest(self.registry) + generate_latest(now)


class _Now(Collector):
    """How the engine stands, which knows it itself."""

    def __init__(self, model: str, stats: EngineStats | None, unknown: Mapping[str, int]):
        self.model, self.stats, self.unknown = model, stats, unknown

    def collect(self) -> Iterable[Metric]:
        fields = CounterMetricFamily(
            "gemmakit:unknown_fields", "Fields of requests that were passed over.", labels=["model_name", "field"]
        )
        for name, count in self.unknown.items():
            fields.add_metric([self.model, name], count)
        yield fields
        if self.stats is None:
            return
        stats = self.stats
        for kind, name, what, value in (
            (GaugeMetricFamily, "vllm:num_requests_running", "Answers that are generated.", stats.running),
            (GaugeMetricFamily, "vllm:num_requests_waiting", "Answers that wait.", stats.waiting),
            (GaugeMetricFamily, "vllm:kv_cache_usage_perc", "Part of the pages held, 0 to 1.", stats.cache_usage),
            (CounterMetricFamily, "vllm:prefix_cache_queries", "Tokens of prompts looked up.", stats.prefix_queries),
            (CounterMetricFamily, "vllm:prefix_cache_hits", "Tokens of prompts found computed.", stats.prefix_hits),
            (CounterMetricFamily, "vllm:num_preemptions", "Answers sent back for want of pages.", stats.preemptions),
            (CounterMetricFamily, "vllm:spec_decode_num_draft_tokens", "Tokens proposed.", stats.draft_tokens),
            (CounterMetricFamily, "vllm:spec_decode_num_accepted_tokens", "Proposed and right.", stats.accepted_tokens),
            (
                CounterMetricFamily,
                "gemmakit:draft_model_tokens",
                "Of the proposed, the draft model's.",
                stats.assistant_draft_tokens,
            ),
            (
                CounterMetricFamily,
                "gemmakit:draft_model_accepted_tokens",
                "Of the right, the draft model's.",
                stats.assistant_accepted_tokens,
            ),
        ):
            family = kind(name, what, labels=["model_name"])
            family.add_metric([self.model], value)
            yield family
