"""`yojo.RemoteJudge` where servers and networks fail, close, change or say nothing, and where nobody waits any more."""

import asyncio
import gc
import json
import logging
import multiprocessing
import pickle
import signal
import socket
import threading
import types
import warnings

import pytest
from endpoint_cases import KEY, LONG, TWO, Hashed, ScoreServer, examples, failed, lists, reply, until

import yojo
from yojo.inputs.digests import digest
from yojo.judges import EndpointError, client, connections


@pytest.fixture()
def clock(monkeypatch):
    """Time goes on while somebody waits in front of a retry, and only then."""
    now, found = [1000.0], []

    def pause(stop, seconds):
        found.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(client, "pause", pause)
    monkeypatch.setattr(client, "time", types.SimpleNamespace(monotonic=lambda: now[0], time=lambda: now[0]))
    return found


# ---- what fails, and passes ----

OVERLOADED = [failed(status, "not now", "x", Retry_After="3") for status in (429, 503, 504)] + [failed(429, "no", "x")]
TRANSIENT = [*OVERLOADED, failed(500, "oh", "x"), "reset", "half", (200, {}, b"<html>"), (200, {}, []), (502, {}, "")]


@pytest.mark.parametrize("way", TRANSIENT, ids=str)
def test_what_may_pass_is_tried_again(way, waits):
    with ScoreServer(Hashed(), way, way) as server, server.remote() as judge:
        judge.fingerprint()
        judge.close()  # on a connection that was kept, a reset would be no failure
        assert lists(judge.score_many([TWO])) == lists(Hashed().score_many([TWO]))
        assert len(server.asked) == 3 and server.asked[0] == server.asked[1] == server.asked[2]
    least = [3, 3] if "Retry-After" in str(way) else [0.5, 1]
    assert len(waits) == 2 and all(wait >= asked for wait, asked in zip(waits, least, strict=True))


@pytest.mark.parametrize("way", [way for way in TRANSIENT if way not in OVERLOADED], ids=str)
def test_what_has_failed_is_counted(way, waits):
    with ScoreServer(Hashed(), *[way] * 9) as server, server.remote(retries=2) as judge:
        judge.fingerprint()
        judge.close()
        with pytest.raises(
            EndpointError, match=f"^example 'two': {server.url}: no answer after 3 tries; the last one: "
        ):
            judge.score_many([TWO])
        assert len(server.asked) == 3 and len(waits) == 2


@pytest.mark.parametrize("way", OVERLOADED, ids=str)
def test_whoever_is_busy_is_asked_until_the_deadline(way, clock):
    with ScoreServer(Hashed(), *[way] * 999) as server:
        judge = server.remote(retries=0, deadline=100)
        with pytest.raises(
            EndpointError, match=r"^example 'two': .*no answer within 100 seconds \(deadline\), after .*: status"
        ):
            judge.score_many([TWO])
        assert len(server.asked) == len(clock) + 1 and 80 < sum(clock) < 100 and max(clock) <= 10
        left = [float(headers["Yojo-Deadline"]) for headers in server.headers[1:]]
        assert left == [
            round(100 - sum(clock[:n]), 3) for n in range(len(left))
        ]  # the server is told how many are left
        server.ways.clear()
        assert judge.score_many([TWO])[0].tolist() == Hashed().score_many([TWO])[0].tolist()


def test_whoever_asks_for_more_time_than_there_is_is_not_waited_for(clock):
    with ScoreServer(Hashed(), failed(429, "later", "x", Retry_After="30")) as server:
        with pytest.raises(EndpointError, match=r"no answer within 20 seconds \(deadline\), after 1 tries.*later"):
            server.remote(deadline=20).score_many([TWO])
    assert not clock


def test_silence(waits):
    with ScoreServer(Hashed(), "silence") as server:
        judge = server.remote(timeout=0.2)
        judge.fingerprint()

        def longer(stop, seconds):
            judge.client.timeout = LONG

        client.pause = longer
        assert judge.score_many([TWO])[0].tolist() == Hashed().score_many([TWO])[0].tolist()
        assert server.gone.acquire(timeout=LONG) and len(server.asked) == 2
    with ScoreServer(Hashed(), *["silence"] * 9) as server:
        judge = server.remote(deadline=0.3)
        with pytest.raises(EndpointError, match=r"within 0.3 seconds \(deadline\)|timed out"):
            judge.score_many([TWO])
        assert server.gone.acquire(timeout=LONG)


def test_nobody_there(waits):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(EndpointError, match="no answer after 3 tries; the last one: .*refused"):
            yojo.RemoteJudge(url, retries=2).score_many([TWO])
    assert len(waits) == 2


