"""OpenRLHF's two ways to a reward of whole groups: an agent that scores where it samples, and a server for --reward.remote_url.

The agent sees images, and knows which samples belong together; see `GroupAgent` and examples/grpo/openrlhf_agent.py. The server
sees text, one sample a request:

    python -m yojo.rewards.openrlhf --judge my-reward-model --group-size 8 --tokenizer POLICY --port 5000
    python -m openrlhf.cli.train_ppo_ray --reward.remote_url http://HOST:5000/get_reward --rollout.n_samples_per_prompt 8
        --eval.n_samples_per_prompt 8 ...
"""

import argparse
import asyncio
import itertools
import logging

from yojo.rewards.collator import GroupCollator
from yojo.rewards.openrlhf_samples import PROMPTS, given, logs, question, scorer_of
from yojo.rewards.scorer import RewardError
from yojo.rewards.templates import AskedBy

logger = logging.getLogger(__name__)


class GroupAgent:
    """What makes an agent of OpenRLHF score each group of samples with a judge; to be put in front of its SingleTurnAgentExecutor.

    OpenRLHF starts all samples of a prompt at once, in one actor; each waits here for the others, and they are scored together,
    with their images. How many there are is counted, so that it is right in evaluation, too. No reward is made up: an error is
    raised, and ends the training.

    Args:
        judge: name of a judge (see `yojo.judges.load_judge`), or one. It is loaded in each actor, beside its engine.
        prompt: how the judge learns the question. "template": the prompt, which the policy's chat template has made
            (`--data.apply_chat_template`), is taken back to its messages. "label": it is the sample's label: `--data.label_key`
            names a column with the question or the messages. "text": the prompt as it is, made without a template.
        device, dtype, base_model: of the judge, as for `yojo.judges.load_judge`; given only with a name.
        group_size: samples that a prompt has, an int or several of them (in training and evaluation): what is counted must be one
            of them. None: whatever is counted.
        deadline: seconds that a group has from its first sample that is done to its last.
        incomplete: "fail" or "score", as for `yojo.rewards.collator.GroupCollator`.
        **options: normalize, empty, truncated, forged, order, seed, retries, token_budget, as for `yojo.rewards.GroupScorer`. OpenRLHF
            knows no sample without a reward: a treatment "none" is refused.

    Raises:
        TypeError, ValueError: an argument that does not fit the above.

    Example:
        >>> class AgentExecutor(GroupAgent, openrlhf.utils.agent.SingleTurnAgentExecutor):
        ...     def __init__(self):
        ...         super().__init__("my-reward-model", device="cuda")
    """

    def __init__(
        self,
        judge,
        *,
        prompt="template",
        group_size=None,
        device=None,
        dtype=None,
        base_model=None,
        deadline=600.0,
        incomplete="fail",
        **options,
    ):
        super().__init__()
        if prompt not in PROMPTS:
            raise ValueError(f"prompt must be one of {', '.join(PROMPTS)}, got {prompt!r}")
        loading = {"device": device, "dtype": dtype, "base_model": base_model}
        scorer = scorer_of(judge, **loading, deadline=deadline, **options)
        self.collator = GroupCollator(scorer.score, deadline=deadline, incomplete=incomplete)
        self._prompt, self._asked_by = prompt, None
        self._sizes = (group_size,) if isinstance(group_size, int) else group_size
        self._calls, self._numbers = {}, itertools.count()

    async def execute(self, prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine, images=None):
        """One sample: OpenRLHF's own, with the reward of its group in place of none."""
        call = self._enter(prompt, sampling_params)
        try:
            await asyncio.sleep(0)  # whoever was started with this one comes in before any of them can be done
            output = await super().execute(
                prompt=prompt,
                label=label,
                sampling_params=sampling_params,
                max_length=max_length,
                hf_tokenizer=hf_tokenizer,
                llm_engine=llm_engine,
                images=images,
            )
            if len(output["action_ranges"]) != 1:
                count = len(output["action_ranges"])
                raise ValueError(f"a sample of {count} turns: a GroupAgent stands in front of SingleTurnAgentExecutor")
            ((start, end),) = output["action_ranges"]
            completion = hf_tokenizer.decode(output["observation_tokens"][start:end], skip_special_tokens=True)
            shown = call.load(images) if hasattr(hf_tokenizer, "image_processor") else ()
            asked = self._asked(prompt, label, hf_tokenizer, len(shown))
            truncated = bool(output["truncated"])
            size = call.close()
            if self._sizes is not None and size not in self._sizes:
                raise RewardError(f"{size} samples of a prompt were started together, and group_size is {self._sizes}")
            found = await self.collator.submit(call.key, asked, completion, shown, truncated=truncated, group_size=size)
            reward = given(found)
        finally:
            self._leave(call)
        return {**output, "reward": reward, "scores": reward, "extra_logs": logs(found)}

    def _asked(self, prompt, label, processor, images):
        if self._prompt == "template" and self._asked_by is None:
            self._asked_by = AskedBy(processor)
        return question(self._prompt, self._asked_by, prompt, label, images)

    def _enter(self, prompt, sampling_params):
        # Every call of the actor has parameters of its own, which all of its samples share.
        which = id(sampling_params), prompt
        call = self._calls.get(which)
        if call is None:
            call = self._calls[which] = _Call(which, f"{next(self._numbers)}", sampling_params)
        call.enter()
        return call

    def _leave(self, call):
        if call.leave() and self._calls.get(call.which) is call:
            del self._calls[call.which]


