"""No scoring pass waits for its device, but for what is listed here: each is in transformers' own vision towers."""

import collections

import pytest
import tiny
import torch
import transformers
from attention_cases import random_case
from family_cases import FAMILIES, gradients, parametrize_families, patched, rows_of, samples_of
from packaging.version import Version
from pretend import OnDevice, Pretend

from yojo.config import CHOICES
from yojo.patching import last_layer, versions
from yojo_kernels import Layout, multi_response_attention, tiles

IDEFICS = {
    ("index", "get_image_features"): 2,  # takes out images that are padding
    ("_local_scalar_dense", "_ignore_bidirectional_mask_sdpa"): 1,  # whether the mask of patches hides any
}
if Version(transformers.__version__) >= Version("5.21"):
    IDEFICS |= {("_to_copy", "get_image_features"): 1}  # how many images each prompt has
if Version(transformers.__version__) < Version("5.23"):
    IDEFICS |= {("index", "forward"): 1, ("index_put_", "forward"): 1}  # positions of the patches that are there
# family -> {(operation, function that asked): how often in a pass with images}
KNOWN = {
    "idefics3": IDEFICS,
    "smolvlm": IDEFICS,
    "llava_onevision": {("_to_copy", "pack_image_features"): 1},  # makes a list of lengths a tensor, and drops it
    "mistral3": {("_to_copy", "get_image_features"): 2},  # sizes of images to the device and back
    "molmo2": {
        ("index", "forward"): 1,  # the adapter leaves out tokens that pool nothing
        ("_local_scalar_dense", "_ignore_bidirectional_mask_sdpa"): 1,  # whether the mask of pooling hides any
    },
}

PLACED = versions.places_features()
NOT_PLACED = f"transformers {transformers.__version__} places image features itself, and waits (5.18 and later: never)"


@pytest.fixture()
def device():
    # Backward on the calling thread: the engine's threads for the pretended device do not end in peace.
    with torch.autograd.set_multithreading_enabled(False), Pretend() as device:
        yield device


def packed(collator, samples):
    """A ranked row; for the loss "soft" the ranks are targets."""
    encoded = []
    for prompt, responses in samples:
        count = len(responses)
        ranks = [1 / count] * count if collator.config.loss == "soft" else list(range(1, count + 1))
        encoded.append(collator.from_processed(prompt, responses, rankings=ranks))
    return arrived(collator.pack(encoded))


def arrived(batch):
    """The batch; a test of one with images is skipped where features cannot be placed."""
    if not PLACED and has_images(batch):
        pytest.skip(NOT_PLACED)
    return batch


def moved(batch, device):
    return {name: value.to(device.name) for name, value in batch.items()}


def has_images(batch):
    return any(name.startswith("pixel_values") for name in batch)


def known_waits(family, batch):
    return collections.Counter(KNOWN.get(family, {}) if has_images(batch) else {})


def seen_waits(device):
    """What was noted since, by operation and function."""
    seen = collections.Counter()
    for (operation, caller), count in device.waits.items():
        seen[operation, caller.split()[-1]] += count
    device.waits.clear()
    return seen


@pytest.mark.parametrize("train", [False, True])
@parametrize_families
def test_scores_and_loss(family, train, device):
    model, collator = patched(family, mode="isolated")
    model.train(train).to(device.name)
    names = list(samples_of(family))
    if not PLACED:  # rows of text alone wait for nothing, whatever the version
        names = [name for name in names if not has_images(samples_of(family)[name][0])]
        if not names:
            pytest.skip(NOT_PLACED)
    for row in [[name] for name in names] + (rows_of(family) if PLACED else [names]):
        batch = packed(collator, [samples_of(family)[name] for name in row])
        known = known_waits(family, batch)
        batch = moved(batch, device)
        device.waits.clear()
        with torch.set_grad_enabled(train):
            output = model(**batch)
        assert isinstance(output.scores, OnDevice) and isinstance(output.loss, OnDevice)
        assert seen_waits(device) <= known, row


@parametrize_families
def test_backward(family, device):
    model, collator = patched(family, mode="isolated")
    model.train().to(device.name)
    batch = moved(packed(collator, [samples_of(family)[name] for name in rows_of(family)[0][:3]]), device)
    loss = model(**batch).loss
    device.waits.clear()
    loss.backward()
    allowed = {"index_put"} if family == "molmo2" else set()  # of what its adapter takes out by a mask
    assert {operation for operation, _ in device.waits} <= allowed


