"""`/group` and `/get_reward`: samples that come one a call get the rewards of their whole group, and errors that are their own."""

import asyncio
import concurrent.futures
import contextlib
import http.client
import json
import socket
from urllib.parse import urlsplit

import pytest

from tests.reward_cases import demo_judge
from tests.serving.asking import LONG, NAN, Faulty, close, error_of, posts, until
from tests.serving.serving_cases import QUESTION, client_of, data_url, encoded, engine_of, listening, png, run
from yojo.reward_model import RewardModel
from yojo.rewards import Group, GroupScorer, openrlhf_server
from yojo.rewards.openrlhf_server import Queries
from yojo.saving.known_scores import Known
from yojo.serving.roles import Scorer
from yojo.serving.settings import Settings

TEXTS = ["It is a 3.", "This is a seven.", "Nine, I think."]
EOS = "</s>"
POLICY = Queries(eos=[EOS], prompt="text")
SOON = Settings(group_deadline=0.05)
ANNA, BEN = "a-key-of-24-characters-1", "a-key-of-24-characters-2"


def sample(response, key="q", **fields):
    """A request to /group, of three."""
    return {"key": key, "group_size": 3, "prompt": QUESTION, "response": response, **fields}


def wanted(texts=TEXTS, images=(), mode="comparative", prompt=QUESTION):
    """The rewards of a group."""
    return GroupScorer(demo_judge(mode)).score([Group(prompt, texts, images)])[0].rewards


def together(*requests, settings=None, policy=None, **options):
    """Responses to (path, body, API key)s that are asked at the same time, in this order; and the collators' numbers at the end."""

    async def go():
        async with client_of(engine_of(settings, **options), policy=policy) as client:
            groups, tasks = client.app.state.service.groups, []
            for path, body, *keys in requests:
                headers, before = {"x-api-key": keys[0]} if keys else {}, seen(groups)
                task = asyncio.ensure_future(client.post(path, json=body, headers=headers))
                tasks.append(task)
                await until(lambda task=task, before=before: task.done() or seen(groups) > before)
            return [await asyncio.wait_for(task, LONG) for task in tasks], groups.metrics()

    return run(go)


def seen(groups):
    found = groups.metrics()
    return sum(found[f"yojo_collator_samples{kind}_total"] for kind in ("", "_late", "_refused"))


def grouped(*bodies, **options):
    """Responses to samples for /group."""
    return together(*[("/group", body) for body in bodies], **options)[0]


# ---- /group ----


@pytest.mark.parametrize("mode", ["comparative", "isolated"])
def test_samples_of_a_key_get_the_rewards_of_their_group(mode):
    found = grouped(*map(sample, TEXTS), args=(mode,))
    replies = [one.json() for one in found]
    close([one["reward"] for one in replies], wanted(mode=mode))
    for one, reply in zip(found, replies, strict=True):
        assert reply["key"] == "q" and reply["score"] == reply["reward"] and reply["treated"] is None
        assert (reply["group_size"], reply["missing"]) == (3, 0) and reply["seconds"] > 0
        assert one.headers["Yojo-Fingerprint"] == reply["fingerprint"]
    assert sorted(reply["place"] for reply in replies) == [0, 1, 2]


def test_the_order_in_which_samples_come_changes_nothing():
    first, second = (grouped(*[sample(text) for text in texts]) for texts in (TEXTS, TEXTS[::-1]))
    assert [one.json()["place"] for one in first] == [one.json()["place"] for one in second][::-1]
    close([one.json()["reward"] for one in second][::-1], wanted())


def test_groups_of_two_keys_are_apart():
    bodies = [sample(text, key, group_size=2) for text in TEXTS[:2] for key in ("first", "second")]
    found = [one.json()["reward"] for one in grouped(*bodies)]
    close(found[0::2], wanted(TEXTS[:2]))
    close(found[1::2], wanted(TEXTS[:2]))