class _Call:
    """The samples that OpenRLHF has started together for one prompt.

    Args:
        which: what tells the call from others that are under way.
        key: str, the group's.
        held: kept as long as the call, since `which` holds its id.
    """

    def __init__(self, which, key, held):
        self.which, self.key, self._held = which, key, held
        self._count, self._inside, self._closed, self._images = 0, 0, False, None

    def enter(self):
        if self._closed:
            raise RewardError(
                "a sample was started when another one of its prompt was done: all samples of a prompt must be started together, "
                "as OpenRLHF's generate_responses does"
            )
        self._count, self._inside = self._count + 1, self._inside + 1

    def leave(self):
        """Whether it was the last."""
        self._inside -= 1
        return not self._inside

    def close(self):
        """How many samples there are; none can be started any more."""
        self._closed = True
        return self._count

    def load(self, images):
        """The pictures as the policy was shown them, read once."""
        if self._images is None:
            from openrlhf.utils.vlm_utils import load_images

            listed = images if isinstance(images, list) else [images]
            there = [image for image in listed if image is not None]
            self._images = load_images(there)
            if len(self._images) != len(there):  # the policy has been shown the others
                raise ValueError(
                    f"{len(there) - len(self._images)} of {len(there)} images cannot be read: {there!r:.200}"
                )
        return self._images


def main(arguments=None):
    """The server's command line, see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m yojo.rewards.openrlhf", description="Rewards for OpenRLHF, over HTTP."
    )
    parser.add_argument(
        "--judge", required=True, help="name of a judge: a folder, FOLDER#isolated, openai:MODEL@URL, length"
    )
    parser.add_argument(
        "--group-size", type=_size, required=True, help="--rollout.n_samples_per_prompt, in evaluation the same"
    )
    parser.add_argument("--tokenizer", help="folder or name of the policy's tokenizer or processor")
    parser.add_argument(
        "--eos", action="append", default=[], help="text of a token that ends a response; may be given again"
    )
    parser.add_argument("--prompt", choices=PROMPTS, default="template", help="how the judge learns the question")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument("--deadline", type=float, default=600.0, help="seconds from a group's first sample to its last")
    parser.add_argument("--device", help="of the judge's model")
    parser.add_argument("--dtype", help="of the judge's model")
    parser.add_argument("--base-model", help="of a judge that is an adapter, if it lies elsewhere than in training")
    for name, kind, what in (
        ("normalize", str, "none, centre, standardise, rank or softmax"),
        ("empty", _treatment, "lowest, raise or a number"),
        ("truncated", _treatment, "score, lowest, raise or a number"),
        ("forged", _treatment, "score, lowest, raise or a number"),
        ("seed", int, "of the orders that responses are shown in"),
        ("retries", int, "how often a judge that fails is asked again"),
        ("token-budget", int, "tokens of a packed row"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=what)
    options = vars(parser.parse_args(arguments))
    judge, size, tokenizer = options.pop("judge"), options.pop("group_size"), options.pop("tokenizer")
    texts = {name: options.pop(name) for name in ("eos", "prompt")}
    address = options.pop("host"), options.pop("port")
    deadline = options["deadline"]
    from yojo.rewards.openrlhf_server import Queries, RewardServer

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        processor, ends = policy_of(tokenizer) if tokenizer else (None, [])
        queries = Queries(processor, prompt=texts["prompt"], eos=[*ends, *texts["eos"]])
        scorer = scorer_of(judge, **options)
        server = RewardServer(scorer.score, size, queries, address=address, deadline=deadline)
    except (OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    with server:
        logger.info("rewards at http://%s:%d/get_reward", *server.address)
        try:
            server.serve()
        except KeyboardInterrupt:
            logger.info("stopped")


def _size(text):
    if not text.isdecimal() or int(text) < 1:  # said before a model is loaded
        raise argparse.ArgumentTypeError(f"group_size must be at least 1, got {text!r}")
    return int(text)


def _treatment(text):
    try:
        return float(text)
    except ValueError:
        return text


def policy_of(name):
    """A model's processor (its tokenizer if it has none), and the texts of the tokens at which it ends a response.

    Args:
        name: folder or hub name.
    """
    from transformers import GenerationConfig

    from yojo.inputs.processors import load_processor

    processor = load_processor(name)
    tokenizer = getattr(processor, "tokenizer", processor)
    try:
        ids = GenerationConfig.from_pretrained(name).eos_token_id
    except OSError:  # it has none: the tokenizer's own is what ends a response
        ids = None
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    return processor, [tokenizer.decode([i], skip_special_tokens=False) for i in ids]


if __name__ == "__main__":
    main()
