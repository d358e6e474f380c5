"""`yojo score`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from yojo.cli.shared import BaseModel, CheckBase, CheckFiles, errors


def score(
    prompt: Annotated[str, typer.Option(help="What is asked.")],
    response: Annotated[list[str], typer.Option(help="A candidate response; give it once per candidate.")],
    files: Annotated[list[Path] | None, typer.Argument(metavar="[IMAGE]...", help="Image files, if any.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="An image file, behind those; once per image.")] = None,
    video: Annotated[
        list[Path] | None, typer.Option(help="A video file, or a folder of frames; once per video.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub name of a reward model; the digits demonstration's by default.")
    ] = None,
    base_model: BaseModel = None,
    check_base: CheckBase = True,
    check_files: CheckFiles = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
):
    """Score responses to a prompt, about images or videos or neither; higher is better."""
    import yojo

    images, videos = [*(files or ()), *(image or ())], list(video or ())
    with errors():
        for file in (*images, *videos):
            if not (file.is_file() or (file in videos and file.is_dir())):
                raise ValueError(f"no such file: {file}")
        example = yojo.Example(prompt, response, images=images, videos=videos)
        if model is None:
            if base_model is not None:
                raise ValueError("--base-model is given without --model: the demonstration's model has its own")
            if len(images) != 1 or videos:
                raise ValueError(
                    "without --model the digits demonstration's model scores, which wants one image of a digit: give an "
                    "IMAGE, or --model FOLDER for a model of yours"
                )
            from yojo.demo.reward import load_reward_model

            reward_model = load_reward_model()
        else:
            reward_model = yojo.RewardModel.from_pretrained(
                model, base_model=base_model, check_base=check_base, check_files=check_files
            )
        scores = reward_model.score_many([example])[0].tolist()
    if as_json:
        rows = [{"response": text, "score": value} for text, value in zip(response, scores, strict=True)]
        media = {"image": str(images[0])} if len(images) == 1 else {}
        media |= {"images": [str(file) for file in images], "videos": [str(file) for file in videos]}
        typer.echo(json.dumps({"prompt": prompt, **media, "mode": reward_model.config.mode, "scores": rows}))
        return
    for text, value in sorted(zip(response, scores, strict=True), key=lambda pair: -pair[1]):
        typer.echo(f"{value:+.4f}  {text}")
