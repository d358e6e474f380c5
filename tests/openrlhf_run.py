"""Runs OpenRLHF's own code against YOJO's agent and server, where it is unpacked, and prints what came of it; no test by itself.

    python -m tests.openrlhf_run FOLDER      # FOLDER has openrlhf/ in it
    python -m tests.openrlhf_run FOLDER URL  # its client against a server of ours (`yojo serve`) that is there already

OpenRLHF needs vLLM, DeepSpeed and flash-attn to be imported, of which it uses nothing here: what is missing is replaced by
objects that do nothing, in this process alone. Real are its executors, their HTTP client, the call that starts a prompt's samples,
what makes experiences of them, and the advantages.
"""

import asyncio
import copy
import importlib.machinery
import json
import os
import sys
import threading
import types
from pathlib import Path
from unittest import mock

ABSENT = ("aiohttp", "deepspeed", "flash_attn", "optree", "pylatexenc", "ray", "ring_flash_attn", "torchdata", "vllm")
N = 3


class Absent:
    """Finds modules that are not installed."""

    replaced = set()

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ABSENT:
            return None
        self.replaced.add(name.partition(".")[0])
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        made = mock.MagicMock(name=spec.name)
        made.__path__, made.__spec__, made.__version__ = [], spec, "9.9.9"
        if spec.name == "ray":
            made.remote = lambda decorated: decorated
        return made

    def exec_module(self, module):
        pass


class Engine:
    """What stands in for an actor with an engine: it says what it is told to, each sample after another time.

    Args:
        processor: the policy's.
        said: texts, for the samples in the order they are asked for; one that ends in no end token is cut off.
    """

    def __init__(self, processor, said):
        self.tokenizer, self.said, self.asked = processor.tokenizer, list(said), []

    async def generate(self, ids, params, multi_modal_data=None):
        number = len(self.asked)
        self.asked.append(multi_modal_data)
        text = self.said[number]
        await asyncio.sleep(0.002 * (len(self.said) - number))  # the last one is done first
        ids = self.tokenizer(text=text, add_special_tokens=False)["input_ids"]
        cut = not text.endswith(self.tokenizer.eos_token)
        out = types.SimpleNamespace(token_ids=ids, finish_reason="length" if cut else "stop", logprobs=None)
        return types.SimpleNamespace(outputs=[out])


def texts(processor, *words, end=True):
    return [f"it is a {word}" + processor.tokenizer.eos_token * end for word in words]


def sampling():
    return types.SimpleNamespace(max_tokens=8, logprobs=None)


def prompts(processor, images):
    part = [{"type": "image"}] if images else []
    content = [*part, {"type": "text", "text": "which digit is shown ?"}]
    chat = [{"role": "user", "content": content if images else content[-1]["text"]}]
    return chat, processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def judged(completions, chat, images=(), truncated=None):
    from tests.reward_cases import Hashed
    from yojo.rewards import Group, GroupScorer

    return GroupScorer(Hashed()).score([Group(chat, completions, images, truncated=truncated)])[0].rewards


def started(actor, executor, processor, engine, prompt, count, label="", images=None, params=None):
    """OpenRLHF's call that starts a prompt's samples in an actor."""
    this = types.SimpleNamespace(executor=executor, generate=engine.generate)
    return actor.generate_responses(
        this, prompt, label, params or sampling(), 4096, processor, num_samples=count, images=images
    )


