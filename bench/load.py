"""A load test of `yojo serve`: python -m bench.load [--seconds 60] [--results FOLDER]

The demonstration's model on the CPU, its scores of order one, behind a port of this machine:

- one request at a time; then 64 clients that each ask again once they have their reply;
- the same 64 with 5 % of requests that must be refused, and 5 % whose client goes away, for `--seconds`: every reply is compared
  with a table of `RewardModel.score` made beforehand, and the memory of all processes must not grow;
- requests at 0.8 and at twice the rate of what it can, however the earlier ones fare: the surplus gets 429 at once, the others
  keep their latency;
- one at a time and 64 clients again in isolated mode, and of a plain FastAPI app (`bench.plain_server`) that makes N single
  passes: the same scores.

/health is asked ten times a second throughout, from a process of its own. Exits with 1 where something does not hold that is no
matter of speed. `bench.load_report` makes tables of the result lines.
"""

import argparse
import asyncio
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

from bench import lines, load_client, load_mix
from bench.served import Served

CLIENTS = 64
SHARE = 0.05  # of requests that must be refused, and of those whose client goes away
SAMPLES = 0.5  # seconds between two looks at the memory
WARM_UP = 3.0  # seconds
QUEUE = 0.5  # seconds of work that may wait where there is too much of it
GROWTH = 0.03  # share of its memory that a server may grow by from the second quarter of a phase to the last