def test_clients_with_other_api_keys_are_in_no_group_of_ours():
    """Two trainings count their prompts alike, and may well have the same."""
    keys = Settings(keys={ANNA: "anna", BEN: "ben"})
    whose = [(ANNA, "a"), (BEN, "x"), (ANNA, "b"), (BEN, "y")]
    requests = [("/group", sample(text, group_size=2), key) for key, text in whose]
    wrong = ("/group", sample("z", prompt="Why?", group_size=3), ANNA), ("/group", sample("z", group_size=2), ANNA)
    found, _ = together(*requests[:3], wrong[1], requests[3], settings=keys)
    rewards = [one.json().get("reward") for one in found]
    close([rewards[0], rewards[2]], wanted(["a", "b"]))
    close([rewards[1], rewards[4]], wanted(["x", "y"]))
    assert error_of(found[3], 409)["code"] == "late" and found[0].json()["key"] == "q"
    (_, other, *_), _ = together(requests[0], wrong[0], requests[2], settings=keys)
    error = error_of(other, 422)
    assert error["param"] == "key" and not any(said in error["message"] for said in ("'q'", "anna"))
    requests = [(*asked(text), key) for key, text in whose]
    found, _ = together(*requests, settings=Settings(keys=keys.keys, group_size=2), policy=POLICY)
    rewards = [one.json()["rewards"][0] for one in found]
    close(rewards[0::2], rewarded(["a", "b"]))
    close(rewards[1::2], rewarded(["x", "y"]))


def test_images_are_the_same_by_what_they_hold():
    forms = [{"images": [data_url(png())]}, {"images": [encoded(png())]}, {"images": [data_url(png())]}]
    found = grouped(*[sample(text, **form) for text, form in zip(TEXTS, forms, strict=True)])
    close([one.json()["reward"] for one in found], wanted(images=[png()]))
    parts = [{"type": "image_url", "image_url": {"url": data_url(png())}}, {"type": "text", "text": QUESTION}]
    chat = [{"role": "user", "content": parts}]
    found = grouped(*[sample(text, prompt=chat) for text in TEXTS])
    close([one.json()["reward"] for one in found], wanted(images=[png()]))


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"prompt": "Why?"}, "another prompt"),
        ({"images": [data_url(png(1))]}, "other images"),
        ({"group_size": 2}, "group_size is 2, and was 3"),
    ],
)
def test_what_does_not_go_with_its_key_is_an_error(other, text):
    images = {"images": [data_url(png())]}
    bodies = [sample(text, **images) for text in TEXTS]
    found = grouped(bodies[0], {**sample("Ten.", **images), **other}, *bodies[1:])
    error = error_of(found.pop(1), 422)
    assert error["param"] == "key" and text in error["message"] and "'q'" not in error["message"]
    close([one.json()["reward"] for one in found], wanted(images=[png()]))


def test_a_group_that_does_not_become_whole_is_an_error_and_then_late():
    lost, late = posts("/group", sample("a"), sample("b"), settings=SOON)
    assert error_of(lost, 424)["code"] == "incomplete_group"
    error = error_of(late, 409)
    assert (error["code"], error["param"]) == ("late", "key")


def test_a_sample_too_many_is_late():
    found = grouped(*map(sample, TEXTS), sample("one more"))
    assert [one.status_code for one in found] == [200, 200, 200, 409]


def test_a_completion_that_is_not_judged_has_the_lowest_reward():
    found = [one.json() for one in grouped(*map(sample, [*TEXTS[:2], "  "]))]
    close([one["reward"] for one in found[:2]], wanted(TEXTS[:2]))
    assert found[2]["reward"] == min(one["reward"] for one in found[:2])
    assert (found[2]["score"], found[2]["place"], found[2]["treated"]) == (None, None, "empty")


