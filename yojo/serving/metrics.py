"""`Metrics`: what Prometheus is told, under the names that people who run inference servers know."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters, gauges and histograms of one server, in a registry of its own.

    Attributes:
        content_type: of what `text` returns.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self):
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "yojo_requests",
            "Requests by endpoint, status and what was wrong.",
            ["endpoint", "status", "code"],
            registry=registry,
        )
        self._seconds = Histogram(
            "yojo_request_seconds",
            "From a request's head to its reply.",
            ["endpoint"],
            buckets=SECONDS,
            registry=registry,
        )
        self._shed = Counter("yojo_requests_shed", "Requests that were turned away.", ["reason"], registry=registry)
        self._queue = Gauge("yojo_queue_size", "Requests that wait.", ["stage"], registry=registry)
        self._queue_tokens = Gauge("yojo_queue_tokens", "Tokens that wait.", registry=registry)
        self._queue_bytes = Gauge("yojo_queue_bytes", "Bytes that wait.", registry=registry)
        self._queue_seconds = Histogram(
            "yojo_queue_seconds", "That a prepared request waits for its row.", buckets=SECONDS, registry=registry
        )
        self._prepare_seconds = Histogram(
            "yojo_prepare_seconds", "Decoding and tokenising a request.", buckets=SECONDS, registry=registry
        )
        self._row_seconds = Histogram(
            "yojo_inference_seconds", "Scoring a packed row.", buckets=SECONDS, registry=registry
        )
        self._row_tokens = Histogram("yojo_batch_tokens", "Tokens of a packed row.", buckets=TOKENS, registry=registry)
        self._row_requests = Histogram(
            "yojo_batch_requests", "Requests in a packed row.", buckets=COUNTS, registry=registry
        )
        self._tokens = Counter("yojo_tokens", "Tokens scored.", registry=registry)
        self._prompt_tokens = Histogram("yojo_prompt_tokens", "Of a prompt.", buckets=TOKENS, registry=registry)
        self._responses = Histogram("yojo_responses", "To a prompt.", buckets=COUNTS, registry=registry)
        self._workers = Gauge(
            "yojo_workers", "Workers by what they do and how they are.", ["kind", "state"], registry=registry
        )
        self._restarts = Gauge(
            "yojo_worker_restarts", "How often workers were begun anew.", ["kind"], registry=registry
        )
        self._ready = Gauge("yojo_ready", "1 where requests can be scored.", registry=registry)

    def request(self, endpoint, status, code, seconds):
        """A request was answered."""
        self._requests.labels(endpoint, str(status), code or "").inc()
        self._seconds.labels(endpoint).observe(seconds)

    def shed(self, reason):
        """A request was turned away for what waits ("tokens", "bytes", "wait"), or at its deadline ("deadline")."""
        self._shed.labels(reason).inc()

    def waiting(self, preparing, scoring, tokens, size):
        """How much waits now."""
        self._queue.labels("prepare").set(preparing)
        self._queue.labels("score").set(scoring)
        self._queue_tokens.set(tokens)
        self._queue_bytes.set(size)

    def prepared(self, seconds):
        """A request was prepared."""
        self._prepare_seconds.observe(seconds)

    def queued(self, seconds):
        """A request goes into a row."""
        self._queue_seconds.observe(seconds)

    def scored(self, requests, tokens, seconds):
        """A row was scored."""
        self._row_requests.observe(requests)
        self._row_tokens.observe(tokens)
        self._row_seconds.observe(seconds)
        self._tokens.inc(tokens)

    def answered(self, prompt_tokens, responses):
        """A prompt got its scores."""
        self._prompt_tokens.observe(prompt_tokens)
        self._responses.observe(responses)

    def workers(self, scorers, preparers, ready):
        """How the workers are."""
        self._workers.clear()
        for kind, some in (("scoring", scorers), ("preparing", preparers)):
            for worker in some:
                self._workers.labels(kind, worker.state).inc()
            self._restarts.labels(kind).set(sum(worker.restarts for worker in some))
        self._ready.set(ready)

    def add(self, source):
        """Report the numbers of a function of no arguments, dict of name -> number, too; `_total`s are counters."""
        self._registry.register(_Numbers(source))

    def text(self):
        """All of it as Prometheus reads it, bytes."""
        return generate_latest(self._registry)


class _Numbers:
    def __init__(self, source):
        self._source = source

    def describe(self):
        return []

    def collect(self):
        for name, value in self._source().items():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield kind(name.removesuffix("_total"), name.replace("_", " "), value=value)


def together(texts):
    """The numbers of several servers as those of one: each sample says whose it is, by a label `replica`.

    Args:
        texts: dict: name of a server -> bytes, its `Metrics.text`.

    Returns:
        bytes, as Prometheus reads them.
    """
    families = {}
    for replica, text in sorted(texts.items()):
        for found in text_string_to_metric_families(text.decode()):
            family = families.setdefault(found.name, Metric(found.name, found.documentation, found.type))
            family.samples += [one._replace(labels={**one.labels, "replica": replica}) for one in found.samples]
    return generate_latest(_Families(families.values()))


class _Families:
    def __init__(self, families):
        self._families = families

    def collect(self):
        return self._families