def agent_run(openrlhf, processor):
    """Two pictures with one question, and a picture alone as in evaluation, all at once."""
    from tests.reward_cases import Hashed, picture
    from yojo.rewards.openrlhf import GroupAgent

    class AgentExecutor(GroupAgent, openrlhf.agent.SingleTurnAgentExecutor):
        def __init__(self):
            super().__init__(Hashed(), group_size=(N, 2))

    assert issubclass(AgentExecutor, openrlhf.agent.AgentExecutorBase)
    chat, prompt = prompts(processor, images=True)
    executor = AgentExecutor()
    engines = [
        Engine(processor, [*texts(processor, "three", "seven"), *texts(processor, "two", end=False)]),
        Engine(processor, texts(processor, "three", "seven", "two")),
        Engine(processor, texts(processor, "three", "seven")),
    ]
    pictures, counts = [picture("red"), picture("blue"), picture("red")], (N, N, 2)

    async def run():
        calls = (
            started(openrlhf.actor, executor, processor, engine, prompt, count, images=[image])
            for engine, image, count in zip(engines, pictures, counts, strict=True)
        )
        return await asyncio.gather(*calls)

    found = asyncio.run(run())
    metrics = executor.collator.metrics()
    executor.collator.close()
    decoded = [
        [
            processor.decode(one["observation_tokens"][slice(*one["action_ranges"][0])], skip_special_tokens=True)
            for one in group
        ]
        for group in found
    ]
    return {
        "rewards": [[one["reward"] for one in group] for group in found],
        "expected": [judged(text, chat, [image]) for text, image in zip(decoded, pictures, strict=True)],
        "decoded": decoded,
        "logs": found[0][0]["extra_logs"],
        "shown": [len(engine.asked[0]["image"]) for engine in engines],
        "left": len(executor._calls),
        "samples": metrics["yojo_collator_samples_total"],
        "advantages": advantages(openrlhf, found[0] + found[1]),
    }


def advantages(openrlhf, responses):
    """What OpenRLHF makes of samples: the mean of each one's advantages, and the rewards it has understood."""
    generator = openrlhf.samples.SamplesGenerator.__new__(openrlhf.samples.SamplesGenerator)
    made = [generator._process_response_into_experience(one, max_len=4096) for one in responses]
    maker = openrlhf.maker.RemoteExperienceMaker.__new__(openrlhf.maker.RemoteExperienceMaker)
    maker.advantage_estimator, maker.kl_ctl = "group_norm", types.SimpleNamespace(value=0.0)
    advantage = types.SimpleNamespace(estimator="group_norm", gamma=1.0)
    maker.args = types.SimpleNamespace(
        algo=types.SimpleNamespace(advantage=advantage),
        reward=types.SimpleNamespace(clip_range=None, overlong_buffer_len=None, stop_properly_penalty_coef=None),
        rollout=types.SimpleNamespace(n_samples_per_prompt=N),
    )
    maker.strategy = types.SimpleNamespace(args=maker.args)
    experiences = []
    for place in range(0, len(made), 2):  # micro-batches that cut through a group
        experience = openrlhf.experience.Experience.concat_experiences(made[place : place + 2], 0)
        experience.index = list(range(place, place + len(made[place : place + 2])))
        experience.kl = experience.action_mask.float() * 0
        experiences.append(experience)
    done = maker.compute_advantages_and_returns(experiences)
    means = [
        (row * mask).sum().item() / mask.sum().item()
        for e in done
        for row, mask in zip(e.advantages, e.action_mask, strict=True)
    ]
    return means


def server_of(score, processor, size=N, **options):
    from yojo.rewards.openrlhf_server import Queries, RewardServer

    server = RewardServer(score, size, Queries(processor), address=("127.0.0.1", 0), **options)
    threading.Thread(target=server.serve, daemon=True).start()
    return server, "http://{}:{}/get_reward".format(*server.address)


def remote_run(openrlhf, processor):
    """Text over HTTP by OpenRLHF's own client: the same prompt twice among others."""
    from tests.reward_cases import Hashed
    from yojo.rewards import GroupScorer

    chat, prompt = prompts(processor, images=False)
    other = chat[0]["content"].replace("which", "what")
    second = processor.apply_chat_template(
        [{"role": "user", "content": other}], tokenize=False, add_generation_prompt=True
    )
    said = [texts(processor, "three", "seven", "two"), texts(processor, "one", "four", "three")]
    server, url = server_of(GroupScorer(Hashed()).score, processor)
    executor = openrlhf.agent.SingleTurnAgentExecutor(url)

    async def run():
        calls = [
            started(openrlhf.actor, executor, processor, Engine(processor, texts_), asked, N, label="7")
            for asked, texts_ in ((prompt, said[0]), (second, said[1]))
        ]
        return await asyncio.gather(*calls)

    with server:
        found = asyncio.run(run())
        metrics = server.collator.metrics()
        left = len(server.desk)
    # What stands between prompt and answer is as the tokenizer writes it: a blank, here.
    written = [[f" {text.removesuffix(processor.tokenizer.eos_token)}" + " " for text in group] for group in said]
    expected = [
        judged(written[0], chat),
        judged(written[1], [{"role": "user", "content": other}]),
    ]
    return {
        "rewards": [[one["reward"] for one in group] for group in found],
        "scores": [[one["scores"] for one in group] for group in found],
        "expected": expected,
        "samples": metrics["yojo_collator_samples_total"],
        "left": left,
        "advantages": advantages(openrlhf, found[0] + found[1]),
    }


