"""Files of candidates with images: how much of what the model alone can score a whole job scores, and what others do.

Each row has an image of its own of a million pixels, a PNG or a JPEG, and four responses. Measured in turns, so that a slow
minute of the machine is everybody's:

- the model alone, on rows that are packed already, and the preparation alone (read, decode, template, tokens), in one process;
- `yojo.score_file` with 0, 1 and 2 workers: at most as fast as the slower of the two, preparation times workers;
- a plain loop over transformers, a padded batch of N single passes for each row, and the same function in `datasets.map`.

Where there is no GPU the model has one core less than the machine, and pictures are shown to it smaller than they are.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import statistics
import time

import numpy
import pytest
import torch
from PIL import Image

import yojo
from bench import models
from yojo.demo.backbone import load_backbone

ROWS, N, SIDE = {False: 144, True: 3}, 4, 1024  # with --quick or without
FEW = 24  # rows of the ways that take several times as long
ROUNDS = {False: 3, True: 1}
SHOWN = {"cpu": 256, "cuda": 1024}  # pixels along a side, as the model sees them
BUDGET = {"cpu": 1024, "cuda": 8192}  # tokens of a packed row
WORKERS = (0, 1, 2)


@dataclasses.dataclass
class Scene:
    """One job and everything that is timed on it."""

    folder: object
    rows: int
    device: torch.device
    reward_model: object
    processor: object

    @property
    def file(self):
        return self.folder / "candidates.jsonl"

    def examples(self):
        return yojo.data.load(self.file, ranked=False)

    def model_alone(self):
        """The passes over rows that are encoded beforehand, packed as the job packs them."""
        encoded = [self.reward_model.collator.encode(example) for example in self.examples()]
        return self.timed(lambda: list(self.reward_model.score_encoded(encoded, BUDGET[self.device.type])))

    def preparation_alone(self):
        records, encode = self.examples(), self.reward_model.collator.encode
        return self.timed(lambda: [encode(records[n]) for n in range(self.rows)])

    def job(self, workers):
        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        options = {"workers": workers, "token_budget": BUDGET[self.device.type], "fingerprint": {"bench": 1}}
        call = lambda: yojo.score_file(self.reward_model, self.file, out, **options)  # noqa: E731
        seconds = self.timed(call)
        (part,) = out.glob("scores-*")
        assert len(part.read_text().splitlines()) == self.rows
        return seconds

    def single_passes(self, record):
        """Scores of a row as a script without YOJO makes them: the responses as a padded batch of conversations."""
        model, processor = self.reward_model.model, self.processor
        texts = [
            processor.apply_chat_template(
                [
                    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": record["prompt"]}]},
                    {"role": "assistant", "content": [{"type": "text", "text": response}]},
                ],
                tokenize=False,
            )
            for response in record["responses"]
        ]
        with Image.open(self.folder / record["image"]) as image:
            image = image.convert("RGB")
        inputs = processor(text=texts, images=[[image]] * len(texts), padding=True, return_tensors="pt").to(self.device)
        with torch.inference_mode():
            hidden = model.model(**inputs, use_cache=False).last_hidden_state
        last = inputs["attention_mask"].sum(1) - 1
        return hidden[torch.arange(len(texts)), last].float().mean(-1).tolist()

    def transformers_loop(self):
        def loop():
            with open(self.file) as file:
                return [self.single_passes(json.loads(line)) for line in itertools.islice(file, FEW)]

        return self.timed(loop)

    def datasets_map(self):
        import datasets

        data = datasets.load_dataset(
            "json", data_files=str(self.file), split="train", cache_dir=str(self.folder / "cache")
        )
        data = data.select(range(min(FEW, self.rows)))
        score = lambda record: {"scores": self.single_passes(record)}  # noqa: E731
        return self.timed(lambda: data.map(score, load_from_cache_file=False))

    def timed(self, call):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start


def write_candidates(folder, rows):
    """Images as cameras make them as far as their size in bytes goes: noise of several scales."""
    rng, records = numpy.random.default_rng(0), []
    for n in range(rows):
        coarse = Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype="uint8")).resize((SIDE, SIDE), Image.BICUBIC)
        fine = rng.integers(-4, 5, (SIDE, SIDE, 3))
        image = Image.fromarray((numpy.asarray(coarse) + fine).clip(0, 255).astype("uint8"))
        name = f"{n}.{'png' if n % 2 else 'jpg'}"
        image.save(folder / name, **({} if n % 2 else {"quality": 92}))
        responses = [f"it is a {'very ' * (k + n % 3)}good picture of a {k}" for k in range(N)]
        records.append({"prompt": "what is shown in the picture ?", "responses": responses, "image": name})
    (folder / "candidates.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def scene(request, device, tmp_path_factory):
    rows, folder = ROWS[request.config.getoption("--quick")], tmp_path_factory.mktemp("pipeline")
    write_candidates(folder, rows)
    _, processor = load_backbone()
    shape = models.SHAPES[device.type][next(iter(models.SHAPES[device.type]))]
    tokenizer, image = processor.tokenizer, processor.image_processor
    words = {
        "image": "<|image_pad|>",
        "video": "<|video_pad|>",
        "vision_start": "<|vision_start|>",
        "vision_end": "<|vision_end|>",
    }
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(word) for name, word in words.items()}
    shape = dataclasses.replace(shape, config=shape.config | ids)
    image.patch_size = shape.config["vision_config"]["patch_size"]
    image.size = type(image.size)(shortest_edge=64**2, longest_edge=SHOWN[device.type] ** 2)
    tokenizer.padding_side, tokenizer.model_max_length = "right", 10**6
    model = yojo.patch(models.build(shape, device), processor, mode="isolated")
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))
    yield Scene(folder, rows, device, yojo.RewardModel(model, processor), processor)
    torch.set_num_threads(threads)


def test_pipeline(benchmark, request, record, scene, device):
    """Every way in turns; a result line for each, and the shares in the summary."""
    ways = {
        "model alone": scene.model_alone,
        "preparation alone": scene.preparation_alone,
        **{f"score_file, {workers} workers": lambda w=workers: scene.job(w) for workers in WORKERS},
        "transformers loop": scene.transformers_loop,
        "datasets.map": scene.datasets_map,
    }
    with contextlib.redirect_stderr(open(os.devnull, "w")):
        for way in ways.values():  # warm, and seen to work
            way()
        found = {name: [] for name in ways}
        for _ in range(ROUNDS[request.config.getoption("--quick")]):
            for name, way in ways.items():
                found[name].append(way())
        benchmark.pedantic(lambda: scene.job(1), rounds=1)
    medians = {name: statistics.median(times) for name, times in found.items()}
    for name, times in found.items():
        is_peer = name in ("transformers loop", "datasets.map")
        rows = min(FEW, scene.rows) if is_peer else scene.rows
        record(
            bench="pipeline",
            variant="single_batch" if is_peer else "yojo_isolated",
            impl=name,
            model=next(iter(models.SHAPES[device.type])),
            dtype=str(scene.reward_model.model.dtype).removeprefix("torch."),
            samples=rows,
            prompt="image",
            responses=rows * N,
            seconds=medians[name],
            seconds_all=times,
        )
    print()
    for workers in WORKERS:
        alone, preparation = medians["model alone"], medians["preparation alone"]
        least = max(alone, preparation / workers) if workers else alone + preparation
        share = least / medians[f"score_file, {workers} workers"]
        print(
            f"{workers} workers: {share:.3f} of what model and preparation allow ({least / scene.rows * 1e3:.0f} ms a row)"
        )
    for name in ("transformers loop", "datasets.map"):
        times = medians[name] / min(FEW, scene.rows) / (medians["score_file, 1 workers"] / scene.rows)
        print(f"{name}: {times:.2f} times as long as score_file with 1 worker")
