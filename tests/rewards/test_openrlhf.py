"""OpenRLHF's two ways to a reward: its own code where it is there, and its documented requests and replies in any case."""

import concurrent.futures
import http.client
import json
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests import framework_cases
from tests.reward_cases import Failing, Hashed
from yojo.demo.backbone import BACKBONE, build_processor
from yojo.rewards import Group, GroupScorer, RewardError
from yojo.rewards import openrlhf as adapter
from yojo.rewards import openrlhf_server as serving
from yojo.rewards.openrlhf_server import Desk, Queries, RewardServer, is_gone

ROOT = Path(__file__).parents[2]
LONG = 60.0  # seconds that no test takes
EOS = "<|im_end|>"


# ---- its own code ----


@pytest.fixture(scope="module")
def run():
    """What OpenRLHF's own code made of our agent and server."""
    command = [sys.executable, "-m", "tests.openrlhf_run", str(framework_cases.folder_of("openrlhf"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def normed(rewards):
    mean, deviation = statistics.mean(rewards), statistics.stdev(rewards)
    return [(reward - mean) / (deviation + 1e-9) for reward in rewards]


def test_an_agent_scores_the_samples_of_a_call_together(run):
    found = run["agent"]
    assert found["rewards"] == found["expected"]
    assert [len(group) for group in found["rewards"]] == [3, 3, 2]  # the last one as in evaluation
    assert found["decoded"][0] == found["decoded"][1] and found["rewards"][0] != found["rewards"][1]  # two pictures
    assert found["shown"] == [1, 1, 1]
    assert found["samples"] == 8 and found["left"] == 0
    assert found["logs"]["yojo_group_size"] == 3.0
    assert found["advantages"] == pytest.approx(normed(found["rewards"][0]) + normed(found["rewards"][1]), abs=1e-5)


def test_an_agent_raises_where_there_is_no_reward(run):
    found = run["agent_failure"]
    assert found["judge"].startswith("RewardError: the judge was asked 1 times and gave no scores")
    assert "2 samples of a prompt were started together, and group_size is (3,)" in found["size"]
    assert found["label"].startswith("ValueError: prompt='label'")


def test_the_example_is_an_agent(run):
    assert run["example"] == [float(len(f"it is a {word}")) for word in ("three", "seven", "two")]


def test_its_client_gets_the_rewards_of_whole_groups(run):
    found = run["remote"]
    assert [[reward for (reward,) in group] for group in found["rewards"]] == found["expected"]
    assert found["scores"] == found["rewards"]
    assert found["samples"] == 6 and found["left"] == 0
    assert found["advantages"] == pytest.approx(normed(found["expected"][0]) + normed(found["expected"][1]), abs=1e-5)


def test_its_client_may_give_up_and_ask_again(run):
    found = run["retry"]
    assert found["waiting"] == 2 and found["samples"] == 3 and found["left"] == 0  # and not one for each request
    assert found["rewards"][0] == found["rewards"][1] != found["rewards"][2]


def test_it_does_not_train_on_a_reward_that_is_missing(run):
    found = run["failure"]
    assert found["rewards"] == [None] * 3  # and not 0
    assert found["calls"] == 5  # whole groups come again, as often as it asks
    assert "reward_model_group is required" in found["raised"]
    assert found["mixed"].startswith("AttributeError")


# ---- the documented request and reply ----


class Serving:
    """A server, and requests to it."""

    def __init__(self, judge=None, size=2, prompt="text", deadline=LONG, **options):
        scorer = GroupScorer(judge or Hashed(), **{"retries": 0, **options})
        queries = Queries(eos=[EOS], prompt=prompt)
        self.server = RewardServer(scorer.score, size, queries, address=("127.0.0.1", 0), deadline=deadline)
        self.thread = threading.Thread(target=self.server.serve)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.close()
        self.thread.join(LONG)
        assert not self.thread.is_alive()

    def ask(self, method, path, body=None):
        connection = http.client.HTTPConnection(*self.server.address, timeout=LONG)
        try:
            connection.request(method, path, body)
            reply = connection.getresponse()
            return reply.status, reply.read().decode()
        finally:
            connection.close()

    def post(self, queries, prompts, labels, path="/get_reward"):
        status, text = self.ask("POST", path, json.dumps({"query": queries, "prompts": prompts, "labels": labels}))
        return status, json.loads(text)

    def posts(self, samples):
        """Requests of one sample each, at the same time."""
        with concurrent.futures.ThreadPoolExecutor(len(samples)) as pool:
            asked = [pool.submit(self.post, [prompt + text], [prompt], [label]) for prompt, text, label in samples]
            return [one.result(LONG) for one in asked]

    def begin(self, prompt, text, label=""):
        """A request whose client does not wait: a socket."""
        body = json.dumps({"query": [prompt + text], "prompts": [prompt], "labels": [label]}).encode()
        connection = socket.create_connection(self.server.address, timeout=LONG)
        connection.sendall(b"POST /get_reward HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        return connection

    def waiting(self):
        return self.server.collator.metrics()["yojo_collator_samples_waiting"]

    def until(self, condition):
        end = time.monotonic() + LONG
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.002)


def expected(prompt, *completions, **options):
    return GroupScorer(Hashed()).score([Group(prompt, list(completions), **options)])[0].rewards


def test_a_request_of_one_sample_waits_for_its_group():
    samples = [("Why?", f"a{EOS}", "7"), ("Who?", "b", "7"), ("Why?", f"c{EOS}", "7"), ("Who?", f"d{EOS}", "7")]
    with Serving(truncated=-1.0) as it:
        found = it.posts(samples)
    for status, reply in found:
        assert status == 200 and list(reply) == ["rewards", "scores", "extra_logs"]
        assert reply["scores"] == reply["rewards"] and reply["extra_logs"]["yojo_group_size"] == [2.0]
    rewards = [reply["rewards"] for _, reply in found]
    why = expected("Why?", "a", "c")
    assert rewards[0::2] == [[why[0]], [why[1]]]
    assert rewards[1] == [-1.0]  # it ended in no end token: it was cut off
    assert rewards[3] == expected("Who?", "d")


def test_a_request_may_have_several_samples():
    with Serving() as it:
        status, reply = it.post(["Why?a", "Why?b"], ["Why?"] * 2, ["", ""], path="/")
    assert status == 200 and reply["rewards"] == expected("Why?", "a", "b")


def test_the_same_prompt_with_another_label_is_another_group():
    with Serving() as it:
        found = it.posts([("Why?", text, label) for label in ("7", ["8"]) for text in "ab"])
    assert [reply["rewards"][0] for _, reply in found] == expected("Why?", "a", "b") * 2
    with Serving(deadline=0.2) as it:
        assert [status for status, _ in it.posts([("Why?", "a", "7"), ("Why?", "b", "8")])] == [424, 424]


def test_a_label_may_be_the_question():
    chat = [{"role": "user", "content": "Why?"}]
    with Serving(prompt="label", size=1) as it:
        status, reply = it.post(["<user>Why?<assistant>x"], ["<user>Why?<assistant>"], [chat])
        assert status == 200 and reply["rewards"] == expected(chat, "x")
        status, reply = it.post(["Why?x"], ["Why?"], [None])
        assert status == 422 and "--data.label_key" in reply["error"]


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        ("{", 400, "no JSON"),
        ("[]", 422, "lists of one length"),
        ('{"query": ["a"], "prompts": []}', 422, "lists of one length"),
        ('{"query": [], "prompts": [], "labels": []}', 422, "lists of one length"),
        ('{"query": ["ab"], "prompts": [1], "labels": [""]}', 422, "must hold strings"),
        ('{"query": ["ab"], "prompts": ["b"], "labels": [""]}', 422, "does not begin with its prompt"),
        ('{"query": ["ab", "bb"], "prompts": ["a", "a"], "labels": ["", ""]}', 422, "does not begin with its prompt"),
    ],
)
def test_requests_that_make_no_sense(body, status, text):
    with Serving() as it:
        found, reply = it.ask("POST", "/get_reward", body)
        assert found == status and text in json.loads(reply)["error"]
        assert it.waiting() == len(it.server.desk) == 0  # a sample beside a wrong one is not kept


def test_other_paths_and_health(monkeypatch):
    monkeypatch.setattr(serving, "LARGEST", 5)
    with Serving() as it:
        assert it.ask("GET", "/health") == (200, '{"status": "ok"}')
        assert it.ask("GET", "/get_reward")[0] == 405
        assert it.ask("GET", "/score")[0] == it.ask("POST", "/score", "{}")[0] == 404
        assert it.ask("POST", "/get_reward", "123456")[0] == 413
        status, text = it.ask("GET", "/metrics")
    assert status == 200
    numbers = dict(line.split(" ") for line in text.splitlines())
    assert numbers["yojo_collator_samples_waiting"] == numbers["yojo_clients_waiting"] == "0"


def test_a_judge_that_fails_is_an_error_of_all():
    with Serving(judge=Failing()) as it:
        for status, reply in it.posts([("Why?", text, "") for text in "ab"]):
            assert status == 424 and "the line is down" in reply["error"]
        assert it.waiting() == len(it.server.desk) == 0


def test_a_group_that_nothing_of_is_judged_has_no_reward():
    with Serving() as it:
        for status, reply in it.posts([("Why?", " ", "")] * 2):
            assert status == 424 and "empty=-1.0" in reply["error"]
    with Serving(empty=-1.0) as it:
        assert [reply["rewards"] for _, reply in it.posts([("Why?", " ", "")] * 2)] == [[-1.0]] * 2


def test_a_lost_sample_is_an_error_of_its_group_and_who_asks_again_hears_it_at_once():
    with Serving(deadline=0.05) as it:
        status, reply = it.post(["Why?a"], ["Why?"], [""])
        assert status == 424 and "1 of 2 samples came within deadline=0.05 s" in reply["error"]
        assert "(...Why?)" in reply["error"]
        status, reply = it.post(["Why?a"], ["Why?"], [""])
        assert status == 424 and "the sample is late" in reply["error"]


def test_a_client_that_comes_again_is_no_other_sample(monkeypatch):
    monkeypatch.setattr(serving, "PATIENCE", LONG)
    with Serving(size=3) as it:
        gone = it.begin("Why?", "a")
        it.until(lambda: it.waiting() == 1)
        gone.close()
        again = it.begin("Why?", "a")
        twin = it.begin("Why?", "a")  # the same text, and the other one is there
        it.until(lambda: it.waiting() == 2)
        status, reply = it.post(["Why?b"], ["Why?"], [""])
        rewards = expected("Why?", "a", "b")
        assert status == 200 and reply["rewards"] == [rewards[1]]
        for connection in (again, twin):
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert json.loads(answer.read())["rewards"] == [rewards[0]]
            connection.close()
        it.until(lambda: len(it.server.desk) == 0)
        assert it.server.collator.metrics()["yojo_collator_samples_total"] == 3


def test_a_client_that_never_comes_again_takes_its_sample_along(monkeypatch):
    monkeypatch.setattr(serving, "PATIENCE", 0.0)
    with Serving() as it:
        gone = it.begin("Why?", "stale")
        it.until(lambda: it.waiting() == 1)
        gone.close()
        it.until(lambda: it.waiting() == 0)  # the server looks twice a second
        found = it.posts([("Why?", text, "") for text in "ab"])
    assert [reply["rewards"][0] for _, reply in found] == expected("Why?", "a", "b")


def test_an_answer_that_did_not_get_through_is_kept_for_the_next_time():
    desk, future = Desk(), concurrent.futures.Future()
    here, there = socket.socketpair()
    made = []
    one = desk.hand_in("text", lambda: made.append(1) or future, here)
    assert not is_gone(here)
    assert desk.take("text", one, here) and len(desk) == 0
    desk.put_back("text", one)
    there.close()
    here.close()
    assert is_gone(here)
    here, there = socket.socketpair()
    assert desk.hand_in("text", lambda: made.append(1), here) is one and made == [1]
    there.close()
    assert not desk.take("text", one, here) and len(desk) == 1  # gone meanwhile
    desk.sweep()
    assert len(desk) == 1 and not future.cancelled()
    here.close()


def test_a_closed_server_answers_with_errors():
    with Serving() as it, concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(it.post, ["Why?a"], ["Why?"], [""])
        it.until(lambda: it.waiting() == 1)
        it.server.close()
        status, reply = asked.result(LONG)
    assert status == 424 and "closed" in reply["error"]
    Serving().server.close()  # one that never served


# ---- texts ----


def test_a_query_is_cut_where_the_policy_began():
    processor = build_processor()
    chat = [{"role": "user", "content": "which digit is shown ?"}]
    prompt = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    queries = Queries(processor)

    def query(text, prompt=prompt):
        ids = [i for part in (prompt, text) for i in processor(text=part)["input_ids"][0]]
        return processor.decode(ids, skip_special_tokens=False)

    assert not query("").startswith(prompt)  # a tokenizer that does not write what it has read
    asked, completion, truncated = queries.read(query(f"it is a three{EOS}"), prompt, "")
    assert (asked, completion.strip(), truncated) == (chat, "it is a three", False)
    assert queries.read(query("it is a"), prompt, "")[1:] == (" it is a", True)
    with pytest.raises(ValueError, match="does not begin with its prompt"):
        queries.read(query("it is a")[20:], prompt, "")  # a prompt that was cut
    with pytest.raises(ValueError, match="prompt='label'"):
        queries.read(query("it is", "what ?"), "what ?", "")  # which no template has made


def test_what_ends_a_response_must_be_known():
    with pytest.raises(ValueError, match="what ends a response"):
        Queries(prompt="text")
    with pytest.raises(ValueError, match="needs the policy's tokenizer"):
        Queries(eos=[EOS])
    several = Queries(eos=["<a>", "<b>"], prompt="text")
    assert [several.read(f"Q{end}", "Q", "")[1:] for end in ("x<b>", "x<a><a>", "x")] == [
        ("x", False),
        ("x<a>", False),
        ("x", True),
    ]


# ---- arguments ----


class Base:
    """What OpenRLHF's executor is to the agent, where it is not there."""


class Agent(adapter.GroupAgent, Base):
    pass


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"judge": Hashed(), "prompt": "chat"}, ValueError, "prompt must be one of"),
        ({"judge": Hashed(), "empty": "none"}, ValueError, "empty='none' leaves a sample without a reward"),
        ({"judge": Hashed(), "device": "cpu"}, ValueError, "device, dtype and base_model"),
        ({"judge": Hashed(), "base_model": "b"}, ValueError, "device, dtype and base_model"),
        ({"judge": "length", "base_model": "b"}, ValueError, "base_model='b'"),
        ({"judge": Hashed(), "group_sizes": 3}, TypeError, "group_sizes"),
        ({"judge": "no/such/judge"}, ValueError, "no/such/judge"),
    ],
)
def test_arguments_of_the_agent(arguments, kind, text):
    with pytest.raises(kind, match=text):
        Agent(**arguments)
    Agent("length").collator.close()


