"""A policy and its reward model on one set of backbone weights: half the memory, and neither disturbs the other."""

import copy

import torch

from yojo.inputs.example import Example
from yojo.patching import fingerprints, methods
from yojo.patching.devices import is_offloaded
from yojo.patching.patch import unpatch
from yojo.patching.state import patched_base
from yojo.saving.parts import adapter_of, scoring_adapter, weights_beside


def share(reward_model, adapter, *, name="default"):
    """A policy to train beside a reward model, with adapters of its own on the reward model's backbone.

    The policy is a stock model of the backbone's class, without patch, value head and the reward model's adapters, whose
    weights are the very tensors of the reward model's backbone: they are in memory once. Everything else each of the two
    has for itself: modules, hooks, buffers, adapters, training mode. So nothing is switched when one of them is used:
    generation, gradients, gradient checkpointing, TRL's reference adapter and disabled adapters never meet the reward
    model, and threads may use both at once.

    Backbone weights stay as they are: neither of the two may train them, and the reward model's take no gradients any more.
    What takes memory of its own in the policy is what its adapter copies (`modules_to_save`), the embedding where the patch
    took a spare row of it for the separator, and, for as long as its adapters are merged, the weights they are merged into.
    To move the policy to another device or dtype gives it weights of its own, too: move the reward model first, then share
    it.

    Args:
        reward_model: `yojo.RewardModel`; with a PEFT adapter the policy starts from the model below that adapter, without
            one from the reward model's own backbone.
        adapter: the policy's PEFT config, `peft.LoraConfig(...)`.
        name: of the policy's adapter; TRL's trainers look for "default".

    Returns:
        (policy, judge): a `peft.PeftModel`, in training as any other, and the `SharedJudge` that scores with the reward model.

    Raises:
        TypeError: what is no reward model, or no PEFT config.
        ValueError: a reward model whose adapters are merged or disabled, that is offloaded, or whose backbone weights were changed
            beside its adapter; an adapter that trains or changes backbone weights.

    Example:
        >>> policy, judge = share(reward_model, LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))
        >>> GRPOTrainer(policy, yojo.GroupReward(judge), processing_class=processor, ...)
    """
    from peft import PeftConfig, get_peft_model

    if isinstance(reward_model, SharedJudge):
        raise TypeError("reward_model is a judge that shares a backbone already: share its reward_model")
    if not hasattr(reward_model, "score_encoded"):
        raise TypeError(f"reward_model must be a yojo.RewardModel, got {type(reward_model).__name__}")
    if not isinstance(adapter, PeftConfig):
        raise TypeError(f"adapter must be a PEFT config, such as peft.LoraConfig(...), got {type(adapter).__name__}")
    base = patched_base(reward_model.model, "share")
    _check(reward_model.model, base)
    for tensor in fingerprints.tensors_of(base).values():
        tensor.requires_grad_(False)
    before = fingerprints.take(fingerprints.tensors_of(base))
    devices = sorted({parameter.device.index for parameter in base.parameters() if parameter.device.type == "cuda"})
    with torch.random.fork_rng(devices):  # a policy of its own would begin with the same numbers
        twin = _stock_twin(reward_model.model)
    policy = get_peft_model(twin, adapter, adapter_name=name)
    own = {address(parameter): n for n, parameter in base.named_parameters()}
    shared = {n: parameter for n, parameter in policy.named_parameters() if address(parameter) in own}
    trained = [n for n, parameter in shared.items() if parameter.requires_grad]
    if trained:
        raise ValueError(
            f"the policy's adapter trains weights of the backbone, which are the reward model's, too ({_some(trained)}): leave "
            "biases (bias='none') and layers of the backbone out of what it trains, or name them in modules_to_save, "
            "which copies them"
        )
    _check_unchanged(base, before, shared, "the policy's adapter changes")
    _check_adapted(policy, shared)
    _merge_apart(policy, shared)
    return policy, SharedJudge(reward_model, shared, before)


