"""`yojo serve`: a reward model over HTTP."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from yojo.cli.quiet import be_quiet_here
from yojo.cli.shared import BaseModel, CheckBase, CheckFiles, errors


def serve(
    model: Annotated[
        str,
        typer.Option(
            help="Folder or hub name of a reward model (#isolated, #permutations=K behind it: in that mode); demo, the digits "
            "demonstration's."
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one, which the log names.")] = 8000,
    devices: Annotated[
        str | None,
        typer.Option(help="A scoring process on each: all, or a list such as cuda:0,cuda:1; one by default."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that decode and tokenise requests.")] = 2,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a packed row.")] = 8192,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="A longer prompt with its responses is refused; nothing is ever cut.")
    ] = None,
    max_waiting: Annotated[
        int | None, typer.Option(min=1, help="Tokens that may wait; beyond it requests get 429. 8 rows by default.")
    ] = None,
    deadline: Annotated[float, typer.Option(help="Seconds in which a request is answered, at most.")] = 60.0,
    linger: Annotated[float, typer.Option(help="Milliseconds that a row which is not full waits for company.")] = 0.0,
    grace: Annotated[float, typer.Option(help="Seconds to finish what was accepted, at the end.")] = 30.0,
    api_key_file: Annotated[
        Path | None, typer.Option(help="Keys that may ask, one a line (name:key); without it anybody may.")
    ] = None,
    image_root: Annotated[
        Path | None, typer.Option(help="Folder that images may be named in by relative path; none by default.")
    ] = None,
    allow_url: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST",
            help="A host that images may be fetched from (*.example.org, host:port; private:HOST for one in a private network); "
            "once per host.",
        ),
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(help="Under which the model is asked for; once per name. Its folder's by default."),
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(min=1, help="Samples that make a group, for /group and /get_reward.")
    ] = None,
    group_deadline: Annotated[float, typer.Option(help="Seconds from a group's first sample to its last.")] = 600.0,
    policy: Annotated[
        str | None,
        typer.Option(help="Folder or name of the policy's tokenizer, which reads OpenRLHF's texts (/get_reward)."),
    ] = None,
    eos: Annotated[
        list[str] | None, typer.Option(help="Text of a token that ends a response of OpenRLHF's; once per token.")
    ] = None,
    question: Annotated[
        str, typer.Option(help="How the judge learns OpenRLHF's question: template, label or text.")
    ] = "template",
    limit: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=N", help="What a request may hold, such as responses=64 or body=8388608; once per limit."
        ),
    ] = None,
    base_model: BaseModel = None,
    check_base: CheckBase = True,
    check_files: CheckFiles = True,
    dtype: Annotated[
        str | None, typer.Option(help="Of the model's weights, such as bfloat16; as saved by default.")
    ] = None,
    proxy: Annotated[
        str | None, typer.Option(help="Addresses of proxies whose X-Forwarded-For is believed, such as 10.0.0.1.")
    ] = None,
    certificate: Annotated[Path | None, typer.Option(help="PEM file, to speak https; with --private-key.")] = None,
    private_key: Annotated[Path | None, typer.Option(help="PEM file of the certificate's key.")] = None,
    log_text: Annotated[
        bool, typer.Option("--log-text", help="The log holds prompts and responses; by default no text of users.")
    ] = False,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="[ADDRESS]",
            help="Serve on a Ray cluster, a replica per GPU: host:port, auto, or (without an address) one that is started here.",
        ),
    ] = None,
    replicas: Annotated[
        str | None, typer.Option(help="With --ray: how many, or LEAST-MOST, which follows the load.")
    ] = None,
):
    """Serve a reward model: many clients, images, whole groups; the scores of `RewardModel.score`.

    Endpoints: /score, /rerank, /v1/score, /tei/rerank, /group, /get_reward, /v1/models, /health, /ready, /metrics, /docs; and a page
    at /. Exits with 0 after SIGTERM or Ctrl-C, once what was accepted is answered; with 1 where the model cannot be loaded, with 2
    when the command makes no sense.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    for noisy in ("uvicorn", "uvicorn.error", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    with errors():
        from yojo.judges.loading import check_device
        from yojo.scoring.devices import devices_of
        from yojo.serving.roles import model_of
        from yojo.serving.server import Address, read_keys, serve
        from yojo.serving.settings import Limits, Settings

        if (certificate is None) != (private_key is None):
            raise ValueError("--certificate and --private-key go together")
        served = model_of(
            model,
            max_length=max_length,
            base_model=base_model,
            check_base=check_base,
            check_files=check_files,
            dtype=dtype,
        )
        settings = Settings(
            names=tuple(name or [served.name]),
            token_budget=max_tokens,
            max_waiting=8 * max_tokens if max_waiting is None else max_waiting,
            deadline=deadline,
            linger=linger / 1000,
            grace=grace,
            group_size=group_size,
            group_deadline=group_deadline,
            keys={} if api_key_file is None else read_keys(api_key_file),
            image_root=None if image_root is None else str(image_root.absolute()),
            allow_hosts=tuple(allow_url or ()),
            log_text=log_text,
            limits=Limits(**_limits(limit or [])),
        )
        address = Address(host, port, proxy, certificate and str(certificate), private_key and str(private_key))
        read_by = _policy(policy, eos or [], question)
        if ray is not None:
            if devices is not None:
                raise ValueError("--ray places its replicas itself: leave --devices out")
            from yojo.serving.cluster import serve_on_ray

            code = serve_on_ray(served, settings, address, workers, read_by, ray, replicas)
        else:
            if replicas is not None:
                raise ValueError("--replicas is for --ray: here --devices says how many processes score")
            names = [None] if devices is None else devices_of(devices)
            for one in names:
                check_device(one)
            code = serve(served, settings, address, names, workers, read_by, be_quiet_here)
    raise typer.Exit(code)


def _limits(pairs):
    """dict of --limit options, NAME=N each."""
    import dataclasses

    from yojo.cli.shared import column_map
    from yojo.serving.settings import Limits

    known, found = {field.name for field in dataclasses.fields(Limits)}, {}
    for limit, text in column_map(pairs, "--limit").items():
        if limit not in known:
            raise ValueError(f"--limit must be one of {', '.join(sorted(known))}, got {limit!r}")
        try:
            found[limit] = float(text) if limit == "url_seconds" else int(text)
        except ValueError:
            raise ValueError(f"--limit {limit} must be a number, got {text!r}") from None
    return found


def _policy(policy, eos, question):
    """What reads OpenRLHF's texts; None where nothing is said of them."""
    if policy is None and not eos:
        return None
    from yojo.rewards.openrlhf import PROMPTS, policy_of
    from yojo.rewards.openrlhf_server import Queries

    if question not in PROMPTS:
        raise ValueError(f"--question must be one of {', '.join(PROMPTS)}, got {question!r}")
    processor, ends = policy_of(policy) if policy else (None, [])
    return Queries(processor, prompt=question, eos=[*ends, *eos])
