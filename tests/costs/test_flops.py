"""Counted FLOPs against torch's FlopCounterMode, for every family, kind of prompt and way to score."""

import pytest
import tiny
import torch
import transformers
from family_cases import continued, parametrize_families, patched, rows_of, samples_of
from torch.utils.flop_counter import FlopCounterMode

import yojo
from yojo.costs.flops import Flops, batch_flops, scoring_flops
from yojo.families.family import PIXELS
from yojo.patching import last_layer
from yojo_kernels import Layout
from yojo_kernels.layout import count_visible

WAYS = [{"mode": "comparative"}, {"mode": "isolated"}, {"mode": "comparative", "permutations": 2}]
EXACT = 1e-3  # equal to the last one with transformers 5.23; earlier ones make rotary frequencies by a matrix product


# torch counts the matrix products of the reference, of all pairs of a sample.
pytestmark = pytest.mark.usefixtures("reference_attention")


@pytest.fixture(autouse=True)
def however_little_it_saves(monkeypatch):
    """The layers of these tests are narrow."""
    monkeypatch.setattr(last_layer, "FEWEST_FLOPS", 0)


def counted(call):
    """What torch counts, in total.

    Models are built with eager attention, as torch has no formula for the CPU's scaled_dot_product_attention.
    """
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def run_singly(model, collator, prompt, responses, family):
    """One ordinary pass of backbone and head per response."""
    for ids in responses:
        inputs = continued(prompt, [*ids, collator.separator_id], family)
        hidden = model.base_model(**inputs, use_cache=False)[0][0]
        model.score(hidden, torch.tensor([len(hidden) - 1]))


@parametrize_families
@torch.no_grad()
def test_single_passes(family):
    model, collator = patched(family, "eager", mode="isolated")
    for name, (prompt, responses) in samples_of(family).items():
        batch = collator.pack([collator.from_processed(prompt, responses)])
        expected = counted(lambda: run_singly(model, collator, prompt, responses, family))  # noqa: B023 - called here
        got = batch_flops(model, batch, single=True, dense=True)
        assert got.total == pytest.approx(expected, rel=EXACT), name
        assert (got.vision > 0) == any(key in prompt for key in PIXELS.values())


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
@parametrize_families
@torch.no_grad()
def test_packed_rows(family, way):
    model, collator = patched(family, "eager", **way)
    samples = samples_of(family)
    for row in [*([name] for name in samples), *rows_of(family)]:
        batch = collator.pack([collator.from_processed(*samples[name]) for name in row])
        got = batch_flops(model, batch, dense=True)
        assert got.total == pytest.approx(counted(lambda: model(**batch)), rel=EXACT), row  # noqa: B023 - called here
        assert batch_flops(model, batch).attention < got.attention


# ---- visible pairs ----


@parametrize_families
@torch.no_grad()
def test_attention_is_that_of_the_visible_pairs(family):
    """Windows of the layers and blocks of the prompts included; the layout's own mask says which pairs there are."""
    for mode in ("comparative", "isolated"):
        model, collator = patched(family, mode=mode)
        text_config = model.config.get_text_config()
        samples = samples_of(family)
        for row in rows_of(family):
            batch = collator.pack([collator.from_processed(*samples[name]) for name in row])
            expected = 0
            layers = model.get_decoder().layers
            for layer in layers:
                attention = layer.self_attn
                window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
                visible = batch["layout"].visible(window)
                if layer is layers[-1]:  # for the rows that are read alone
                    visible = visible[batch["separators"].read]
                pairs = int(visible.sum())
                expected += 4 * pairs * text_config.num_attention_heads * attention.head_dim
            assert batch_flops(model, batch).attention == expected


@pytest.mark.parametrize("window", [None, 1, 4, 9, 50])
@pytest.mark.parametrize("blocks", [(), (3, 4), (8,)])
def test_pairs_in_closed_form(window, blocks):
    for prompt, branches in ((8, [5, 3, 1]), (8, []), (11, [7]), (9, [20, 2])):
        ids = [block for block, size in enumerate(blocks) for _ in range(size)]
        ids += [-1] * (prompt + sum(branches) - len(ids))
        layout = Layout.build([prompt], [branches], bidirectional=torch.tensor(ids))
        assert count_visible(prompt, branches, window, blocks) == int(layout.visible(window).sum())