def test_a_sample_that_is_started_late_is_an_error():
    agent, params = Agent(Hashed()), object()
    first = agent._enter("Why?", params)
    assert first.close() == 1
    with pytest.raises(RewardError, match="must be started together"):
        agent._enter("Why?", params)
    other = agent._enter("Why?", object())
    assert other.key != first.key and other.close() == 1
    agent._leave(first)
    assert agent._enter("Why?", params).key not in (first.key, other.key)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--judge", "length", "--group-size", "2"], "what ends a response must be known"),
        (["--judge", "length", "--group-size", "2", "--eos", EOS], "needs the policy's tokenizer"),
        (
            ["--judge", "no/such", "--group-size", "0", "--eos", EOS, "--prompt", "text"],
            "group_size must be at least 1",
        ),
        (["--judge", "no/such", "--group-size", "two"], "group_size must be at least 1"),
        (
            ["--judge", "length", "--group-size", "2", "--eos", EOS, "--prompt", "text", "--base-model", "b"],
            "base_model='b'",
        ),
        (["--judge", "length", "--group-size", "2", "--eos", EOS, "--prompt", "text", "--empty", "none"], "none"),
        (["--judge", "no/such", "--group-size", "2", "--eos", EOS, "--prompt", "text"], "no/such"),
    ],
)
def test_a_command_line_that_makes_no_sense(arguments, text, capsys):
    with pytest.raises(SystemExit):
        adapter.main(arguments)
    assert text in capsys.readouterr().err


