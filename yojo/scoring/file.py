"""`score_file`: the scores of a whole file of candidates, exactly once per row, whatever happens meanwhile."""

import contextlib
import dataclasses
import os
import time

from yojo.data.records import Records
from yojo.judges.judge import fingerprint_of
from yojo.scoring.job import Job, check_place, folder_of, read_description
from yojo.scoring.run import Run, Summary
from yojo.scoring.scorer import Load, Scorer

_NOT_WRITTEN = (".json", ".csv", ".tsv", ".txt", ".arrow", ".gz", ".png")  # names of files, not of folders


def score_file(
    judge,
    data,
    out,
    *,
    shard=None,
    resume=True,
    workers=0,
    token_budget=8192,
    progress=False,
    parquet=False,
    device=None,
    devices=None,
    setup=None,
    ray=None,
    fingerprint=None,
    format="auto",
    columns=None,
    image_root=None,
    allow_urls=False,
    literal_tags=False,
    ignore_columns=(),
):
    """Score every record of a file, exactly once.

    Rows are scored as they come, and written at once: a run that ends early, however it does, is gone on with by the same
    call, on the same input or on one that has grown. A row is known by what the model sees of it, image bytes included.

    Args:
        judge: anything with `score_many` and `fingerprint` (`yojo.judges`), such as a `yojo.RewardModel`; or the name of one
            as `yojo.judges.load_judge` takes it, or a `yojo.scoring.scorer.Load`.
        data: .jsonl, .json or .parquet file, folder of such, list of these, list of dicts or `datasets.Dataset`, in any
            format that `yojo.data.load` reads; rankings are optional and not looked at.
        out: a folder, which gets a file of scores from every run, in the order in which they are made; or a file that ends
            with .jsonl or .parquet, in the order of the input, written when all rows are done (and a hidden folder beside it
            that the next run goes on with).
        shard: (number from 0, count): every count-th row, by a hash of its responses; `out` is a folder then.
        resume: go on with what is there; False: begin anew, and remove it, whichever shard has scored it.
        workers: processes that read, decode and tokenise while the model runs; see `RewardModel.score_many`. Per device.
        token_budget: of a packed row.
        progress: show a progress bar.
        parquet: files in a folder are Parquet, not JSONL.
        device: where a judge that is loaded here goes, such as "cuda:1".
        devices: list of such, or "all" CUDA devices: a process on each, with a shard of the shard; the judge is a name.
        setup: function that each of these processes calls first, or None.
        ray: address of a Ray cluster, "auto", "local" or `yojo.scoring.cluster.Ray`: an actor on every device of a Ray cluster; the judge is a name.
        fingerprint: dict of all that changes a score, for a judge that does not say so itself.
        format, columns, image_root, allow_urls, literal_tags, ignore_columns: as for `yojo.data.load`.

    Returns:
        `yojo.scoring.run.Summary`.

    Raises:
        DataError, ValueError, TypeError: a file that cannot be read, a bad argument, a folder or file that is another
            job's. What is wrong with single rows raises nothing: they are kept with their reason, and tried first next time.
        OSError: a full disk, say: what was written before is kept.
    """
    options = {
        "format": format,
        "columns": columns,
        "image_root": image_root,
        "allow_urls": allow_urls,
        "literal_tags": literal_tags,
        "ignore_columns": ignore_columns,
    }
    shard = checked_shard(shard)
    check_out(out, shard, workers, token_budget)
    _check_apart(out, data)
    load = Load(judge) if isinstance(judge, (str, os.PathLike)) else judge if isinstance(judge, Load) else None
    if (devices is not None or ray is not None) and load is None:
        raise TypeError(
            f"with devices or ray every process loads the judge: pass its name, got a {type(judge).__name__}"
        )
    for name, value in {"devices": devices, "ray": ray}.items():
        if value is not None and device is not None:
            raise ValueError(f"device={device!r} is given with {name}, which says itself where models go: leave it out")
        if value is not None and fingerprint is not None:
            raise ValueError(f"fingerprint is given with {name}: judges that are loaded by their names say their own")
    if devices is not None and ray is not None:
        raise ValueError("devices and ray are given: leave one of them out")
    if setup is not None and devices is None:
        raise ValueError("setup is for the processes of devices, and none are given")
    records = Records(data, ranked=False, **options)
    source = where_from(data, records, options)
    if isinstance(ray, str):
        from yojo.scoring.cluster import Ray

        ray = Ray(ray)
    if devices is not None:
        from yojo.scoring.devices import score_on_devices

        rest = {"resume": resume, "workers": workers, "token_budget": token_budget, "parquet": parquet, **options}
        parts = score_on_devices(score_file, load, data, out, devices, shard, progress, rest, setup)
        folder, file = folder_of(out)
        found = Summary.of(parts, file or folder)
        if file is None:
            return found
        return dataclasses.replace(found, stale=put_together(out, records).stale)
    with ray or contextlib.nullcontext():
        if ray is not None:
            fingerprint = ray.fingerprint(load)
        elif load is not None:
            judge = load(device)
        fingerprint = {"judge": fingerprint or fingerprint_of(judge), "reading": _reading(source)}
        job = Job(out, fingerprint, source, made(), shard, resume, parquet)
        run = Run(job, records, workers, progress)
        try:
            run.find_done()
            if ray is None:
                scorer = Scorer(judge, records, shard, job.job, token_budget, workers)
            else:
                scorer = ray.scorer(load, fingerprint["judge"], records, shard, job.job, token_budget, workers)
            run.score(scorer)
            return run.finish()
        finally:
            run.close()