MADE = digest(Hashed().fingerprint())
WRONG = {
    "none": (reply([], MADE), "the reply has 0 scores for 2 responses"),
    "too few": (reply([1.0], MADE), "the reply has 1 scores for 2 responses"),
    "too many": (reply([1.0, 2.0, 3.0], MADE), "the reply has 3 scores for 2 responses"),
    "no list": (reply(1.0, MADE), "the reply has no scores for 2 responses"),
    "null": (reply([1.0, None], MADE), "scores that are no numbers"),
    "text": (reply([1.0, "2"], MADE), "scores that are no numbers"),
    "bool": (reply([1.0, True], MADE), "scores that are no numbers"),
    "nan": (reply([1.0, float("nan")], MADE), "scores that are not finite"),
    "infinite": (reply([1.0, float("-inf")], MADE), "scores that are not finite"),
    "beyond float32": (reply([1.0, 1e39], MADE), "scores that are not finite"),
    "no model": ({"scores": [1.0, 2.0]}, "does not say which model has scored"),
    "other model": (reply([1.0, 2.0], "0" * 32), rf"now serves another model \(0{{32}}, it was {MADE}\)"),
    "two models": ((200, {"Yojo-Fingerprint": "1" * 32}, reply([1.0, 2.0], MADE)), "now serves another model"),
    "its own": (failed(424, "the model gave no finite score", "nan", "responses.1"), r"status 424: .*\(responses.1\)"),
    "moved": ((302, {"Location": "http://elsewhere/"}, ""), "status 302: .*it points to http://elsewhere/"),
    "no method": (failed(405, "no", "x"), "status 405"),
}


@pytest.mark.parametrize("way", list(WRONG))
def test_what_is_wrong_is_no_score(way, waits):
    answer, message = WRONG[way]
    with ScoreServer(Hashed(), lambda body: answer) as server:
        with pytest.raises(EndpointError, match=f"^example 'two': {server.url}: .*{message}"):
            list(server.remote().score_each([TWO], errors="return"))  # no fault of the example
        assert len(server.asked) == 1 and not waits


def test_another_model_in_between_is_no_silent_mixture():
    with ScoreServer(Hashed(1)) as server:
        judge = server.remote()
        copied = pickle.loads(pickle.dumps(types.SimpleNamespace(judge=server.remote(api_key=None)))).judge
        assert judge.score_many([TWO])[0].tolist() == Hashed(1).score_many([TWO])[0].tolist()
        server.judge = Hashed(2)
        with pytest.raises(EndpointError, match="the server now serves another model .* a new yojo.RemoteJudge takes"):
            judge.score_many([TWO])
        assert judge.fingerprint() == Hashed(1).fingerprint()
        assert server.remote().score_many([TWO])[0].tolist() == Hashed(2).score_many([TWO])[0].tolist()
        server.key = ""
        assert copied.fingerprint() == Hashed(2).fingerprint()  # it had not been asked yet


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_requests_that_are_refused(status, waits):
    refused = failed(status, "a response is empty", "bad_input", "responses.1")
    with ScoreServer(Hashed(), refused) as server:
        judge = server.remote()
        message = rf"^example 'two': {server.url}: the request is refused, status {status}: a response is empty \(responses.1\)"
        with pytest.raises(ValueError, match=message):
            judge.score_many([TWO])
        server.ways = [refused]
        found = dict(judge.score_each(iter([TWO, *examples(3)]), errors="return"))
        assert sorted(type(one) for one in found.values() if isinstance(one, Exception)) == [ValueError]
        assert len(found) == 4 and not waits
        with pytest.raises(ValueError, match="errors must be 'raise' or 'return', got 'skip'"):
            judge.score_each([], errors="skip")


def test_what_is_too_large_is_not_sent():
    with ScoreServer(Hashed()) as server:
        server.largest = 2000
        judge = server.remote()
        with pytest.raises(
            ValueError, match=f"example 7: a request of 3[0-9]{{3}} bytes, and {server.url} takes 2000 at most"
        ):
            judge.score_many([yojo.Example("q", ["a" * 3000, "b"], id=7)])
        assert not server.asked and judge.score_many([TWO])


def test_a_reply_that_comes_before_the_request_is_read():
    """Servers refuse what is too large by its length, and close; what is left of it cannot be sent."""
    content = json.dumps({"error": {"message": "too large", "param": "images", "code": "x"}}).encode()

    class Unread(ScoreServer):
        def serve(self, request):
            if request.path == "/score":
                self.answer(request, (413, {}, content))
                request.close_connection = True
            else:
                super().serve(request)

    with Unread(Hashed()) as server, pytest.raises(ValueError, match=r"status 413: too large \(images\)"):
        server.remote(retries=0).score("q", ["a" * (1 << 24), "b"])