def test_a_size_is_the_servers_where_none_is_said():
    body = sample("a", group_size=None)
    (missing,) = posts("/group", body)
    assert error_of(missing, 422)["param"] == "group_size"
    (alone,) = posts("/group", body, settings=Settings(group_size=1))
    close([alone.json()["reward"]], wanted(["a"]))
    (many,) = posts("/group", sample("a", group_size=1000))
    assert error_of(many, 413)["param"] == "group_size"


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"key": ""}, 422, "key"),
        ({"key": 17}, 422, "key"),
        ({"group_size": 0}, 422, "group_size"),
        ({"response": None}, 422, "response"),
        ({"images": ["%"]}, 422, "images.0"),
        ({"prompt": "<image><image>", "images": [data_url(png())], "group_size": 1}, 422, "prompt"),
        ({"images": [data_url(png()[:60] + png()[100:])], "group_size": 1}, 422, "images.0"),
        ({"prompt": [{"role": "user"}]}, 422, "prompt"),
        ({"model": "another"}, 404, "model"),
        ({"responses": ["a"]}, 422, "responses"),
    ],
)
def test_a_sample_that_is_wrong(fields, status, param):
    (found,) = posts("/group", {**sample("a"), **fields})
    assert error_of(found, status)["param"] == param


def test_a_group_that_is_too_long_is_told_so_once():
    judge = demo_judge()
    scorer = Scorer(RewardModel(judge.model, judge.processor, 30), Known(True, True, "as it was"))
    found, numbers = together(*[("/group", sample(text * 9)) for text in TEXTS], make=lambda: scorer)
    for one in found:
        error = error_of(one, 413)
        assert error["code"] == "too_long" and error["param"] is None
    assert numbers["yojo_collator_call_seconds_count"] == 1


def test_a_group_without_finite_scores_is_an_error_of_its_own():
    async def go():
        model = Faulty()
        model.go.clear()
        async with client_of(engine_of(make=model.scorer)) as client:
            groups = client.app.state.service.groups
            try:
                first = asyncio.ensure_future(client.post("/group", json=sample("a", "first", group_size=1)))
                await until(model.entered.is_set)
                bad = [
                    asyncio.ensure_future(client.post("/group", json=sample(f"b{n}", "bad", group_size=NAN)))
                    for n in range(NAN)
                ]
                good = asyncio.ensure_future(client.post("/group", json=sample("c", "good", group_size=1)))
                await until(lambda: groups.metrics()["yojo_collator_groups_queued"] == 2)  # in one call of the judge
            finally:
                model.go.set()
            found = [await task for task in (first, *bad, good)]
            return found, groups.metrics()["yojo_collator_call_groups_max"]

    (first, *bad, good), most = run(go)
    assert most == 2
    close([first.json()["reward"], good.json()["reward"]], [*wanted(["a"]), *wanted(["c"])])
    assert {error_of(one, 424)["code"] for one in bad} == {"not_finite"} and len(bad) == NAN


def test_a_client_that_leaves_makes_room():
    async def go():
        async with client_of(engine_of()) as client:
            groups = client.app.state.service.groups

            def waiting():
                return groups.metrics()["yojo_collator_samples_waiting"]

            gone = asyncio.ensure_future(client.post("/group", json=sample("gone")))
            await until(lambda: waiting() == 1)
            gone.cancel()
            await until(lambda: waiting() == 0)
            found = await asyncio.gather(*[client.post("/group", json=sample(text)) for text in TEXTS])
            return found, groups._bytes

    found, size = run(go)
    close([one.json()["reward"] for one in found], wanted())
    assert size == 0


def test_a_client_that_leaves_while_its_sample_is_added_leaves_none():
    async def go():
        async with client_of(engine_of()) as client:
            groups, loop = client.app.state.service.groups, asyncio.get_running_loop()
            future, entered, gone = concurrent.futures.Future(), asyncio.Event(), concurrent.futures.Future()

            def add():
                loop.call_soon_threadsafe(entered.set)
                gone.result(LONG)
                return future

            task = asyncio.ensure_future(groups.reward(add, 10))
            await entered.wait()
            task.cancel()
            await asyncio.wait([task])
            gone.set_result(None)
            await until(future.cancelled)
            assert groups._bytes == 0 and not groups._here

    run(go)


