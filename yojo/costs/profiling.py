"""Where the time of one scoring pass goes, part by part, beside its FLOPs and what the device can do."""

import contextlib
import dataclasses
import functools
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from yojo import __version__
from yojo.costs.flops import batch_flops
from yojo.costs.trace import PREFIX, seconds_by_part
from yojo.families import TOKEN_TYPES
from yojo.files.saved import CONFIG_FILE, local_folder
from yojo.inputs.example import Example
from yojo.inputs.packing import Collator
from yojo.inputs.processors import load_processor
from yojo.inputs.prompts import PromptEncoder
from yojo.patching import decoders, recorded
from yojo.patching.patch import patch
from yojo.patching.state import is_patched, unwrap
from yojo.reward_model import RewardModel

# Part -> how tables and pictures call it, in the order they show it.
PARTS = {
    "vision": "vision",
    "attention": "attention",
    "projections": "projections (q, k, v, o)",
    "mlp": "MLP",
    "norms": "norms, rotary, residuals",
    "head": "value head",
    "gaps": "launch gaps",
    "other": "other",
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SECONDS = 2.0  # passes are timed for about this long
FEWEST, MOST = 3, 30
TRACED = 3  # passes under torch's profiler, after a first one that is dropped


# ---- the result ----


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of the pass.

    Attributes:
        name: key of `PARTS`.
        seconds: of one pass.
        flops: of one pass, or None where no matrix product is counted.
    """

    name: str
    seconds: float
    flops: int | None


@dataclasses.dataclass(frozen=True)
class Profile:
    """Where the time of one scoring pass goes.

    Attributes:
        parts: one `Part` for each of `PARTS`; their seconds sum up to `seconds`.
        seconds: median wall-clock time of a pass, tokenising and image preparation left out.
        peak: FLOP/s of a large matrix product on this device.
        peak_dtype: the dtype of that product.
        single_flops: FLOPs of one stock pass per response, which this pass replaces.
        setting: what was run: model, mode, tokens, device, versions, ...
        notes: what a reader must know about the figures.
    """

    parts: tuple[Part, ...]
    seconds: float
    peak: float
    peak_dtype: str
    single_flops: int
    setting: dict
    notes: tuple[str, ...] = ()

    @property
    def flops(self):
        """Of the whole pass."""
        return sum(part.flops or 0 for part in self.parts)

    def to_dict(self):
        """Plain numbers and strings, ready for JSON."""
        return {
            "seconds": self.seconds,
            "flops": self.flops,
            "flops_per_second": self.flops / self.seconds,
            "share_of_peak": self.flops / self.seconds / self.peak,
            "peak_flops_per_second": self.peak,
            "peak_dtype": self.peak_dtype,
            "single_passes_flops": self.single_flops,
            "parts": [
                {
                    "part": part.name,
                    "seconds": part.seconds,
                    "share": part.seconds / self.seconds,
                    "flops": part.flops,
                    "flops_per_second": _rate(part),
                    "share_of_peak": None if _rate(part) is None else _rate(part) / self.peak,
                }
                for part in self.parts
            ],
            **self.setting,
            "notes": list(self.notes),
        }


def _rate(part):
    return part.flops / part.seconds if part.flops and part.seconds > 0 else None


# ---- models and batches ----


def load(path, *, mode=None, device="cpu", dtype=None, processor=False):
    """A patched model to profile, from whatever a folder holds.

    Args:
        path: a folder that `yojo.RewardModel.save_pretrained` wrote; a folder (or hub name) of a Hugging Face model,
            which gets a random value head; a folder with a `config.json` and no weights, which gets random weights;
            or a `yojo.RewardModel`, which is moved, cast and given the mode in place.
        mode: "comparative" or "isolated"; the reward model's own, or "comparative", by default.
        device: where the model goes.
        dtype: torch dtype of the backbone.
        processor: whether to load the processor, too, which images need.

    Returns:
        (patched model in eval mode, processor or None, list of notes).

    Raises:
        ValueError: a folder that holds none of these.
    """
    notes = []
    if isinstance(path, RewardModel) or (Path(path) / CONFIG_FILE).is_file():
        if isinstance(path, RewardModel):
            reward_model = path
            reward_model.model.to(device)
            unwrap(reward_model.model).base_model.to(dtype)
        else:
            reward_model = RewardModel.from_pretrained(path, device=device, dtype=dtype)
        model, found = reward_model.model, reward_model.processor
        if mode is not None and mode != reward_model.config.mode:
            base = unwrap(model)
            notes.append(f"the reward model was trained in {reward_model.config.mode} mode")
            base.yojo.config = dataclasses.replace(base.yojo.config, mode=mode, permutations=1)
        return model.eval(), found, notes
    path = local_folder(path)
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} is neither a reward model ({CONFIG_FILE}) nor a model (config.json)")
    model = _plain_model(path, device, dtype, notes)
    found = None
    if processor:
        found = load_processor(path)
    mode = mode or (getattr(model.config, "yojo", None) or {}).get("mode", "comparative")
    recorded.forget(model)
    patch(model, found, mode=mode)
    notes.append("the value head is random: its scores mean nothing, its speed does")
    return model.to(device).eval(), found, notes


def _plain_model(path, device, dtype, notes):
    import transformers

    config = transformers.AutoConfig.from_pretrained(path)
    architecture = next(iter(getattr(config, "architectures", None) or []), "")
    cls = getattr(transformers, architecture, None)
    if cls is None or "ForConditionalGeneration" not in architecture and "ForCausalLM" not in architecture:
        images = type(config) in transformers.AutoModelForImageTextToText._model_mapping
        cls = transformers.AutoModelForImageTextToText if images else transformers.AutoModelForCausalLM
    if not any(next(path.glob(f"*.{ending}"), None) for ending in ("safetensors", "bin")):
        notes.append("the folder holds no weights: they are random, at the sizes of its config.json")
        make = cls.from_config if hasattr(cls, "from_config") else cls._from_config
        with torch.device(device):
            return make(config, dtype=dtype)
    return cls.from_pretrained(path, dtype=dtype)


class IdsOnly:
    """Stands in for a tokenizer where ids come in and no text does."""

    def __init__(self, config, vocabulary):
        self.ids = {config.separator: vocabulary - 1}

    def get_vocab(self):
        return self.ids


def make_batch(model, prompt_tokens, response_tokens, *, processor=None, images=(), seed=0):
    """A batch of one example of the given sizes, of random tokens.

    Args:
        model: a patched model.
        prompt_tokens: P >= 1, tokens of the prompt, image tokens among them.
        response_tokens: N ints, tokens of each response; the separator behind each is added.
        processor: the model's processor; needed for images alone.
        images: (height, width) in pixels of each image.
        seed: of the tokens and pixels.

    Returns:
        dict as `yojo.Collator` returns it, on the CPU.

    Raises:
        ValueError: images without a processor that takes them, or that take more tokens than the prompt has.
    """
    base = unwrap(model)
    vocabulary = base.get_input_embeddings().weight.shape[0]
    tokenizer = IdsOnly(base.yojo.config, vocabulary) if processor is None else processor
    collator = Collator(tokenizer, model)
    generator = torch.Generator().manual_seed(seed)
    usable = torch.tensor(sorted(set(range(vocabulary)) - collator.forbidden))

    def words(count):
        return usable[torch.randint(len(usable), (count,), generator=generator)]

    if not images:
        prompt = {"input_ids": words(prompt_tokens)[None]}
    else:
        prompt = _with_images(collator, prompt_tokens, images, words, generator)
    return collator.pack([collator.from_processed(prompt, [words(count).tolist() for count in response_tokens])])


def _with_images(collator, prompt_tokens, images, words, generator):
    """A processed prompt of random images, filled up with words behind them."""
    from PIL import Image

    if collator.processor is collator.tokenizer:
        raise ValueError("images need the model's processor, and the folder has none that takes images")
    pictures = [
        Image.fromarray(torch.randint(256, (*size, 3), dtype=torch.uint8, generator=generator).numpy())
        for size in images
    ]
    example = Example("?", ["?"], images=pictures)
    prompt = PromptEncoder(collator.processor, collator.tokenizer, "the prompt")(example)
    taken = prompt["input_ids"].shape[1]
    if taken > prompt_tokens:
        raise ValueError(
            f"a prompt with {len(images)} images of this size takes {taken} tokens at least, more than the "
            f"{prompt_tokens} asked for"
        )
    more = prompt_tokens - taken
    prompt["input_ids"] = torch.cat([prompt["input_ids"], words(more)[None]], dim=1)
    for name in (*TOKEN_TYPES, "attention_mask"):
        if name in prompt:
            filling = prompt[name].new_full((1, more), int(name == "attention_mask"))
            prompt[name] = torch.cat([prompt[name], filling], dim=1)
    return prompt


# ---- measuring ----


def profile_pass(model, batch, *, setting=None, notes=()):
    """Measure one scoring pass.

    Layers that torch.compile fuses, or CUDA graphs replay, have no parts to tell apart: they run unfused and launched
    one by one here, and a note says so.

    The pass is timed without the profiler. Then a few passes run under torch's profiler, with a range around every
    part of the model: on a GPU a part's time is that of the kernels launched in its ranges, and what the GPU was idle
    is `gaps`; on a CPU it is the time spent in its ranges and in no inner one, scaled to the time of a pass without the
    profiler.

    Args:
        model: a patched model, on one device.
        batch: what `yojo.Collator` returns.
        setting: dict that goes into `Profile.setting`.
        notes: strings that go into `Profile.notes`.

    Returns:
        `Profile`.

    Raises:
        ValueError: a model that is not patched, or on a device that is neither a CPU nor a CUDA GPU.
    """
    base = unwrap(model)
    if not is_patched(base):
        raise ValueError("profile_pass needs a patched model: call yojo.patch(model, processor) first")
    device = next(base.parameters()).device
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"only passes on a CPU or a CUDA GPU can be profiled, the model is on {device}")
    batch = {name: value.to(device) for name, value in batch.items() if name != "rankings"}
    call = functools.partial(_score, model, batch)
    before, notes = (base.yojo.fuse, base.yojo.graphs), list(notes)
    fuse = "none" if base.yojo.fusion.choose(device)[0] == "compile" else before[0]
    if (fuse, 0) != before:
        notes.append(
            f"the model is patched with fuse={before[0]!r}, graphs={before[1]}; its layers ran with fuse={fuse!r}, graphs=0"
        )
    patch(base, fuse=fuse, graphs=0)
    try:
        seconds = _median_seconds(call, device)
        spent = attribute(_traced_seconds(call, base, device), seconds, on_gpu=device.type == "cuda")
    finally:
        patch(base, fuse=before[0], graphs=before[1])
    flops = batch_flops(model, batch).to_dict()
    peak, peak_dtype = matmul_peak(device)
    parts = tuple(Part(part, spent.get(part, 0.0), flops.get(part)) for part in PARTS)
    return Profile(
        parts=parts,
        seconds=seconds,
        peak=peak,
        peak_dtype=peak_dtype,
        single_flops=batch_flops(model, batch, single=True).total,
        setting=dict(setting or {}) | _where(base, batch, device),
        notes=tuple(notes),
    )


def attribute(traced, seconds, *, on_gpu):
    """Make seconds by part, traced, into those of a pass that takes so many seconds untraced: dict, summing up to it."""
    busy = sum(traced.values())
    if on_gpu and busy < seconds:
        return traced | {"gaps": seconds - busy}
    return {part: value * seconds / busy for part, value in traced.items()}


@torch.inference_mode()
def _score(model, batch):
    return model(**batch).scores


def _where(base, batch, device):
    import transformers

    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"threads: {threads}"
    return {
        "mode": base.yojo.config.mode,
        "tokens": batch["layout"].num_tokens,
        "device": f"{device} ({name})",
        "dtype": str(base.dtype).removeprefix("torch."),
        "yojo": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def _timed(call, device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _median_seconds(call, device):
    """Wall-clock seconds of a call, after warm-up: compiling kernels, filling caches."""
    call()
    estimate = _timed(call, device)
    rounds = int(min(MOST, max(FEWEST, SECONDS / estimate)))
    return statistics.median(_timed(call, device) for _ in range(rounds))


def matmul_peak(device):
    """(FLOP/s, dtype name) of a large matrix product: bfloat16 on a GPU, float32 and smaller on a CPU."""
    size, dtype, calls = (8192, torch.bfloat16, 10) if device.type == "cuda" else (1024, torch.float32, 1)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def product():
        for _ in range(calls):  # back to back, so that launching them is hidden
            a @ b

    product()
    seconds = min(_timed(product, device) for _ in range(10)) / calls
    return 2 * size**3 / seconds, str(dtype).removeprefix("torch.")


# ---- ranges around the parts of a model ----


def modules_of_parts(base):
    """(part, module) of everything whose call is a range of its own; the innermost range counts.

    What a decoder layer does outside of its attention's projections, its attention and its feed-forward layer is
    "norms": norms, rotary embeddings, residual additions.
    """
    decoder = base.get_decoder()
    found = [("vision", module) for module in _outside(base.base_model, decoder)]
    attention = set(decoders.attention_modules(base))
    for layer in decoder.modules():
        own = [child for child in layer.children() if child in attention]
        if not own:
            continue
        found.append(("norms", layer))
        for child in layer.children():
            if child in attention:
                found += [("projections", linear) for linear in child.children() if hasattr(linear, "in_features")]
            elif any(parameter.ndim > 1 for parameter in child.parameters()):
                found.append(("mlp", child))
    for child in decoder.children():
        if any(word in type(child).__name__ for word in ("Norm", "Rotary")):
            found.append(("norms", child))
    return [*found, ("head", base.score)]


def _outside(module, decoder):
    """The largest modules with weights that hold no part of the decoder."""
    if module is decoder:
        return
    for child in module.children():
        if any(inner is decoder for inner in child.modules()):
            yield from _outside(child, decoder)
        elif next(child.parameters(), None) is not None:
            yield child


class _Range:
    """A profiler range, opened before a module's forward and closed behind it."""

    def __init__(self, part):
        self.name = PREFIX + part
        self.open = []

    def enter(self, module, arguments):
        self.open.append(record_function(self.name))
        self.open[-1].__enter__()

    def leave(self, module, arguments, output):
        self.open.pop().__exit__(None, None, None)


@contextlib.contextmanager
def ranges(base):
    """While open, every part of a patched model runs in a profiler range of its name."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = decoders.attention_modules(base)[0].config._attn_implementation
    attend = ALL_ATTENTION_FUNCTIONS[name]

    def attend_in_range(*arguments, **keywords):
        with record_function(PREFIX + "attention"):
            return attend(*arguments, **keywords)

    handles = []
    ALL_ATTENTION_FUNCTIONS[name] = attend_in_range  # laid over the registered one, until it is deleted
    try:
        for part, module in modules_of_parts(base):
            around = _Range(part)
            handles.append(module.register_forward_pre_hook(around.enter))
            handles.append(module.register_forward_hook(around.leave, always_call=True))
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
        for handle in handles:
            handle.remove()


def _traced_seconds(call, base, device):
    """Seconds of one pass by part, a mean over `TRACED` passes."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with ranges(base), tempfile.TemporaryDirectory() as folder:
        with profile(activities=activities) as profiler:
            for _ in range(1 + TRACED):  # the first one starts the profiler's own machinery
                with record_function(PREFIX + "other"):
                    call()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    total = seconds_by_part(events, on_gpu=device.type == "cuda", skip=1)
    return {part: value / TRACED for part, value in total.items()}


# ---- showing ----


def table(result, plain=False):
    """The profile as a rich table, of ASCII characters alone where it is to be plain."""
    from rich import box
    from rich.table import Table

    title = f"One pass of {result.setting['tokens']} tokens: {result.seconds * 1e3:.3g} ms"
    shown = Table(title=title, box=box.ASCII if plain else box.ROUNDED)
    shown.add_column("part")
    for name in ("ms", "share", "FLOPs", "FLOP/s", "of peak"):
        shown.add_column(name, justify="right")
    for part in (part for part in result.parts if part.seconds > 0):
        rate = _rate(part)
        shown.add_row(
            PARTS[part.name],
            f"{part.seconds * 1e3:.3f}",
            f"{part.seconds / result.seconds:.1%}",
            _scaled(part.flops),
            _scaled(rate),
            "" if rate is None else f"{rate / result.peak:.1%}",
        )
    shown.add_section()
    rate = result.flops / result.seconds
    shown.add_row(
        "whole pass",
        f"{result.seconds * 1e3:.3f}",
        f"{1:.1%}",
        _scaled(result.flops),
        _scaled(rate),
        f"{rate / result.peak:.1%}",
    )
    return shown


def _scaled(value):
    if not value:
        return ""
    for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.3g}"


