"""What the server says of itself at /metrics, in Prometheus' text format."""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from dsjax.infer.requests import Request
from dsjax.infer.server.driver import Driver

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """Reads the engine when asked; only latencies are kept here, as they come."""

    def __init__(self, driver: Driver):
        self.driver, self.registry = driver, CollectorRegistry()
        self.first = Histogram("dsjax_time_to_first_token_seconds", "From arrival to the first token", buckets=_SECONDS,
                               registry=self.registry)  # fmt: skip
        self.between = Histogram("dsjax_inter_token_latency_seconds", "Between tokens of a request", buckets=_SECONDS,
                                 registry=self.registry)  # fmt: skip
        self.registry.register(self)

    def began(self, request: Request) -> None:
        """Measures a request from now on; call it before it is submitted."""
        given, last = request.tell, [time.monotonic()]

        def tell(said):
            now = time.monotonic()
            if request.n_new == len(said):
                self.first.observe(now - request.arrived)
            else:
                for _ in said:
                    self.between.observe((now - last[0]) / len(said))
            last[0] = now
            return given(said)

        request.tell = tell

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def collect(self) -> Iterator:
        engine = self.driver.engine
        counts = dict(engine.counts)

        def gauge(name, help, value):
            return GaugeMetricFamily(f"dsjax_{name}", help, value=value)

        def counter(name, help, value):
            return CounterMetricFamily(f"dsjax_{name}", help, value=value)

        running, waiting = len(engine.running), len(engine.waiting)
        yield gauge("requests_running", "Requests on rows", running)
        yield gauge("requests_waiting", "Requests without a row", max(waiting, self.driver.n_open - running))
        held = sum(pool.n_held for pool in engine.pools)
        total = sum(pool.n_pages - 1 for pool in engine.pools)
        yield gauge("cache_used_ratio", "Pages held by requests", held / total)
        idle, free = (sum(getattr(pool, name) for pool in engine.pools) for name in ("n_idle", "n_free"))
        pages = GaugeMetricFamily(
            "dsjax_cache_pages", "Of requests, kept for prompts to come, and neither", labels=["state"]
        )
        for state, n in {"held": held, "idle": idle, "free": free - idle}.items():
            pages.add_metric([state], n)
        yield pages
        for name, help in {
            "prompt_tokens": "Tokens of prompts that were read",
            "cached_tokens": "Of these, found in the cache",
            "generated_tokens": "Tokens generated",
            "preemptions": "Times that a request lost its pages",
            "steps": "Steps of all rows",
            "prefill_steps": "Chunks of prompts read",
        }.items():
            yield counter(name, help, counts.get(name, 0))
        ended = CounterMetricFamily("dsjax_requests_ended", "By reason", labels=["reason"])
        for name, n in counts.items():
            if name.startswith("ended_"):
                ended.add_metric([name.removeprefix("ended_")], n)
        yield ended
        yield counter("failed_steps", "Steps that raised an error", self.driver.failures)
        for name, help, values in (
            ("drafted_tokens", "Tokens drafted, by place behind the last", engine.drafted_at),
            ("accepted_tokens", "Of these, accepted", engine.accepted_at),
        ):
            family = CounterMetricFamily(f"dsjax_{name}", help, labels=["position"])
            for n, value in enumerate(values.tolist(), 1):
                family.add_metric([str(n)], value)
            yield family
        load = CounterMetricFamily("dsjax_expert_tokens", "Tokens routed to each expert", labels=["layer", "expert"])
        for layer, of_layer in enumerate(engine.load.tolist(), engine.cfg.first_k_dense_replace):
            for expert, n in enumerate(of_layer):
                load.add_metric([str(layer), str(expert)], n)
        yield load