def test_at_the_end_groups_that_lack_samples_end_and_whole_ones_are_scored():
    async def go():
        model = Faulty()
        model.go.clear()
        async with client_of(engine_of(make=model.scorer)) as client:
            groups = client.app.state.service.groups
            try:
                whole = asyncio.ensure_future(client.post("/group", json=sample("a", "whole", group_size=1)))
                await until(model.entered.is_set)
                lacks = asyncio.ensure_future(client.post("/group", json=sample("a", "lacks")))
                await until(lambda: groups.metrics()["yojo_collator_samples_waiting"] == 2)
                ending = asyncio.ensure_future(groups.stop(LONG))
                await asyncio.sleep(0)
                assert not ending.done() and not whole.done()
            finally:
                model.go.set()
            await ending
            return await whole, await lacks, await client.post("/group", json=sample("a", "more"))

    whole, lacks, more = run(go)
    close([whole.json()["reward"]], wanted(["a"]))
    for one in (lacks, more):
        assert error_of(one, 503)["code"] == "ending" and one.headers["Retry-After"] == "1"


# ---- OpenRLHF ----


def asked(text, prompt="Why? ", label=""):
    """OpenRLHF's request, as its client sends it: one sample."""
    return "/get_reward", {"query": [f"{prompt}{text}{EOS}"], "prompts": [prompt], "labels": [label]}


def rewarded(texts, prompt="Why? ", mode="comparative"):
    return wanted(texts, mode=mode, prompt=prompt)


def test_openrlhf_gets_the_rewards_of_whole_groups():
    requests = [asked("a"), asked("x", "Who? "), asked("b"), asked("y", "Who? "), asked("c"), asked("d")]
    found, numbers = together(*requests, settings=Settings(group_size=2), policy=POLICY)
    replies = [one.json() for one in found]
    for reply in replies:
        assert list(reply) == ["rewards", "scores", "extra_logs"] and reply["scores"] == reply["rewards"]
        assert reply["extra_logs"]["yojo_group_size"] == [2.0]
    rewards = [reply["rewards"][0] for reply in replies]
    close([rewards[0], rewards[2]], rewarded(["a", "b"]))
    close([rewards[1], rewards[3]], rewarded(["x", "y"], "Who? "))
    close(rewards[4:], rewarded(["c", "d"]))  # the next group of the same prompt
    assert numbers["yojo_collator_groups_complete_total"] == 3 and numbers["yojo_clients_waiting"] == 0


def test_openrlhf_may_send_a_whole_group():
    body = {"query": [f"Why? a{EOS}", "Why? b"], "prompts": ["Why? "] * 2, "labels": ["", ""]}
    (found,) = posts("/get_reward", body, settings=Settings(group_size=2), policy=POLICY)
    close(found.json()["rewards"], rewarded(["a", "b"]))


def test_the_same_prompt_with_another_label_is_another_group():
    requests = [asked(text, label=label) for label in ("7", ["8"]) for text in "ab"]
    found, _ = together(*requests, settings=Settings(group_size=2), policy=POLICY)
    close([one.json()["rewards"][0] for one in found], rewarded(["a", "b"]) * 2)


def test_a_model_that_scores_each_alone_needs_no_size():
    isolated, _ = together(asked("a"), policy=POLICY, args=("isolated",))
    close(isolated[0].json()["rewards"], rewarded(["a"], mode="isolated"))
    comparative, _ = together(asked("a"), policy=POLICY)
    assert error_of(comparative[0], 422)["code"] == "group_size_unknown"
    unknown, _ = together(asked("a"))
    error = error_of(unknown[0], 404)
    assert error["code"] == "not_configured" and "--policy" in error["message"]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"query": ["Why? a"], "prompts": []}, "needed"),
        ({"query": ["Why? a"], "prompts": [], "labels": [""]}, "lists of one length"),
        ({"query": [], "prompts": [], "labels": []}, "lists of one length"),
        ({"query": ["Why? a"], "prompts": ["Who? "], "labels": [""]}, "does not begin with its prompt"),
        ({"query": ["Why? a", "x"], "prompts": ["Why? ", "Why? "], "labels": ["", ""]}, "does not begin with its"),
        ({"query": ["Why? a"], "prompts": ["Why? "], "labels": [""], "more": 1}, "no such field"),
    ],
)
def test_requests_of_openrlhf_that_make_no_sense(body, text):
    found, numbers = together(("/get_reward", body), settings=Settings(group_size=3), policy=POLICY)
    error = error_of(found[0], 422)
    assert text in error["message"] and "Why" not in error["message"]
    assert numbers["yojo_collator_samples_waiting"] == numbers["yojo_clients_waiting"] == 0