@parametrize_families
def test_a_picture_that_stands_in_a_row_twice(family, device):
    """Its features go to several places, whose gradients come together again."""
    if not PLACED or "image" not in samples_of(family):
        pytest.skip("places no features of images")
    model, collator = patched(family, mode="isolated")
    model.train().to(device.name)
    batch = packed(collator, [samples_of(family)[name] for name in ("image", "two images", "image")])
    assert batch["placeholders"].shared is not None
    known = known_waits(family, batch)
    batch = moved(batch, device)
    device.waits.clear()
    loss = model(**batch).loss
    assert seen_waits(device) <= known
    loss.backward()
    allowed = {"index_put"} if family == "molmo2" else set()  # as in the backward above
    assert {operation for operation, _ in device.waits} <= allowed


@pytest.mark.parametrize("loss", ["best", "plackett_luce", "bradley_terry", "soft"])
@pytest.mark.parametrize("options", [{"mode": "isolated"}, {}, {"permutations": 3}])
def test_every_mode_and_loss(options, loss, device):
    model, collator = patched("qwen3_vl", loss=loss, **options)
    model.to(device.name)
    batch = moved(packed(collator, [samples_of("qwen3_vl")[name] for name in rows_of("qwen3_vl")[0]]), device)
    device.waits.clear()
    for share in (0, 1):  # the last layer for all rows, and for those that are read
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(last_layer, "LARGEST_SHARE", share)
            patch.setattr(last_layer, "FEWEST_FLOPS", 0)
            assert isinstance(model(**batch).loss, OnDevice)
    assert not device.waits


@pytest.mark.parametrize("pooling", CHOICES["pooling"])
def test_every_pooling(pooling, device):
    model, collator = patched("qwen3_vl", pooling=pooling, permutations=2)
    model.to(device.name)
    batch = moved(packed(collator, [samples_of("qwen3_vl")[name] for name in rows_of("qwen3_vl")[0]]), device)
    device.waits.clear()
    model(**batch).loss.backward()
    assert not device.waits


def test_under_checkpointing(device):
    model, collator = patched("qwen3_vl", mode="isolated")
    model.train().to(device.name)
    model.gradient_checkpointing_enable()
    batch = moved(packed(collator, [samples_of("qwen3_vl")["image and video"]]), device)
    device.waits.clear()
    gradients(model, batch)
    assert not device.waits