def test_pairs_refuse_a_window_below_one():
    with pytest.raises(ValueError, match="window must be at least 1, or None for no window, got 0"):
        count_visible(3, [2], window=0)


# ---- from numbers ----

GRIDS = {
    "qwen2_vl": {"two images": [(1, 4, 6), (1, 8, 4)], "image and video": [(1, 4, 4), (3, 4, 4)]},
    "qwen2_5_vl": {"two images": [(1, 4, 6), (1, 8, 4)], "slow video": [(3, 4, 4)]},
    "qwen3_vl": {"two images": [(1, 4, 6), (1, 8, 4)], "text": []},
    "gemma3": {"two images": [(1, 4, 4), (1, 4, 4)]},
    "internvl": {"two images": [(3, 4, 4), (1, 4, 4)]},
    "smolvlm": {"two images": [(3, 4, 4)]},
    "mistral3": {"larger image": [(1, 4, 4)]},
    "paligemma": {"two images": [(2, 2, 2)]},
    "mistral": {"long": []},
}


@pytest.mark.parametrize("family", GRIDS)
def test_numbers_alone_give_the_same(family):
    for way in WAYS:
        model, collator = patched(family, **way)
        for name, images in GRIDS[family].items():
            prompt, responses = samples_of(family)[name]
            batch = collator.pack([collator.from_processed(prompt, responses)])
            numbers = (prompt["input_ids"].shape[1], [len(ids) for ids in responses])
            assert scoring_flops(model, *numbers, images=images) == batch_flops(model, batch)
            got = scoring_flops(model, *numbers, mode="single", images=images)
            assert got == batch_flops(model, batch, single=True)


def test_molmo2s_numbers_count_its_image_tokens_as_one_block():
    model, _ = patched("molmo2")
    model.yojo.whole_last_layer = "counted by hand"
    apart = scoring_flops(model, 50, [5], images=[(1, 4, 4)]).attention
    assert scoring_flops(model, 50, [5], images=[(3, 4, 4)]).attention - apart == 2 * 4 * 32 * (12 * 11 - 4 * 3) // 2


def test_the_last_layer_counts_for_the_rows_that_are_read(monkeypatch):
    """From numbers alone, too; about one layer's worth where few rows are read, none where too many are."""
    model, _ = patched("llama", mode="isolated")
    few = scoring_flops(model, 1000, [9] * 4)
    many = scoring_flops(model, 4, [1] * 9)
    model.yojo.whole_last_layer = "for comparison"
    whole = scoring_flops(model, 1000, [9] * 4)
    assert few.head == whole.head and many == scoring_flops(model, 4, [1] * 9)
    model.yojo.whole_last_layer = None
    monkeypatch.setattr(last_layer, "FEWEST_FLOPS", 2**27)
    assert scoring_flops(model, 1000, [9] * 4) == whole  # too little to be saved
    assert few.mlp == pytest.approx(whole.mlp / 2, rel=1e-2)  # one of two layers
    assert few.attention == pytest.approx(whole.attention / 2, rel=1e-2)


def test_what_one_pass_saves_grows_to_the_ratio_of_tokens():
    """A prompt of p tokens and N responses of r: (p + r) N against p + r N, but for the attention."""
    model = tiny.build("llama")
    ratios = []
    for count in (1, 4, 16):
        single, packed = (scoring_flops(model, 40, [9] * count, mode=mode) for mode in ("single", "isolated"))
        assert single.mlp / packed.mlp == pytest.approx((40 + 10) * count / (40 + 10 * count))
        ratios.append(single.total / packed.total)
    assert ratios[0] == 1 and ratios == sorted(ratios)


@pytest.mark.parametrize("pooling", ["response_mean", "first_last_concat"])
@pytest.mark.parametrize("head", ["mlp", "linear"])
def test_a_head_that_reads_two_rows_counts_them(pooling, head):
    model, collator = patched("llama", "eager", mode="isolated", pooling=pooling, head=head)
    batch = collator.pack([collator.from_processed(*sample) for sample in list(samples_of("llama").values())[:2]])
    with FlopCounterMode(display=False) as counter:
        model(**batch)
    assert counter.get_total_flops() == batch_flops(model, batch, dense=True).total