def test_a_group_of_openrlhf_that_is_lost_is_an_error_at_once_when_it_comes_again():
    settings = Settings(group_size=2, group_deadline=0.05)
    first, again = posts("/get_reward", asked("a")[1], asked("a")[1], settings=settings, policy=POLICY)
    assert error_of(first, 424)["code"] == "incomplete_group"
    assert error_of(again, 409)["code"] == "late"


class Line:
    """A client that can leave: a connection, without a library that sends again.

    Args:
        url: of the server.
        path, body: what is asked.
    """

    def __init__(self, url, path, body):
        where, data = urlsplit(url), json.dumps(body).encode()
        self.socket = socket.create_connection((where.hostname, where.port), timeout=LONG)
        head = f"POST {path} HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
        self.socket.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)

    def leave(self):
        self.socket.close()

    def reply(self):
        """(status, decoded JSON)."""
        with contextlib.closing(self.socket):
            answer = http.client.HTTPResponse(self.socket)
            answer.begin()
            return answer.status, json.loads(answer.read())


def test_a_client_of_openrlhf_that_comes_again_is_no_other_sample(monkeypatch):
    monkeypatch.setattr(openrlhf_server, "PATIENCE", LONG)
    with listening(engine_of(Settings(group_size=3)), policy=POLICY) as server:
        groups = server.service.groups

        def wait(condition):
            run(lambda: until(condition))

        gone = Line(server.url, *asked("a"))
        wait(lambda: seen(groups) == 1)
        (handed,) = next(iter(groups.desk._handed.values()))
        gone.leave()
        wait(lambda: handed.connection.gone)
        again, twin = Line(server.url, *asked("a")), Line(server.url, *asked("a"))
        wait(lambda: seen(groups) == 2)
        last = Line(server.url, *asked("b"))
        rewards = rewarded(["a", "b"])
        for line, reward in ((again, rewards[0]), (twin, rewards[0]), (last, rewards[1])):
            status, reply = line.reply()
            assert status == 200
            close(reply["rewards"], [reward])
        assert seen(groups) == 3 and len(groups.desk) == 0


def test_a_client_of_openrlhf_that_never_comes_again_takes_its_sample_along(monkeypatch):
    monkeypatch.setattr(openrlhf_server, "PATIENCE", 0.0)
    with listening(engine_of(Settings(group_size=2)), policy=POLICY) as server:
        groups = server.service.groups
        gone = Line(server.url, *asked("stale"))
        run(lambda: until(lambda: seen(groups) == 1))
        gone.leave()

        def swept():
            groups.sweep()
            return groups.metrics()["yojo_collator_samples_waiting"] == 0

        run(lambda: until(swept))
        lines = [Line(server.url, *asked(text)) for text in "ab"]
        close([line.reply()[1]["rewards"][0] for line in lines], rewarded(["a", "b"]))


def test_a_client_of_a_group_that_hangs_up_makes_room():
    with listening(engine_of()) as server:
        groups = server.service.groups
        gone = Line(server.url, "/group", sample("gone"))
        run(lambda: until(lambda: seen(groups) == 1))
        gone.leave()
        run(lambda: until(lambda: groups.metrics()["yojo_collator_samples_waiting"] == 0))
        lines = [Line(server.url, "/group", sample(text)) for text in TEXTS]
        close([line.reply()[1]["reward"] for line in lines], wanted())
