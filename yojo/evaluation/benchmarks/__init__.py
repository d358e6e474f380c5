"""The reward benchmarks that `yojo eval` knows, one file each: `names`, `get`, `open_benchmark`, `download`."""

import difflib
from pathlib import Path

from yojo.evaluation.benchmarks import (
    judgebench,
    mm_rlhf,
    mmrb2,
    mr2bench,
    multimodal_rewardbench,
    preferences,
    rewardbench2,
    video_rewardbench,
    vl_rewardbench,
)

__all__ = ["download", "get", "names", "open_benchmark"]

_MODULES = (
    vl_rewardbench, multimodal_rewardbench, mm_rlhf, video_rewardbench, mr2bench, rewardbench2, judgebench, mmrb2,
    preferences,
)  # fmt: skip
_KNOWN = {benchmark.name: benchmark for module in _MODULES for benchmark in module.BENCHMARKS}


def names():
    """Names of the benchmarks, as `get` takes them.

    Returns:
        list of strings.
    """
    return list(_KNOWN)


def get(name):
    """A benchmark.

    Args:
        name: one of `names()`.

    Returns:
        `yojo.evaluation.benchmarks.benchmark.Benchmark`.

    Raises:
        ValueError: an unknown name; the message lists the known ones, and the nearest.
    """
    if isinstance(name, str) and name in _KNOWN:
        return _KNOWN[name]
    near = difflib.get_close_matches(str(name).lower().replace("_", "-").replace(" ", "-"), _KNOWN, 3, 0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    raise ValueError(f"there is no benchmark {name!r}{hint} Known: {', '.join(_KNOWN)}")


def open_benchmark(
    name, data, *, columns=None, image_root=None, allow_urls=False, skip_bad=False, partial=False, format="auto"
):
    """Open the data of a benchmark: every record is read once and checked, media are looked up when an item is read.

    Args:
        name: one of `names()`.
        data: path of a .jsonl, .json or .parquet file, or of a folder of such files; a list of paths; a list of dicts;
            or a `datasets.Dataset`.
        columns: dict, field of the benchmark -> column of the file; a dot reaches into an object. Needed where the layout
            of a benchmark is not confirmed.
        image_root: folder that relative paths of images and videos start from; the data file's own by default.
        allow_urls: fetch images given as URLs.
        skip_bad: leave out records that cannot be judged and list them in `Items.bad`.
        partial: let the number of items differ from the published one; `Items.missing` says where.
        format: of "preferences" only: a format of `yojo.data.load`.

    Returns:
        `yojo.evaluation.benchmarks.items.Items`.

    Raises:
        DataError: a file that is missing or broken, a record that cannot be judged (with file, line and reason), or
            counts that differ from the published ones.
        ColumnError: a column that is not there, or a column map that is needed.
        ValueError, TypeError: a bad argument.
    """
    benchmark = get(name)
    from yojo.evaluation.benchmarks.items import Items
    from yojo.evaluation.benchmarks.sources import FileSource, PreferenceSource

    if not isinstance(allow_urls, bool):
        raise TypeError(f"allow_urls must be a bool, got {allow_urls!r}")
    root = None if image_root is None else Path(image_root)
    if root is not None and not root.is_dir():
        raise ValueError(f"image_root is no folder: {root}")
    if name == "preferences":
        source = PreferenceSource(data, columns, root, allow_urls, format)
    elif format != "auto":
        raise ValueError(f"format is for preferences only: {name} has a layout of its own, got format={format!r}")
    else:
        source = FileSource(benchmark, data, columns, root, allow_urls)
    return Items(benchmark, source, skip_bad=skip_bad, partial=partial)


def download(name, folder, *, revision=None):
    """Download the data of a benchmark from the Hugging Face hub.

    Args:
        name: one of `names()`.
        folder: where to put it.
        revision: branch, tag or commit of the data set; None = its main branch.

    Returns:
        Path of the folder, as `open_benchmark` takes it.

    Raises:
        ValueError: an unknown name, or a benchmark that is not on the hub; the message says where it is.
        DataError: a data set that is gated, or that the hub does not have (any more).
    """
    benchmark = get(name)
    if benchmark.hub is None:
        raise ValueError(
            f"{benchmark.title} is not on the Hugging Face hub: give the path of its data. {benchmark.notes}"
        )
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    from yojo.data.readers import DataError

    page = f"https://huggingface.co/datasets/{benchmark.hub}"
    try:
        path = huggingface_hub.snapshot_download(
            benchmark.hub, repo_type="dataset", revision=revision, local_dir=Path(folder),
            allow_patterns=list(benchmark.patterns) or None,
        )  # fmt: skip
    except GatedRepoError as error:  # before RepositoryNotFoundError, of which it is one
        raise DataError(
            f"{benchmark.title} is gated: accept its conditions at {page}, then `hf auth login`", page
        ) from error
    except RevisionNotFoundError as error:
        raise DataError(f"{page} has no revision {revision!r}", page) from error
    except RepositoryNotFoundError as error:
        raise DataError(
            f"{page} is not there, or needs a login: `hf auth login`, or give the path of the data", page
        ) from error
    return Path(path)
