"""Preferences: any file that `yojo.data.load` reads, as a benchmark of its own."""

from yojo.evaluation.benchmarks import benchmark, mr2bench

OPTIONAL = (
    "prompt", "responses", "rankings", "targets", "chosen", "rejected", "images", "image", "videos", "video", "fps",
    *benchmark.NAMES,
)  # fmt: skip


def parse(record):
    """A record of a format that is told by its columns -> `Parsed`."""
    from yojo.evaluation.benchmarks.sources import PreferenceSource

    return PreferenceSource([record], {}, None, False, "auto").parse(0)


BENCHMARKS = (
    benchmark.Benchmark(
        name="preferences",
        title="Preferences",
        paper="",
        hub=None,
        patterns=(),
        split="",
        counts={},
        fields=(),
        optional=OPTIONAL,
        confirmed=True,
        headline="best_of_n",
        notes="Any format of yojo.data.load, told by its columns or named with format. Map group, question or id to "
        "columns to have parts, and items that belong together. Soft targets become ranks. Equal scores share the"
        " credit.",
        parse=parse,
        official=mr2bench.official,
    ),
)