def test_the_key_is_nowhere(monkeypatch, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("YOJO_API_KEY", KEY)
    with ScoreServer(Hashed()) as server:
        judge = yojo.RemoteJudge(server.url)
        assert judge.score_many([TWO]) and server.headers[-1]["Authorization"] == f"Bearer {KEY}"
        server.key = "another"
        monkeypatch.setattr(server, "whole", None)
        with pytest.raises(
            EndpointError, match=r"status 401: a key is needed \(is api_key, or YOJO_API_KEY, the right one\?\)"
        ):
            judge.score_many([TWO])
        with pytest.raises(EndpointError, match="status 401"):
            yojo.RemoteJudge(server.url, api_key="").fingerprint()
        assert "Authorization" not in server.headers[-1]
        server.key, server.ways = KEY, [(418, {}, f"no {KEY}")]
        with pytest.raises(EndpointError, match=r"no \*\*\*$") as caught:
            judge.score_many([TWO])
        shown = [repr(judge), repr(judge.client), str(caught.value), caplog.text, *capsys.readouterr()]
        assert KEY not in "".join(shown) and KEY.encode() not in pickle.dumps(judge)


# ---- connections ----


def test_connections_are_kept():
    with ScoreServer(Hashed(), failed(422, "no", "x"), failed(500, "no", "x")) as server:
        judge = server.remote(concurrency=1)
        with pytest.raises(ValueError, match="422"):
            judge.score_many([TWO])  # which leaves the connection as it was
        client_pause, client.pause = client.pause, lambda stop, seconds: None
        try:
            for _ in range(3):
                assert judge.score_many(examples(4))
        finally:
            client.pause = client_pause
        assert asyncio.run(judge.ascore_many(examples(4)))
        assert server.connections == 1 and len(server.asked) == 18
        judge.close()
        assert judge.score_many([TWO]) and server.connections == 2
    with ScoreServer(Hashed()) as server:
        judge, together = server.remote(concurrency=4), threading.Barrier(4)

        def rule(body):
            together.wait(LONG)
            return server.scored(body)

        server.ways = [rule] * 40
        assert len(judge.score_many(examples(40))) == 40
        assert server.connections == 4 and len(judge.client._kept) == 4


def test_connections_that_the_server_has_closed(waits, monkeypatch):
    with ScoreServer(Hashed()) as server:
        server.keeps = False  # which it does not say
        judge = server.remote(concurrency=1, retries=0)
        for n in range(1, 4):
            assert judge.score_many([TWO])[0].tolist() == Hashed().score_many([TWO])[0].tolist()
            assert len(server.asked) == n and server.connections == n + 1
        # Nor can it be seen, where the end is still on its way; then the request shows it.
        monkeypatch.setattr(connections, "_has_something", lambda sock: False)
        for n in range(4, 8):
            assert judge.score_many([TWO])[0].tolist() == Hashed().score_many([TWO])[0].tolist()
            assert len(server.asked) == n
    assert not waits


def test_a_connection_that_breaks_under_a_request_is_a_failure_only_where_it_is_new(waits):
    with ScoreServer(Hashed(), "reset") as server:
        judge = server.remote(concurrency=1, retries=0)
        judge.fingerprint()
        assert judge.score_many([TWO]) and len(server.asked) == 2 and not waits
        judge.close()
        server.ways = ["reset"]
        with pytest.raises(EndpointError, match="no answer after 1 tries"):
            judge.score_many([TWO])
        server.ways = ["reset", "reset"]
        judge.fingerprint()
        with pytest.raises(EndpointError, match="no answer after 1 tries"):
            judge.score_many([TWO])


def test_servers_that_say_that_they_close(monkeypatch):
    with ScoreServer(Hashed()) as server:
        judge = server.remote(concurrency=1)
        judge.fingerprint()
        server.ways = [lambda body: (200, {"Connection": "close"}, server.scored(body)[2])]
        assert judge.score_many([TWO]) and len(judge.client._kept) == 0
        assert judge.score_many([TWO]) and len(judge.client._kept) == 1
        monkeypatch.setattr(connections, "LONGEST_IDLE", -1)  # what was idle for long is not trusted
        before = server.connections
        assert judge.score_many([TWO]) and server.connections == before + 1


def test_whoever_forgets_a_judge_leaves_nothing_open():
    with warnings.catch_warnings(), ScoreServer(Hashed(), "half") as server:
        warnings.simplefilter("error")
        judge = server.remote(retries=0)
        with pytest.raises(EndpointError):
            judge.score_many([TWO])
        judge.score_many(examples(3))
        kept = [connection.sock for _, _, connection in judge.client._kept._idle]
        assert kept and all(sock.fileno() >= 0 for sock in kept)
        del judge
        assert until(lambda: gc.collect() is not None and all(sock.fileno() < 0 for sock in kept))


def test_several_threads():
    with ScoreServer(Hashed()) as server:
        judge, found = server.remote(concurrency=3), {}
        threads = [
            threading.Thread(target=lambda n=n: found.update({n: lists(judge.score_many(examples(8)))}))
            for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [found[n] for n in range(4)] == [lists(Hashed().score_many(examples(8)))] * 4
        assert server.most <= 3 and len(server.asked) == 32


def _in_child(judge, sent):
    sent.send((lists(judge.score_many(examples(5))), lists(asyncio.run(judge.ascore_many(examples(2))))))


def test_forked_processes_have_connections_of_their_own():
    context = multiprocessing.get_context("fork")
    with ScoreServer(Hashed()) as server:
        judge = server.remote(concurrency=1)
        expected = lists(judge.score_many(examples(5)))
        assert server.connections == 1
        with judge.client._room:  # a request of another thread is under way while this one forks
            there, here = context.Pipe()
            child = context.Process(target=_in_child, args=(judge, here), daemon=True)
            child.start()
            assert there.poll(LONG) and there.recv() == (expected, expected[:2])
            child.join(LONG)
        assert server.connections == 2
        assert lists(judge.score_many(examples(5))) == expected and server.connections == 2  # the parent's is as it was


def test_pickles(monkeypatch):
    monkeypatch.setenv("YOJO_API_KEY", KEY)
    with ScoreServer(Hashed(1)) as server:
        judge = yojo.RemoteJudge(server.url, model="one", deadline=50, timeout=7, retries=3, concurrency=2)
        judge.fingerprint()
        made = pickle.dumps(judge)
        found = pickle.loads(made)
        assert (found.model, found.deadline, found.client.timeout, found.client.retries) == ("one", 50, 7, 3)
        server.judge = Hashed(2)
        with pytest.raises(EndpointError, match="now serves another model"):  # than the one of the first process
            found.score_many([TWO])
        with pytest.raises(TypeError, match="an api_key goes into no pickle: set YOJO_API_KEY"):
            pickle.dumps(server.remote(api_key="mine"))
        monkeypatch.delenv("YOJO_API_KEY")
        with pytest.raises(EndpointError, match="YOJO_API_KEY is not set in this process"):
            pickle.loads(made)


# ---- nobody waits any more ----


def test_cancelling_a_task_ends_the_request_at_the_server():
    async def cancelled(judge):
        task = asyncio.ensure_future(judge.ascore("q", ["a", "b"]))
        while not server.asked:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(server.gone.acquire, timeout=LONG)
        return await judge.ascore(TWO.prompt, TWO.responses)  # nothing is held

    with ScoreServer(Hashed(), "silence") as server:
        found = asyncio.run(cancelled(server.remote(concurrency=1)))
        assert found.tolist() == Hashed().score_many([TWO])[0].tolist()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_example_that_fails_ends_the_others(asynchronous):
    here = threading.Barrier(3)

    def fails(body):
        here.wait(LONG)
        return failed(422, "no", "x")

    def waits(body):
        here.wait(LONG)
        return "silence"

    with ScoreServer(Hashed(), fails, waits, waits) as server:
        judge = server.remote(concurrency=3)

        def score(many):
            return asyncio.run(judge.ascore_many(many)) if asynchronous else judge.score_many(many)

        with pytest.raises(ValueError, match="status 422"):
            score(examples(9))
        assert all(server.gone.acquire(timeout=LONG) for _ in range(2))
        assert lists(score(examples(9))) == lists(Hashed().score_many(examples(9)))


def test_ctrl_c_ends_what_is_under_way():
    main = threading.get_ident()

    def rule(body):
        signal.pthread_kill(main, signal.SIGINT)
        return "silence"

    with ScoreServer(Hashed(), rule) as server:
        judge = server.remote()
        for score in (lambda: judge.score(TWO.prompt, TWO.responses), lambda: judge.score_many([TWO])):
            server.ways = [rule]
            with pytest.raises(KeyboardInterrupt):
                score()
            assert server.gone.acquire(timeout=LONG)
            assert judge.score_many([TWO])[0].tolist() == Hashed().score_many([TWO])[0].tolist()


def test_whoever_stops_reading_ends_it():
    with ScoreServer(Hashed(), *["silence"] * 3) as server:
        stream = server.remote(concurrency=4).score_each(examples(50))
        next(stream)
        stream.close()
        assert all(server.gone.acquire(timeout=LONG) for _ in range(3)) and len(server.asked) < 20