class SharedJudge:
    """The judge that `share` returns: a reward model, and a check after every pass that its backbone is what it was.

    Attributes:
        reward_model: the `yojo.RewardModel`.
    """

    def __init__(self, reward_model, shared, before):
        self.reward_model = reward_model
        self._shared = shared  # name in the policy -> its parameter
        self._before = before  # `fingerprints.Sample`s of the backbone

    def __reduce__(self):
        raise TypeError(
            "a judge that shares its backbone with a policy does not go into another process: load a reward model there, "
            "by its folder (yojo.judges.load_judge)"
        )

    @property
    def model(self):
        """The patched model of the reward model."""
        return self.reward_model.model

    @property
    def config(self):
        """The `YojoConfig` of the reward model."""
        return self.reward_model.config

    @property
    def collator(self):
        """The `yojo.Collator` of the reward model."""
        return self.reward_model.collator

    @property
    def order_free(self):
        """Whether no score depends on the order of the responses."""
        return self.reward_model.order_free

    def fingerprint(self):
        """As `RewardModel.fingerprint`."""
        return self.reward_model.fingerprint()

    def score(self, prompt, responses, images=None, videos=None, *, tools=None, literal_tags=False):
        """As `RewardModel.score`."""
        example = Example(prompt, responses, images=images, videos=videos, tools=tools, literal_tags=literal_tags)
        return self.score_many([example])[0]

    def score_many(self, examples, progress=False, token_budget=8192, workers=0):
        """As `RewardModel.score_many`.

        Raises:
            RuntimeError: the backbone's weights are not those that were shared, or the policy trains them: no score is
                returned then. Otherwise what `RewardModel.score_many` raises.
        """
        scores = self.reward_model.score_many(examples, progress, token_budget, workers)
        self.check()  # behind the pass: what changed before it or under it is seen alike
        return scores

    def score_encoded(self, encoded, token_budget=8192, errors="raise"):
        """As `RewardModel.score_encoded`; the weights are looked at before the first row, and again behind the last.

        Raises:
            RuntimeError: as for `score_many`.
        """
        self.check()
        yield from self.reward_model.score_encoded(encoded, token_budget, errors)
        self.check()

    def check(self):
        """Raise a RuntimeError where the backbone's weights are not those that were shared, or the policy trains them."""
        base = patched_base(self.reward_model.model, "share")
        trained = [name for name, parameter in self._shared.items() if parameter.requires_grad]
        if trained:
            raise RuntimeError(
                f"the policy trains weights of the backbone that it shares with the reward model ({_some(trained)}), and "
                "rewards would drift: train an adapter, or load a reward model of its own"
            )
        changed = _changed(base, self._before)
        if changed:
            raise RuntimeError(
                f"weights of the backbone that policy and reward model share have changed ({_some(changed)}), and these would "
                "be another reward model's scores: load a reward model of its own, or leave the backbone as it is"
            )

    def shared_bytes(self):
        """How many bytes of weights the two have in common, as they stand now.

        Returns:
            int; less than at first where the policy was moved to another device or dtype, 0 where all of it was.
        """
        base = patched_base(self.reward_model.model, "share")
        own = {address(parameter) for parameter in base.parameters()}
        found = {address(p): p.untyped_storage().nbytes() for p in self._shared.values() if address(p) in own}
        return sum(found.values())


# ---- the policy's modules ----


def _stock_twin(model):
    """The stock model below patch and adapters: its modules are copies, its weights the same tensors."""
    model = adapter_of(model) or patched_base(model, "share")
    memo = {}
    for parameter in model.parameters():
        # A parameter of its own on the same memory: whether it takes gradients, and where it is moved, is nobody else's
        # business. Quantized weights, of classes of their own, are one object.
        own = type(parameter) is torch.nn.Parameter
        memo[id(parameter)] = torch.nn.Parameter(parameter.data, requires_grad=False) if own else parameter
    for buffer in model.buffers():
        if not buffer.is_floating_point():  # GPTQ and AWQ keep their weights in these
            memo[id(buffer)] = buffer
    twin = copy.deepcopy(model, memo)
    if hasattr(twin, "peft_config"):
        twin = twin.unload()
    return _without_patch(twin)


def _without_patch(twin):
    """`unpatch`, which writes the separator's row and resizes embeddings, where it must not reach shared memory."""
    state = twin.yojo
    inputs, outputs = twin.get_input_embeddings(), twin.get_output_embeddings()
    weights = {"inputs": inputs.weight, "outputs": outputs.weight}
    is_tied = weights["inputs"] is weights["outputs"]
    if state.stock_row is not None or state.stock_vocabulary is not None:
        inputs.weight = torch.nn.Parameter(inputs.weight.detach().clone(), requires_grad=False)
        if is_tied:
            outputs.weight = inputs.weight
    rows = state.stock_vocabulary
    twin = unpatch(twin)
    if rows is not None:  # the separator was a row more: without it, the rest is the reward model's again
        inputs, outputs = twin.get_input_embeddings(), twin.get_output_embeddings()
        inputs.weight = torch.nn.Parameter(weights["inputs"].data[:rows], requires_grad=False)
        outputs.weight = (
            inputs.weight if is_tied else torch.nn.Parameter(weights["outputs"].data[:rows], requires_grad=False)
        )
    return twin