def test_a_model_without_weights_is_enough():
    config = tiny.build("qwen3_vl").config
    with torch.device("meta"):
        model = transformers.Qwen3VLForConditionalGeneration(config)
    arguments = 30, [5, 6], {"mode": "isolated", "images": [(1, 4, 4)]}
    expected = scoring_flops(tiny.build("qwen3_vl"), *arguments[:2], **arguments[2])
    assert scoring_flops(model, *arguments[:2], **arguments[2]) == expected


# ---- mixtures of experts, adapters ----

MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16}


def mixture_of_experts(name):
    config = tiny.build("qwen3_vl").config.to_dict()
    text = {key: value for key, value in config["text_config"].items() if key != "model_type"} | MIXTURE
    if name == "Qwen3MoeConfig":
        return transformers.AutoModelForCausalLM.from_config(
            transformers.Qwen3MoeConfig(**(tiny.TEXT | MIXTURE)), attn_implementation="eager"
        )
    kept = {key: value for key, value in config.items() if key not in ("text_config", "model_type", "architectures")}
    kept["vision_config"] = {key: value for key, value in kept["vision_config"].items() if key != "model_type"}
    config = transformers.Qwen3VLMoeConfig(text_config=text, **kept)
    return transformers.Qwen3VLMoeForConditionalGeneration._from_config(config, attn_implementation="eager")


@pytest.mark.parametrize("name", ["Qwen3MoeConfig", "Qwen3VLMoeConfig"])
@torch.no_grad()
def test_only_active_experts_count(name):
    model = tiny.finished(mixture_of_experts(name))
    yojo.patch(model, tiny.tokenizer(), mode="isolated", head_dim=16)
    model.set_experts_implementation("eager")
    collator = yojo.Collator(tiny.tokenizer(with_separator=True), model)
    prompt = "image" if "VL" in name else "text"
    batch = collator.pack([collator.from_processed(*samples_of("qwen3_vl")[prompt])])
    got = batch_flops(model, batch, dense=True)
    assert got.total == pytest.approx(counted(lambda: model(**batch)), rel=EXACT)
    active = 2 * 2 * (32 * 4 + 2 * 3 * 32 * 16)  # layers, multiply-add, router and two experts of three matrices
    assert got.mlp == batch["layout"].num_tokens * active


def with_adapter(family, **options):
    from peft import LoraConfig, get_peft_model

    model, collator = patched(family, "eager", mode="isolated")
    targets = r".*(language_model|model\.layers).*\.(q_proj|v_proj)"
    config = LoraConfig(r=4, target_modules=targets, modules_to_save=["score"], **options)
    return get_peft_model(model, config), collator


@pytest.mark.parametrize("family", ["qwen3_vl", "llama"])
@torch.no_grad()
def test_adapters_count_where_they_run(family):
    wrapped, collator = with_adapter(family)
    batch = collator.pack([collator.from_processed(*samples_of(family)[name]) for name in list(samples_of(family))[:2]])
    adapted = batch_flops(wrapped, batch, dense=True)
    assert adapted.total == pytest.approx(counted(lambda: wrapped(**batch)), rel=EXACT)
    with wrapped.disable_adapter():
        off = batch_flops(wrapped, batch, dense=True)
        assert off.total == pytest.approx(counted(lambda: wrapped.get_base_model()(**batch)), rel=EXACT)
    assert off.projections < adapted.projections
    wrapped.merge_adapter()
    assert batch_flops(wrapped, batch, dense=True) == off


# ---- training ----


def train(model, batch):
    model(**batch).loss.backward()


def ranked(family, collator):
    samples = [samples_of(family)[name] for name in list(samples_of(family))[:2]]
    return collator.pack([
        collator.from_processed(prompt, responses, rankings=list(range(1, len(responses) + 1)))
        for prompt, responses in samples
    ])  # fmt: skip


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "gemma3", "molmo2", "llama"])
def test_a_training_step(family):
    """Eager attention keeps its scores and computes four products backward, where fused kernels compute five."""
    model, collator = patched(family, "eager", mode="isolated")
    batch = ranked(family, collator)
    got, forward = (batch_flops(model, batch, dense=True, training=training) for training in (True, False))
    vision_attention = forward.vision - no_pairs(model, batch)
    expected = got.total - (forward.attention + vision_attention) // 2
    assert counted(lambda: train(model, batch)) == pytest.approx(expected, rel=EXACT)
    assert got.attention == 3.5 * forward.attention and got.mlp == 3 * forward.mlp