def draw(result, path):
    """Draw the profile as bars.

    Args:
        result: `Profile`.
        path: picture file; its ending says the format (.png, .svg, ...).

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the picture needs matplotlib: pip install 'yojo[demo]'") from error

    parts = [part for part in result.parts if part.seconds > 0]
    figure = Figure(figsize=(9, 1.6 + 0.42 * len(parts)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    longest = max(part.seconds for part in parts) * 1e3
    for place, part in enumerate(parts):
        width, rate = part.seconds * 1e3, _rate(part)
        colour = "#54aeff" if part.flops else "#8c959f" if part.name != "gaps" else "#f0883e"
        axis.barh(place, width, height=0.66, color=colour)
        label = f"{width:.3g} ms, {part.seconds / result.seconds:.0%}"
        if rate is not None:
            label += f", {_scaled(rate)}FLOP/s ({rate / result.peak:.0%} of peak)"
        axis.text(width + longest * 0.01, place, label, va="center", fontsize=9)
    axis.set_yticks(range(len(parts)), [PARTS[part.name] for part in parts], fontsize=10)
    axis.invert_yaxis()
    axis.set_xlim(0, longest * 1.8)
    axis.set_xlabel("milliseconds")
    axis.spines[["top", "right"]].set_visible(False)
    setting, rate = result.setting, result.flops / result.seconds
    axis.set_title(
        f"{setting.get('model', 'model')}, {setting['mode']}: one pass of {setting['tokens']} tokens in "
        f"{result.seconds * 1e3:.3g} ms\n{_scaled(rate)}FLOP/s, {rate / result.peak:.0%} of the measured "
        f"{result.peak_dtype} peak of {_scaled(result.peak)}FLOP/s, {setting['device']}",
        fontsize=10,
        loc="left",
    )
    figure.savefig(path, dpi=110)