def test_the_policys_processor_may_be_without_a_video_part():
    processor, ends = adapter.policy_of(str(BACKBONE))
    queries = Queries(processor, eos=ends)
    chat = [{"role": "user", "content": "Which digit is shown?"}]
    prompt = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    query = processor.decode(processor.tokenizer(prompt)["input_ids"]) + " a three" + ends[0]
    assert queries.read(query, prompt, "") == (chat, " a three", False)


def test_the_command_serves(tmp_path):
    processor = build_processor()
    tokenizer = processor.tokenizer
    tokenizer.chat_template = processor.chat_template
    tokenizer.save_pretrained(tmp_path)
    command = [sys.executable, "-m", "yojo.rewards.openrlhf", "--judge", "length", "--group-size", "1", "--port", "0"]
    command += ["--tokenizer", str(tmp_path), "--normalize", "none", "--empty", "-1"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        said = ""
        while (found := re.search(r"rewards at http://([\d.]+):(\d+)/get_reward", said)) is None:
            said += (line := process.stderr.readline())
            assert line, said
        connection = http.client.HTTPConnection(found[1], int(found[2]), timeout=LONG)
        chat = [{"role": "user", "content": "what ?"}]
        prompt = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        query = tokenizer.decode(tokenizer(prompt)["input_ids"]) + " three " + EOS
        body = json.dumps({"query": [query], "prompts": [prompt], "labels": [""]})
        connection.request("POST", "/get_reward", body)
        assert json.loads(connection.getresponse().read())["rewards"] == [float(len(" three "))]
        connection.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(LONG) == 0
    finally:
        process.kill()
        process.communicate()