def no_pairs(model, batch):
    """FLOPs of the vision tower without its attention."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("yojo.costs.flops._pairs_of", lambda *arguments: 0)
        return batch_flops(model, batch).vision


def test_a_training_step_with_an_adapter():
    """Gradients come down to the separator's embedding, through every layer."""
    wrapped, collator = with_adapter("llama")
    wrapped.get_base_model().yojo.whole_last_layer = "counted by hand"
    batch = ranked("llama", collator)
    got, forward = (batch_flops(wrapped, batch, dense=True, training=training) for training in (True, False))
    expected = got.total - forward.attention // 2  # eager attention computes four products backward, not five
    assert counted(lambda: train(wrapped, batch)) == pytest.approx(expected, rel=EXACT)
    assert got.mlp == 2 * forward.mlp


def test_frozen_parts_have_no_backward():
    model, collator = patched("qwen3_vl", mode="isolated")
    model.yojo.whole_last_layer = "counted by hand"
    batch = ranked("qwen3_vl", collator)
    forward = batch_flops(model, batch)
    model.requires_grad_(False)
    model.score.requires_grad_(True)
    separator = batch_flops(model, batch, training=True)  # its gradient comes down through all layers
    assert separator.vision == forward.vision and separator.mlp == 2 * forward.mlp
    model.score.separator_delta.requires_grad_(False)
    head_alone = batch_flops(model, batch, training=True)
    assert head_alone == Flops(**{**forward.to_dict(), "head": 3 * forward.head})
    model.get_decoder().layers[1].requires_grad_(True)
    upper = batch_flops(model, batch, training=True)
    assert upper.vision == forward.vision and upper.mlp == 2 * forward.mlp  # one layer of two, three times as much
    model.gradient_checkpointing_enable()
    assert batch_flops(model, batch, training=True).mlp == 2.5 * forward.mlp


# ---- refusals ----


def test_an_unknown_family_is_counted_without_images_and_refused_with_them(monkeypatch):
    model, collator = patched("internvl")
    image, text = (
        collator.pack([collator.from_processed(*samples_of("internvl")[name])]) for name in ("image", "text")
    )
    expected = batch_flops(model, text)
    monkeypatch.setattr(type(model.config), "model_type", "internvl_next")
    assert batch_flops(model, text) == expected
    with pytest.raises(ValueError, match=r"vision tower of 'internvl_next' .*not known.*internvl.*text-only"):
        batch_flops(model, image)


@pytest.mark.parametrize(
    "error, message, arguments, options",
    [
        (ValueError, "mode must be one of single, comparative, isolated, got 'packed'", (9, [3]), {"mode": "packed"}),
        (ValueError, r"response_tokens is empty.*\[100\] \* 4", (9, []), {}),
        (ValueError, "response_tokens must be at least 1, got 0", (9, [0]), {}),
        (ValueError, "prompt_tokens must be at least 0, got -1", (-1, [2]), {}),
        (TypeError, "prompt_tokens must be whole numbers, got 2.5", (2.5, [2]), {}),
        (ValueError, "the images take 4 tokens, but prompt_tokens is 3", (3, [2]), {"images": [(1, 4, 4)]}),
        (ValueError, "permutations has no meaning", (9, [2]), {"mode": "isolated", "permutations": 2}),
    ],
)
def test_numbers_that_make_no_sense(error, message, arguments, options):
    with pytest.raises(error, match=message):
        scoring_flops(tiny.build("qwen3_vl"), *arguments, **options)


def test_batches_that_cannot_be_counted():
    model, collator = patched("qwen3_vl")
    pair = collator.pack([collator.from_processed(*samples_of("qwen3_vl")[name]) for name in ("image", "text")])
    with pytest.raises(ValueError, match="single passes of a batch of 2 examples with images"):
        batch_flops(model, pair, single=True)
    with pytest.raises(ValueError, match=r"no layout and separators: pass what yojo\.Collator returns"):
        batch_flops(model, {"input_ids": pair["input_ids"]})
