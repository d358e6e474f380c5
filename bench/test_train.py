"""A training step of a reward model, LoRA and value head: the paper's released computation, sample by sample, and YOJO.

A step is the forward, the loss "which is best" and the backward, without the optimizer, whose turn comes once in 64
samples and costs the same for all. The recipe is the paper's: LoRA of rank 128 with dropout on the decoder's attention
and MLP projections, gradient checkpointing, bfloat16 weights and adapters; the vision tower is frozen. Before a way is
timed its gradients must be as near to those of a higher precision as the stock model's are.
"""

import functools

import pytest
import torch

from bench import ways
from bench.counting import flop_counter
from bench.sweeps import Point
from bench.timing import clocked, figures, peak_bytes, skips_what_does_not_fit
from yojo.costs.flops import batch_flops

PROJECTIONS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
RANK = {"cuda": 128, "cpu": 16}
SAMPLE = {"cuda": Point("image", 2048, 4, 128), "cpu": Point("image", 256, 4, 16)}
SMALL = {"cuda": Point("image", 512, 4, 128), "cpu": Point("image", 32, 4, 8)}  # of the check, and of a quick run
ROWS = (1, 4, 8)  # samples of a packed row


def pytest_generate_tests(metafunc):
    config = metafunc.config
    device, quick = config.getoption("--device"), config.getoption("--quick")
    fuses = ("none", "auto") if device == "cuda" else ("none",)
    ways_to = [("released", "none", 1)]
    ways_to += [
        (f"yojo_{mode}", fuse, samples)
        for fuse in fuses
        for mode in ("comparative", "isolated")
        for samples in (ROWS[:2] if quick else ROWS)
    ]
    cases = [
        pytest.param(shape, *way, id=f"{shape}-{way[0]}-{way[1]}-{way[2]}_samples")
        for shape in config.model_shapes
        for way in ways_to
    ]
    metafunc.parametrize("shape, variant, fuse, samples", cases)


def adapted(model, rank):
    """The model in training with LoRA as the paper has it, its second factors not zero, so that all gradients flow."""
    from peft import LoraConfig, get_peft_model

    device = next(model.parameters()).device.type
    config = LoraConfig(r=rank, lora_alpha=16, lora_dropout=0.05, target_modules=PROJECTIONS)
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    if device != "meta":
        generator = torch.Generator(device).manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=rank**-0.5, generator=generator)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


class Training:
    """A scene that trains, and what the gradients must be.

    Attributes:
        scene: `ways.Scene` with adapters.
        truth: mode -> gradients of two small samples in a higher precision, dict group of weights -> vector.
        error: mode -> likewise, the relative error of the stock model's own gradients.
    """

    def __init__(self, shape, device):
        self.scene = ways.Scene(shape, device, wrap=functools.partial(adapted, rank=RANK[device.type]))
        self.truth, self.error = {}, {}
        small = SMALL[device.type]
        self._dropout(0.0)
        higher = self.scene.raised()
        for mode in ("comparative", "isolated"):
            self.truth[mode] = gradients(higher, stock_loss(higher, mode, small, 2))
            own = gradients(self.scene, stock_loss(self.scene, mode, small, 2))
            self.error[mode] = relative_errors(own, self.truth[mode])
        self._dropout(0.05)

    def check(self, variant, fuse):
        """Fail unless a way's gradients, group by group, err at most twice as much as the stock model's."""
        mode = ways.mode_of(variant)
        self._dropout(0.0)
        got = gradients(self.scene, loss_of(self.scene, variant, fuse, SMALL[self.scene.device.type], 2))
        self._dropout(0.05)
        errors = relative_errors(got, self.truth[mode])
        for group, error in errors.items():
            bound = 2 * self.error[mode][group]
            message = f"{variant}: relative error {error:.1e} of the gradients of {group}, bound {bound:.1e}"
            assert error <= bound < 1, message
        return max(errors.values())

    def _dropout(self, p):
        for name, module in self.scene.base.named_modules():
            if "lora_dropout" in name and isinstance(module, torch.nn.Dropout):
                module.p = p


def encoded(scene, point, samples):
    """Ranked samples, each with words and pixels of its own; the best response stands in another place in each."""
    return [
        scene.encoded(point, seed, rankings=[1 + (n != seed % point.count) for n in range(point.count)])
        for seed in range(samples)
    ]


def stock_loss(scene, mode, point, samples):
    """Function that gives the loss of each sample in turn, by the stock model: causal over all responses, or N passes."""
    items = encoded(scene, point, samples)
    backbone = scene.stock()

    def losses():
        for item in items:
            if mode == "comparative":
                tail, rows = ways.joined(item, range(point.count))
                inputs = [(tail, rows.to(scene.device))]
            else:
                inputs = [
                    (ids, torch.tensor([point.prompt + len(ids) - 1], device=scene.device)) for ids in item.responses
                ]
            scores = [
                scene.head(backbone(**scene.to_device(ways.sequence(item, tail)), use_cache=False)[0][0], rows)
                for tail, rows in inputs
            ]
            yield cross_entropy(torch.cat(scores), item) / samples

    return losses