def _merge_apart(policy, shared):
    """Let the policy's adapters be merged into copies: in place they would be merged into the reward model, too.

    TRL merges them whenever it hands weights to vLLM. Taken out again, the weights are the shared ones, to the bit, which
    adding and subtracting in bfloat16 does not give.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    addresses = {address(parameter) for parameter in shared.values()}
    for layer in policy.modules():
        if isinstance(layer, BaseTunerLayer) and hasattr(layer, "merge"):
            own = layer.get_base_layer().named_parameters()
            layer.yojo_shared = {n: parameter.data for n, parameter in own if address(parameter) in addresses}
            methods.put(layer, "merge", _merge)
            methods.put(layer, "unmerge", _unmerge)


def _merge(layer, *args, **kwargs):
    if not layer.merged:
        for name, parameter in layer.get_base_layer().named_parameters():
            if name in layer.yojo_shared and address(parameter) == address(layer.yojo_shared[name]):
                parameter.data = parameter.data.clone()
    type(layer).merge(layer, *args, **kwargs)


def _unmerge(layer):
    type(layer).unmerge(layer)
    if not layer.merged:
        for name, parameter in layer.get_base_layer().named_parameters():
            shared = layer.yojo_shared.get(name)
            if shared is not None and (shared.device, shared.dtype) == (parameter.device, parameter.dtype):
                parameter.data = shared


# ---- checks ----


def address(tensor):
    """What tells whether two tensors lie in the same memory."""
    return tensor.device, tensor.untyped_storage().data_ptr()


def _check(model, base):
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(parameter.device.type == "meta" for parameter in base.parameters()) or any(
        is_offloaded(module) for module in base.modules()
    ):
        raise ValueError(
            "the reward model's weights are offloaded: there is nothing in memory to share; load it without"
        )
    adapted = adapter_of(model)
    if adapted is not None:
        scoring_adapter(adapted)  # a disabled one, or several at once
        merged = {n for layer in base.modules() if isinstance(layer, BaseTunerLayer) for n in layer.merged_adapters}
        if merged:
            raise ValueError(
                f"the reward model's adapter is merged into its backbone ({_some(merged)}), from which the policy would start: "
                "model.unmerge_adapter() first, or load it without merging"
            )
    beside = [] if adapted is None else sorted(weights_beside(base, fingerprints.tensors_of(base)))
    if beside:
        raise ValueError(
            "the reward model's backbone was trained beside the adapter, or is to be: the policy would start from other weights than "
            f"the base model's. Load a policy of its own ({_some(beside)})"
        )


def _changed(base, before):
    """Names of weights that are not what they were."""
    now = fingerprints.take(fingerprints.tensors_of(base))
    return [n for n in sorted({*before, *now}) if n not in before or n not in now or not _same(before[n], now[n])]


def _same(one, other):
    if (one.shape, one.values.dtype) != (other.shape, other.values.dtype):
        return False
    return torch.equal(one.values.view(torch.uint8), other.values.view(torch.uint8))  # NaN is NaN


def _check_unchanged(base, before, shared, what):
    changed = _changed(base, before)
    if changed:
        raise ValueError(f"{what} weights of the backbone, which are the reward model's, too ({_some(changed)})")


def _check_adapted(policy, shared):
    """Some ways to begin an adapter (PiSSA, OLoRA, ...) give the layers other weights: no longer the backbone's."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    ids = {id(parameter) for parameter in shared.values()}
    own = [
        f"{name}.{n}"
        for name, layer in policy.named_modules()
        if isinstance(layer, BaseTunerLayer)
        for n, parameter in layer.get_base_layer().named_parameters()
        if id(parameter) not in ids
    ]
    if own:
        raise ValueError(
            f"the policy's adapter changes the weights that it is put on ({_some(own)}), as init_lora_weights='pissa' and the like "
            "do: begin it with init_lora_weights=True, or load a policy of its own"
        )


def _some(names):
    names = sorted(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