def test_what_a_trainer_leaves_on_the_cpu(device):
    """It moves tensors; layout, separators and placeholders are moved by the model, which does not wait for it."""
    model, collator = patched("qwen3_vl", mode="isolated")
    model.to(device.name)
    batch = packed(collator, [samples_of("qwen3_vl")["image"]])
    batch = {name: value.to(device.name) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    device.waits.clear()
    assert isinstance(model(**batch).loss, OnDevice)
    assert not device.waits


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("seed", range(6))
def test_tables_of_tiles(seed, window, device):
    layout = random_case(seed)["layout"].to(device.name)
    extremes = None
    device.waits.clear()
    if window:
        extremes = tiles.position_extremes._init_fn(layout.segment_offsets, layout.position)
    fields = layout.sample_offsets, layout.prompt_ends, layout.segment_offsets, layout.position, layout.block_span
    assert isinstance(tiles.query_tiles._init_fn(*fields, extremes, 4, 8, window), OnDevice)
    assert isinstance(tiles.key_tiles._init_fn(*fields, extremes, 4, 8, 2, 3, window)[0], OnDevice)
    assert not device.waits


def test_attention_of_some_rows(device):
    layout = random_case(1)["layout"].to(device.name)
    key = torch.randn(layout.num_tokens, 2, 8).to(device.name)
    rows = torch.tensor([0, 3]).to(device.name)
    device.waits.clear()
    multi_response_attention(key[:2], key, key, layout, query_rows=rows)
    assert not device.waits


def test_every_family_with_known_waits_has_them(device):
    """The table lists nothing that is gone."""
    for family, known in KNOWN.items():
        if family in tiny.LACKING:
            continue
        model, collator = patched(family)
        model.to(device.name)
        batch = moved(packed(collator, [samples_of(family)["image"]]), device)
        device.waits.clear()
        with torch.no_grad():
            model(**batch)
        assert seen_waits(device) == collections.Counter(known), family
    assert set(KNOWN) < set(FAMILIES)


# ---- the detector itself ----


def tensors(device):
    x = torch.arange(6.0).to(device.name)
    device.waits.clear()
    return x, x > 2, torch.tensor([0, 2])


WAITING = {
    "item": lambda x, mask, rows: x[0].item(),
    "bool": lambda x, mask, rows: bool(mask[0]),
    "tolist": lambda x, mask, rows: x.tolist(),
    "cpu": lambda x, mask, rows: x.cpu(),
    "mask": lambda x, mask, rows: x[mask],
    "mask assignment": lambda x, mask, rows: x.__setitem__(mask, x[:3].clone()),
    "nonzero": lambda x, mask, rows: mask.nonzero(),
    "where": lambda x, mask, rows: torch.where(mask),
    "masked_select": lambda x, mask, rows: x.masked_select(mask),
    "repeat_interleave": lambda x, mask, rows: x.repeat_interleave(mask.long()),
    "unique": lambda x, mask, rows: x.unique(),
    "equal": lambda x, mask, rows: torch.equal(x, x),
    "one_hot": lambda x, mask, rows: torch.nn.functional.one_hot(mask.long()),
    "a list": lambda x, mask, rows: torch.tensor([1, 2], device=x.device),
    "a copy": lambda x, mask, rows: rows.to(x.device),
    "copy_": lambda x, mask, rows: x[:2].copy_(torch.ones(2)),
    "back by copy_": lambda x, mask, rows: torch.ones(6).copy_(x),
    "rows on the CPU": lambda x, mask, rows: x[rows],
    "split": lambda x, mask, rows: x.split(mask.long().tolist()),
}
FREE = {
    "arithmetic": lambda x, mask, rows: (x * 2 + torch.tensor(1.0)).sum(),
    "masked_fill": lambda x, mask, rows: x.masked_fill(mask, 0.0),
    "masked_scatter": lambda x, mask, rows: x.masked_scatter(mask, x),
    "where": lambda x, mask, rows: torch.where(mask, x, 0.0),
    "rows": lambda x, mask, rows: x[mask.long()],
    "index_copy": lambda x, mask, rows: x.index_copy(0, mask[:1].long(), x[:1]),
    "repeat_interleave": lambda x, mask, rows: x.repeat_interleave(mask.long(), output_size=3),
    "repeat": lambda x, mask, rows: x.repeat_interleave(2),
    "a copy that does not block": lambda x, mask, rows: rows.to(x.device, non_blocking=True),
    "arange": lambda x, mask, rows: torch.arange(4, device=x.device) + x.new_zeros(4),
    "on the CPU": lambda x, mask, rows: (rows.tolist(), rows[rows > 0], rows.nonzero()),
    "in place": lambda x, mask, rows: x.clone().unsqueeze_(0).squeeze_(0).add_(1),
}


@pytest.mark.parametrize("name", WAITING)
def test_waits_are_noted(name, device):
    x, mask, rows = tensors(device)
    # split of six lengths fails when they do not add up; what came before is noted all the same
    try:
        WAITING[name](x, mask, rows)
    except RuntimeError:
        assert name == "split"
    assert device.waits and all("test_waits.py" in caller for _, caller in device.waits)


@pytest.mark.parametrize("name", FREE)
def test_nothing_else_is_noted(name, device):
    FREE[name](*tensors(device))
    assert not device.waits


def test_a_layout_waits_when_it_is_moved_and_not_when_it_need_not():
    row = Layout.build([5], [[3, 4]], bidirectional=[0] * 5 + [-1] * 7)
    for non_blocking in (True, False):
        with Pretend() as device:
            device.waits.clear()
            assert row.to(device.name, non_blocking=non_blocking).num_tokens == row.num_tokens
            assert bool(device.waits) != non_blocking


def test_devices_do_not_mix(device):
    x, _, rows = tensors(device)
    with pytest.raises(RuntimeError, match=r"tensors on pretend:0 and on the CPU in one operation"):
        x[:2] + rows
