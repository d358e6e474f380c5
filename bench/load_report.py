"""Tables of `bench.load`'s result lines: python -m bench.load_report [FILE.md] prints them, or puts them between its markers."""

import argparse
import sys
from pathlib import Path

from bench import lines, report
from bench.sections import table

MARKERS = ("<!-- load -->", "<!-- /load -->")
WAYS = (  # phase of one request at a time, phase of many clients, what it is
    ("one", "many", "`yojo serve`, comparative"),
    ("isolated_one", "isolated_many", "`yojo serve`, isolated"),
    ("plain_one", "plain_many", "plain FastAPI, N single passes"),
)
OPEN = ("below", "above")


def text(line):
    """Markdown of one result line (a dict of `bench.load`): what was measured, and where."""
    phases, clients = line["phases"], line["clients"]
    blocks = [provenance(line), ways(phases, clients), mixed(phases["mixed"], clients), opened(phases)]
    return "\n\n".join(blocks)


def provenance(line):
    """Where a line's figures come from, a sentence."""
    threads = (
        f"torch with {line['threads']} thread{'s' * (line['threads'] > 1)}" if line["threads"] else "torch as it is"
    )
    versions = ", ".join(f"{name} {version}" for name, version in line["versions"].items())
    beside = f" Beside it ran: {line['beside']}." if line["beside"] else ""
    return (
        f"The digits' model on {line['cores']} cores of an {line['cpu']}, shared by server and clients; {threads}, rows of "
        f"{line['max_tokens']} tokens; {versions}; commit {line['commit']}, {line['date']} (`python -m bench.load`).{beside}"
    )


def ways(phases, clients):
    """A row for each server: one request at a time beside many clients."""
    header = ["server", "clients", "requests/s", "responses/s", "p50", "p95", "p99", "/health p99", "/health max"]
    rows = []
    for one, many, name in WAYS:
        for phase, count in ((phases[one], 1), (phases[many], clients)):
            rows.append([name, str(count), *rates(phase), *latencies(phase), *health(phase)])
    return table(header, rows)


def mixed(phase, clients):
    """What became of the long phase, in which some requests are refused and some clients leave."""
    kinds, memory = phase["kinds"], phase["memory"]
    statuses = ", ".join(f"{count} x {status}" for status, count in phase["statuses"].items())
    p50, p95, p99 = latencies(phase)
    return (
        f"{clients} clients for {phase['seconds']:.0f} s, of whose {phase['requests']} requests {kinds['wrong']} had to be refused "
        f"and {kinds['left']} were left by their client: {statuses}; {phase['problems']} replies were wrong. "
        f"{rates(phase)[0]} requests/s and {rates(phase)[1]} responses/s; p50 {p50}, p95 {p95}, p99 {p99}. "
        f"Memory of all processes {memory['last_quarter'] / 2**20:.0f} MiB in the last quarter, {memory['growth']:+.1%} "
        f"since the second. /health: p99 {health(phase)[0]}, at most {health(phase)[1]}."
    )


def opened(phases):
    """A row for each rate at which requests come."""
    header = ["offered", "x capacity", "answered/s", "turned away (429)", "p50", "p95", "p99", "429 p99", "/health p99", "/health max"]  # fmt: skip
    rows = []
    for phase in (phases[name] for name in OPEN):
        shed = phase["statuses"].get("429", 0) / phase["requests"]
        cells = [f"{phase['rate']:.1f}/s", f"{phase['factor']:g}", rates(phase)[0], f"{shed:.0%}", *latencies(phase)]
        rows.append([*cells, milliseconds(phase["shed_latency"]["p99"]), *health(phase)])
    return table(header, rows)


def rates(phase):
    """[requests a second, responses a second]."""
    return [f"{phase[name]:.1f}" for name in ("requests_per_second", "responses_per_second")]


def latencies(phase):
    """[p50, p95, p99] of scored requests."""
    return [milliseconds(phase["latency"][name]) for name in ("p50", "p95", "p99")]


def health(phase):
    """[p99, longest] of /health."""
    return [milliseconds(phase["health"][name]) for name in ("p99", "max")]


def milliseconds(seconds):
    """Seconds as text; "" for None."""
    return "" if seconds is None else f"{1000 * seconds:.0f} ms"


def main(arguments=None):
    """Print the tables of the last line, or write them into a file; 1 where it is out of date (--check), 2 where there is no line."""
    parser = argparse.ArgumentParser(prog="python -m bench.load_report", description=__doc__.partition("\n")[0])
    parser.add_argument("page", nargs="?", type=Path, help=f"Markdown file with the lines {' and '.join(MARKERS)}")
    parser.add_argument("--results", default="bench/results/serving/cpu.jsonl", help="file of result lines")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 when the page is out of date")
    options = parser.parse_args(arguments)
    try:
        found = lines.read(options.results)
        if not found:
            raise ValueError(f"{options.results} has no result line: python -m bench.load --results bench/results")
        block = text(found[-1])
        if options.page is None:
            print(block)
            return 0
        before = options.page.read_text()
        after = report.replaced(before, block, options.page, MARKERS)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.check:
        if before != after:
            print(f"{options.page} is out of date: run python -m bench.load_report {options.page}")
        return int(before != after)
    options.page.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