@dataclasses.dataclass
class Bench:
    """What all phases share.

    Attributes:
        options: of the command line.
        folder: `Path` for the model, the keys and logs.
        keys: API keys, one a client.
        env: environment of servers.
    """

    options: argparse.Namespace
    folder: Path
    keys: list
    env: dict

    def yojo(self, mode="comparative", **options):
        """`yojo serve`, begun."""
        given = {"port": 0, "api_key_file": self.folder / "keys", "max_tokens": self.options.max_tokens, **options}
        flags = [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        model = ["--model", f"{self.folder / 'model'}#{mode}", "--base-model", self._backbone()]
        return self._served(["-m", "yojo.cli", "serve", *model, *flags])

    def plain(self):
        """The plain app, begun."""
        return self._served(["-m", "bench.plain_server", str(self.folder / "model"), "--base-model", self._backbone()])

    def _served(self, arguments):
        return Served(arguments, self.folder / "log", self.env)

    @staticmethod
    def _backbone():
        from yojo.demo.backbone import BACKBONE

        return str(BACKBONE)

    def closed(self, server, mix, clients=CLIENTS, seconds=None, share=0.0):
        """A phase of clients that wait for their reply; its summary."""
        seconds = self.options.short if seconds is None else seconds
        given = {"seconds": seconds, "wrong": share, "leaving": share}
        return self._phase(server, load_client.closed_loop(server.url, mix, self.keys[:clients], **given))

    def open(self, server, mix, rate):
        """A phase of requests that come at a rate; its summary."""
        loop = load_client.open_loop(server.url, mix, self.keys, rate, self.options.short)
        return {"rate": rate, **self._phase(server, loop)}

    def warm_up(self, server, mix):
        asyncio.run(load_client.closed_loop(server.url, mix, self.keys[:4], seconds=WARM_UP))

    def _phase(self, server, work):
        here, there = get_context("spawn").Pipe()
        health = get_context("spawn").Process(target=load_client.look_at_health, args=(server.url, there))
        health.start()
        began = time.monotonic()
        outcomes, memory = asyncio.run(_watched(work, server.memory))
        seconds = time.monotonic() - began
        here.send(None)
        asked = here.recv()
        health.join()
        return {
            **load_client.summary(outcomes, seconds),
            "health": {"requests": len(asked), "p99": load_client.quantile(asked, 0.99), "max": max(asked)},
            "memory": memory_of(memory),
        }


async def _watched(work, look):
    """(what work gives, what `look` gave every half a second meanwhile)."""
    found = []

    async def watch():
        while True:
            found.append(await asyncio.to_thread(look))
            await asyncio.sleep(SAMPLES)

    task = asyncio.create_task(watch())
    try:
        return await work, found
    finally:
        task.cancel()


def memory_of(samples):
    """Bytes of all processes: the median of the second quarter of samples and of the last, and the growth between, a share."""
    totals, quarter = [sum(one) for one in samples], max(1, len(samples) // 4)
    second, last = statistics.median(totals[quarter : 2 * quarter] or totals), statistics.median(totals[-quarter:])
    return {"second_quarter": second, "last_quarter": last, "growth": last / second - 1, "most": max(totals)}


def measure(bench):
    """All phases: dict of their summaries."""
    from tests.reward_cases import demo_judge

    mixes = {mode: load_mix.make(demo_judge(mode)) for mode in ("comparative", "isolated")}
    demo_judge().save_pretrained(bench.folder / "model")
    found, short = {}, bench.options.short
    with bench.yojo() as server:
        mix = mixes["comparative"]
        bench.warm_up(server, mix)
        found["one"] = _told("one at a time", bench.closed(server, mix, 1))
        found["many"] = _told(f"{CLIENTS} clients", bench.closed(server, mix))
        found["mixed"] = _told("mixed", bench.closed(server, mix, seconds=bench.options.seconds, share=SHARE))
        found["mixed"]["exit_code"] = server.end()
    capacity = found["many"]["requests_per_second"]
    tokens = statistics.mean(case.tokens for case in mix.cases)
    waiting = max(bench.options.max_tokens, round(QUEUE * capacity * tokens))
    with bench.yojo(max_waiting=waiting) as server:
        bench.warm_up(server, mix)
        for name, factor in (("below", 0.8), ("above", 2.0)):
            found[name] = {"factor": factor, "max_waiting": waiting, **bench.open(server, mix, factor * capacity)}
            _told(f"open loop at {factor} x {capacity:.1f}/s", found[name])
        found["above"]["exit_code"] = server.end()
    for name, start in (("isolated", lambda: bench.yojo("isolated")), ("plain", bench.plain)):
        with start() as server:
            bench.warm_up(server, mixes["isolated"])
            for clients in (1, CLIENTS):
                phase = f"{name}_{'one' if clients == 1 else 'many'}"
                found[phase] = _told(phase, bench.closed(server, mixes["isolated"], clients, short))
    return found


def _told(name, phase):
    latency = " ".join(
        f"{which} {1000 * value:.0f} ms" for which, value in phase["latency"].items() if value is not None
    )
    print(
        f"{name}: {phase['requests_per_second']:.1f} requests/s, {phase['responses_per_second']:.1f} responses/s, {latency}; "
        f"{phase['statuses']}, {phase['problems']} wrong; health at most {1000 * phase['health']['max']:.0f} ms; "
        f"memory {phase['memory']['growth']:+.1%}",
        flush=True,
    )
    return phase


def faults(phases):
    """What does not hold of a run's phases, as sentences; nothing of it is a matter of speed."""
    found = []
    for name, phase in phases.items():
        if phase["problems"]:
            found.append(f"{name}: {phase['problems']} wrong replies, such as {phase['first_problems'][0]}")
        found += [f"{name}: status {status}" for status in phase["statuses"] if status.startswith("5")]
        if phase.get("exit_code"):
            found.append(f"{name}: exit code {phase['exit_code']}")
    if phases["mixed"]["memory"]["growth"] > GROWTH:
        found.append(f"mixed: memory grew by {phases['mixed']['memory']['growth']:.1%}")
    if str(load_client.OVERLOADED) not in phases["above"]["statuses"]:
        found.append("above: nothing was turned away")
    return found


def main(arguments=None):
    """Measure, and append a result line; 1 where something does not hold."""
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of the mixed phase")
    parser.add_argument("--short", type=float, default=20.0, help="seconds of each of the others")
    parser.add_argument("--max-tokens", type=int, default=1024, help="tokens of a packed row")
    parser.add_argument(
        "--threads", type=int, help="of torch in servers (OMP_NUM_THREADS); their own choice by default"
    )
    parser.add_argument("--results", help="folder to append the result line to, in serving/cpu.jsonl")
    parser.add_argument("--commit", help="of the code, for the result line; by default what git says")
    parser.add_argument("--beside", help="what else ran on the machine, for the result line")
    options = parser.parse_args(arguments)
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if options.threads is not None:
        env["OMP_NUM_THREADS"] = str(options.threads)
    keys = [f"key-of-load-client-{number:02d}" for number in range(CLIENTS)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "keys").write_text("\n".join(keys))
        (path / "keys").chmod(0o600)
        phases = measure(Bench(options, path, keys, env))
    line = {
        "phases": phases,
        "clients": CLIENTS,
        "max_tokens": options.max_tokens,
        "threads": options.threads,
        "beside": options.beside,
        **provenance(options.commit),
    }
    if options.results:
        place = Path(options.results) / "serving"
        place.mkdir(parents=True, exist_ok=True)
        lines.append(place / "cpu.jsonl", line)
    broken = faults(phases)
    print("\n".join(broken) or "everything holds")
    return int(bool(broken))


def provenance(commit=None):
    """Processor, cores, versions, commit and date."""
    import importlib.metadata

    import torch

    from bench import conftest

    place = conftest.provenance(torch.device("cpu"), commit)
    versions = {name: importlib.metadata.version(name) for name in ("fastapi", "uvicorn", "torch", "transformers")}
    cpu = place["cpu"].rpartition(", ")[0]
    return {"cpu": cpu, "cores": os.cpu_count(), "commit": place["commit"], "date": place["date"], "versions": versions}


if __name__ == "__main__":
    sys.exit(main())