def served_run(openrlhf, processor, url):
    """Text over HTTP to `yojo serve`: what was asked, what a judge is shown of it, and the rewards."""
    chat, prompt = prompts(processor, images=False)
    other = [{"role": "user", "content": chat[0]["content"].replace("which", "what")}]
    second = processor.apply_chat_template(other, tokenize=False, add_generation_prompt=True)
    words = [("three", "seven", "two"), ("one", "four", "three")]
    executor = openrlhf.agent.SingleTurnAgentExecutor(f"{url}/get_reward")

    async def run():
        calls = [
            started(openrlhf.actor, executor, processor, Engine(processor, texts(processor, *said)), asked, N)
            for asked, said in zip((prompt, second), words, strict=True)
        ]
        return await asyncio.gather(*calls)

    return [
        {
            "chat": asked,
            "completions": [f" it is a {word} " for word in said],  # with blanks, as the tokenizer writes it
            "rewards": [one["reward"] for one in group],
        }
        for asked, said, group in zip((chat, other), words, asyncio.run(run()), strict=True)
    ]


def retry_run(openrlhf, processor):
    """A client that gives up and asks again is the same sample; an equal answer of another sample is not."""
    from tests.reward_cases import Hashed
    from yojo.rewards import GroupScorer

    _, prompt = prompts(processor, images=False)
    server, url = server_of(GroupScorer(Hashed()).score, processor)
    tried = []

    def timeout(total):
        assert total == 180
        return openrlhf.aiohttp.ClientTimeout(total=0.5)

    def session(**options):
        tried.append(options)
        if len(tried) > 4:  # nobody has to give up any more, however slow the machine is
            options = options | {"timeout": openrlhf.aiohttp.ClientTimeout(total=60)}
        return openrlhf.aiohttp.ClientSession(**options)

    fast = types.SimpleNamespace(ClientTimeout=timeout, ClientSession=session, ClientError=openrlhf.aiohttp.ClientError)
    executor = openrlhf.agent.SingleTurnAgentExecutor(url)
    same = texts(processor, "three")[0]

    async def run():
        query = prompt_text(processor, prompt, same)
        first = [asyncio.create_task(executor._fetch_rewards_via_http([query], [prompt], [""])) for _ in range(2)]
        # Both have given up once, at least, and asked again; the server has read what they asked.
        while len(tried) < 4 or server.collator.metrics()["yojo_collator_samples_waiting"] < 2:
            await asyncio.sleep(0.05)
        waiting = server.collator.metrics()["yojo_collator_samples_waiting"]
        last = prompt_text(processor, prompt, texts(processor, "seven")[0])
        found = await asyncio.gather(*first, executor._fetch_rewards_via_http([last], [prompt], [""]))
        return waiting, [one[0]["rewards"][0] for one in found]

    with server, mock.patch.object(openrlhf.agent, "aiohttp", fast), quick(openrlhf):
        waiting, rewards = asyncio.run(run())
        samples = server.collator.metrics()["yojo_collator_samples_total"]
    return {"waiting": waiting, "rewards": rewards, "samples": samples, "left": len(server.desk)}


def prompt_text(processor, prompt, said):
    tokenizer = processor.tokenizer
    ids = [*tokenizer(text=prompt, add_special_tokens=False)["input_ids"]]
    ids += tokenizer(text=said, add_special_tokens=False)["input_ids"]
    return tokenizer.decode(ids, skip_special_tokens=False)


def quick(openrlhf):
    """OpenRLHF's pause of a second before it asks again, shortened."""
    own = types.SimpleNamespace(**vars(asyncio))
    own.sleep = lambda seconds: asyncio.sleep(seconds / 20)
    return mock.patch.object(openrlhf.agent, "asyncio", own)