def put_together(out, records):
    """Write the file of a job whose rows the processes of several devices have tried.

    Args:
        out: as for `score_file`.
        records: `Records`.

    Returns:
        `yojo.scoring.run.Summary`: all that have scores are kept ones.
    """
    folder, _ = folder_of(out)
    found = read_description(folder)
    run = Run(Job(out, found["fingerprint"], found["data"], found["made"]), records)
    try:
        run.find_done()
        return run.finish(is_tried=False)
    finally:
        run.close()


def checked_shard(shard):
    """(number, count) of a shard; (0, 1) for None."""
    if shard is None:
        return (0, 1)
    number, count = shard
    if not 0 <= number < count:
        raise ValueError(f"shard must be number/count with the number from 0 below the count, got {number}/{count}")
    return (number, count)


def check_out(out, shard=(0, 1), workers=0, token_budget=8192):
    """What is wrong with an output and can be said before anything is loaded."""
    folder, file = folder_of(out)
    check_place(folder, file)
    if file is not None and shard[1] > 1:
        raise ValueError(f"shards write into one folder: name a folder instead of {file} (--out FOLDER)")
    if file is None and not folder.exists() and folder.suffix.lower() in _NOT_WRITTEN:
        raise ValueError(f"{out}: scores are written as .jsonl or .parquet, or into a folder: name one of these")
    if workers < 0:
        raise ValueError(f"workers must be 0 or more, got {workers}")
    if token_budget < 1:
        raise ValueError(f"token_budget must be at least 1, got {token_budget}")


def _check_apart(out, data):
    """Scores that lie in a folder of candidates would be read as candidates by the next run."""
    for source in [data] if isinstance(data, (str, os.PathLike)) else data if _is_paths(data) else ():
        home, place = os.path.realpath(source), os.path.realpath(out)
        if os.path.isdir(home) and os.path.commonpath([home, place]) == home:
            raise ValueError(
                f"{out} lies in {source}, whose files are the input, and would be read as a part of it next time: name a place "
                "outside of it"
            )


def where_from(data, records, options):
    """Where records are and how they are read, as job.json has it."""
    paths = [data] if isinstance(data, (str, os.PathLike)) else list(data) if _is_paths(data) else None
    root = options["image_root"]
    return {
        "sources": None if paths is None else [os.path.abspath(path) for path in paths],
        "format": records.format,
        "columns": dict(options["columns"] or {}) or None,
        "image_root": None if root is None else os.path.abspath(root),
        "allow_urls": options["allow_urls"],
        "literal_tags": options["literal_tags"],
        "ignore_columns": sorted(set(options["ignore_columns"])),
    }


def _is_paths(data):
    return isinstance(data, (list, tuple)) and all(isinstance(item, (str, os.PathLike)) for item in data)


def _reading(source):
    """What of the reading decides what a row says."""
    return {name: source[name] for name in ("format", "columns", "literal_tags", "ignore_columns")}


def made():
    """Versions, machine and date: what is worth knowing of scores, and changes them by rounding at most."""
    import platform

    import torch
    import transformers

    from yojo import __version__

    return {
        "yojo": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
