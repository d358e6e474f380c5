"""A report as one self-contained page: tables, plots, and the worst misses with their images."""

import base64
import io
import math
from pathlib import Path

from yojo.data.readers import DataError
from yojo.evaluation import plots, tables
from yojo.inputs.images import load_image
from yojo.inputs.messages import place
from yojo.judges.pictures import video_frames

TEMPLATE = "page.html"
LONG = 1500  # characters of a prompt or response that are shown at once
LISTED = 50  # items of a list of those refused or left out
IMAGES, PIXELS = 4, 420  # images of a miss, and frames of its video, that are shown; their longer side


def page(report, items=None):
    """The page, a string.

    Args:
        report: `yojo.evaluation.report.Report`.
        items: of `yojo.evaluation.benchmarks.open_benchmark`; None: misses without prompts, responses and images.
    """
    import jinja2
    import matplotlib

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # prompts and responses are anybody's
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pictures = [("Accuracy", _inline(plots.accuracy(report)))]
    by_group = plots.groups(report)
    if by_group is not None:
        pictures.append(("By group", _inline(by_group)))
    details = []
    for verdict in report.judges:
        own = []
        for title, found in (("Orders", verdict.order), ("Calibration", verdict.calibration)):
            if found is not None and found.items:
                file = io.BytesIO()
                with matplotlib.rc_context(plots.STYLE):
                    found.plot(file, "svg")
                own.append((title, _inline(file.getvalue())))
        details.append(
            {
                "name": verdict.name,
                "pictures": own,
                "order": [] if verdict.order is None else list(verdict.order.lines()),
                "misses": [_miss(*miss, items) for miss in verdict.misses],
                "refused": [(one.id, one.refused) for one in verdict.judged if one.refused is not None],
                "left_out": list(verdict.left_out),
            }
        )
    benchmark = report.benchmark
    return environment.get_template(TEMPLATE).render(
        title=benchmark["title"] or benchmark["name"],
        benchmark=benchmark,
        about=list(tables.about(report)),
        pictures=pictures,
        tables=tables.tables(report),
        judges=details,
        made=report.made,
        listed=LISTED,
        percent=tables.percent,
    )


def _inline(svg):
    """A picture as a data URL; in a page of its own no id of one meets another's."""
    data = svg.encode() if isinstance(svg, str) else svg
    return f"data:image/svg+xml;base64,{base64.b64encode(data).decode()}"


def _miss(one, margin, chosen, items):
    best = one.best
    found = {
        "number": one.number,
        "id": one.id,
        "group": one.group,
        "margin": margin,
        "prompt": None,
        "images": [],
        "more": 0,
        "note": None,
        "responses": [
            {
                "number": n,
                "rank": one.rankings[n],
                "score": one.mean[n],
                "is_best": bool(best[n]),
                "is_chosen": n == chosen,
                "text": None,
            }
            for n in sorted(range(len(one.rankings)), key=lambda n: -one.mean[n])
        ],
    }
    if items is None:
        return found
    try:
        example = items[one.number].example
        turns = place(example.prompt, example.images, example.videos, example.literal_tags)
    except (DataError, OSError, TypeError, ValueError) as error:  # it was there when it was scored
        return found | {"note": str(error)}
    found["prompt"], sources, videos = _prompt(turns)
    found["more"] = max(0, len(sources) - IMAGES)
    try:
        found["images"] = [_thumbnail(source) for source in sources[:IMAGES]]
        for source in videos[:1]:
            urls, _, _ = video_frames(source, "video", IMAGES)
            found["images"] += [_thumbnail(base64.b64decode(url.partition(",")[2])) for url in urls]
    except (ImportError, OSError, TypeError, ValueError) as error:
        found["note"] = str(error)
    if len(videos) > 1:
        found["note"] = f"of {len(videos)} videos the first is shown"
    for response in found["responses"]:
        response["text"] = _cut(example.responses[response["number"]])
    return found


def _prompt(turns):
    """(text of a prompt with the places of its media, sources of its images, and of its videos)."""
    texts, images, videos = [], [], []
    for turn in turns:
        parts = []
        for part in turn["content"]:
            if part["type"] == "text":
                parts.append(part["text"])
            elif part["type"] == "image":
                images.append(part["image"])
                parts.append(f"[image {len(images)}]")
            else:
                videos.append(part["video"])
                parts.append(f"[video {len(videos)}]")
        name = "" if len(turns) == 1 else f"{turn['role']}: "
        texts.append(name + " ".join(parts))
    return _cut("\n\n".join(texts)), images, videos


def _cut(text):
    """(what is shown, what is behind a click)."""
    return (text, "") if len(text) <= LONG else (text[:LONG], text[LONG:])


def _thumbnail(source):
    image = load_image(source, "image")
    scale = min(1.0, PIXELS / max(image.size))
    if scale < 1:
        image = image.resize([max(1, math.ceil(side * scale)) for side in image.size])
    elif max(image.size) < 96:
        image = image.resize([side * (96 // max(image.size)) for side in image.size], resample=0)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