def failure_run(openrlhf, processor):
    """What OpenRLHF makes of a judge that fails: no reward, and no training on one."""
    from tests.reward_cases import Failing
    from yojo.rewards import GroupScorer

    _, prompt = prompts(processor, images=False)
    judge = Failing()
    server, url = server_of(GroupScorer(judge, retries=0).score, processor)
    executor = openrlhf.agent.SingleTurnAgentExecutor(url)
    engine = Engine(processor, texts(processor, "three", "seven", "two"))
    with server, quick(openrlhf):
        found = asyncio.run(started(openrlhf.actor, executor, processor, engine, prompt, N))
    generator = openrlhf.samples.SamplesGenerator.__new__(openrlhf.samples.SamplesGenerator)
    made = [generator._process_response_into_experience(one, max_len=4096) for one in found]
    maker = openrlhf.maker.RemoteExperienceMaker.__new__(openrlhf.maker.RemoteExperienceMaker)
    maker.args, maker.reward_model_group = mock.MagicMock(), None
    maker.strategy, maker.initial_model_group = mock.MagicMock(), None
    try:
        with mock.patch.object(openrlhf.maker, "ray"):  # or it would be started
            maker.make_experience(made)
        raised = None
    except Exception as error:
        raised = f"{type(error).__name__}: {error}"
    mixed = copy.copy(found[0])
    mixed["reward"] = mixed["scores"] = 1.0  # the others have none
    try:
        advantages(openrlhf, [mixed, *found[1:]])
        mixed_raised = None
    except Exception as error:
        mixed_raised = f"{type(error).__name__}: {error}"
    return {
        "rewards": [one["reward"] for one in found],
        "calls": judge.calls,
        "raised": raised,
        "mixed": mixed_raised,
    }


def agent_failure_run(openrlhf, processor):
    """An agent whose judge fails raises, in each of its samples."""
    from tests.reward_cases import Failing
    from yojo.rewards.openrlhf import GroupAgent

    class AgentExecutor(GroupAgent, openrlhf.agent.SingleTurnAgentExecutor):
        pass

    chat, prompt = prompts(processor, images=False)
    found = {}
    for name, executor, count, params in (
        ("judge", AgentExecutor(Failing(), retries=0), N, None),
        ("size", AgentExecutor(Failing(), retries=0, group_size=N), 2, None),
        ("label", AgentExecutor(Failing(), retries=0, prompt="label"), 2, None),
    ):
        engine = Engine(processor, texts(processor, "three", "seven", "two"))
        try:
            asyncio.run(started(openrlhf.actor, executor, processor, engine, prompt, count, params=params))
            found[name] = None
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
        executor.collator.close()
    return found


def example_run(openrlhf, processor):
    """The example, loaded as OpenRLHF loads an agent."""
    os.environ["YOJO_JUDGE"] = "length"
    executor = openrlhf.engine._load_agent_executor(str(Path(__file__).parents[1] / "examples/grpo/openrlhf_agent.py"))
    _, prompt = prompts(processor, images=False)
    engine = Engine(processor, texts(processor, "three", "seven", "two"))
    found = asyncio.run(started(openrlhf.actor, executor, processor, engine, prompt, N))
    executor.collator.close()
    return [one["reward"] for one in found]


def main(folder, url=None):
    sys.path.append(folder)
    sys.meta_path.append(Absent())
    import torch  # noqa: F401 - before anything can be mistaken for what it looks for

    from yojo.demo.backbone import build_processor

    load = importlib.import_module
    openrlhf = types.SimpleNamespace(
        agent=load("openrlhf.utils.agent"),
        samples=load("openrlhf.trainer.ppo_utils.samples_generator"),
        experience=load("openrlhf.trainer.ppo_utils.experience"),
        maker=load("openrlhf.trainer.ppo_utils.experience_maker"),
        aiohttp=load("aiohttp"),
    )
    openrlhf.engine = load("openrlhf.trainer.ray.vllm_engine")
    actor = openrlhf.engine.RolloutRayActor
    openrlhf.actor = getattr(getattr(actor, "__ray_metadata__", None), "modified_class", actor)
    processor = build_processor()
    if url is not None:
        print(json.dumps({"replaced": sorted(Absent.replaced), "served": served_run(openrlhf, processor, url)}))
        return
    runs = (("agent", agent_run), ("agent_failure", agent_failure_run), ("example", example_run))
    found = {name: run(openrlhf, processor) for name, run in runs}
    if "aiohttp" not in Absent.replaced:
        for name, run in (("remote", remote_run), ("retry", retry_run), ("failure", failure_run)):
            found[name] = run(openrlhf, processor)
    print(json.dumps({"replaced": sorted(Absent.replaced), **found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