def loss_of(scene, variant, fuse, point, samples):
    """Function that gives the losses of a way, each to run backward from before the next is made."""
    items = encoded(scene, point, samples)
    if variant == "released":
        scene.stock()
        prepared = []
        for item in items:
            tail, rows = ways.joined(item, range(point.count))
            prepared.append((scene.to_device(ways.sequence(item, tail)), rows.to(scene.device), item))

        def losses():
            for inputs, rows, item in prepared:
                output = scene.base(**inputs, output_hidden_states=True, use_cache=False)
                assert output.logits.shape[1] == inputs["input_ids"].shape[1]
                yield cross_entropy(scene.head(output.hidden_states[-1][0], rows), item) / samples

        return losses
    mode = ways.mode_of(variant)
    batch = scene.packed(mode, items)
    model = scene.patched(mode, fuse)

    def loss():
        yield model(**batch).loss

    return loss


def cross_entropy(scores, item):
    """-log softmax of the best response's score."""
    return torch.nn.functional.cross_entropy(scores[None], torch.tensor([item.rankings.index(1)], device=scores.device))


def step(losses):
    """Forward, loss and backward; gradients add up."""
    for loss in losses():
        loss.backward()


def gradients(scene, losses):
    """Gradients of a step by group of weights: the head's, and each factor of each projection's adapters."""
    # The stock model's embedding does not add the separator's delta, so it has no gradient to compare.
    groups = {"head": [p for name, p in scene.head.named_parameters() if name != "separator_delta"]}
    for name, parameter in scene.base.named_parameters():
        if parameter.requires_grad and "lora_" in name:
            projection, _, factor = name.rpartition(".lora_")
            groups.setdefault(f"{projection.rpartition('.')[2]}, {factor[0]}", []).append(parameter)
    trained = [parameter for group in groups.values() for parameter in group]
    for parameter in trained:
        parameter.grad = None
    step(losses)
    assert all(parameter.grad is not None for parameter in trained), "a trained weight got no gradient"
    return {name: torch.cat([one.grad.flatten().double() for one in group]) for name, group in groups.items()}


def relative_errors(got, exact):
    """group -> relative error of gradients."""
    return {name: ((got[name] - truth).norm() / truth.norm()).item() for name, truth in exact.items()}


def flops_of(scene, variant, point, samples):
    """FLOPs of a step, counted beforehand."""
    twin = scene.twin
    batch = twin.collators[ways.mode_of(variant)].pack(
        [twin.encoded(point, seed=seed, rankings=[1] * point.count) for seed in range(samples)]
    )
    if variant != "released":
        return batch_flops(twin.model, batch, training=True).total
    with twin.whole_last_layer():
        # Nothing of the loss depends on the logits: they cost a forward.
        return batch_flops(twin.model, batch, training=True).total + twin.logits(batch["layout"].num_tokens)


def test_train(benchmark, in_memory, device, record, request, shape, variant, fuse, samples):
    pytest.importorskip("peft")
    training = in_memory(shape, lambda: Training(shape, device))
    scene, quick = training.scene, request.config.getoption("--quick")
    point = (SMALL if quick else SAMPLE)[device.type]
    with skips_what_does_not_fit(device):
        benchmark.extra_info["error"] = training.check(variant, fuse)
        losses = loss_of(scene, variant, fuse, point, samples)

        def call():
            step(losses)

        for _ in range(1 if fuse == "none" else 3):  # the first steps compile
            call()
        counted = None
        if fuse == "none":
            with flop_counter() as counter:
                call()
            counted = float(counter.get_total_flops())
        benchmark.group = f"{shape}: training, {point}"
        limits = {"seconds": 0.2, "fewest": 2, "most": 3} if quick else {}
        seconds = clocked(benchmark, call, device, **limits)
        if seconds is None:
            return
        peak = peak_bytes(call, device)
        fused = "none" if variant == "released" else scene.base.yojo.fusion.choose(device)[0]
    fields = point.fields() | {
        "samples": samples,
        "responses": samples * point.count,
        "prompt_tokens": samples * point.prompt,
    }
    record(
        bench="train",
        variant=variant,
        impl=ways.impl_of(scene, variant, fuse),
        fuse=fused,
        mode=ways.mode_of(variant),
        **scene.fields(),
        flops_counted=counted,
        peak_bytes=peak,
        **fields,
        **figures(seconds, float(flops_of(scene, variant, point, samples))),
        **{"pass": "both"},
    )
