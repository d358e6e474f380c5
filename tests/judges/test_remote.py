"""`yojo.RemoteJudge`: what is sent, whose scores come back, what a server must say first, and names of served judges."""

import asyncio
import base64
import io
import json

import numpy as np
import pytest
import torch
from endpoint_cases import KEY, TWO, Endpoint, Hashed, ScoreServer, decoded, examples, lists
from PIL import Image
from typer.testing import CliRunner

import yojo
from yojo.cli import app
from yojo.judges import EndpointError, load_judge
from yojo.judges.judge import Judge, fingerprint_of, order_free
from yojo.judges.loading import check_name, has_model
from yojo.scoring.scorer import Load

# ---- what is sent, and what comes back ----


def picture(seed=0, channels=3, height=24, width=40):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def file_of(kind, array=None, **options):
    file = io.BytesIO()
    image = Image.fromarray(picture() if array is None else array)
    (image.convert("P") if kind == "GIF" else image).save(file, kind, **options)
    return file.getvalue()


TURNED = Image.Exif()
TURNED[0x0112] = 6


@pytest.mark.parametrize(
    "content, mime",
    [
        (file_of("PNG"), "png"),
        (file_of("PNG", picture(channels=4)), "png"),
        (file_of("PNG", np.full((9, 9), 40000, np.uint16)), "png"),
        (file_of("JPEG", quality=60), "jpeg"),
        (file_of("JPEG", exif=TURNED), "jpeg"),
        (file_of("WEBP"), "webp"),
        (file_of("GIF"), "gif"),
        (file_of("BMP"), "bmp"),
        (file_of("TIFF"), "tiff"),
        (file_of("PPM"), None),
        (file_of("JPEG2000"), None),
    ],
    ids=["png", "transparent", "16 bits", "jpeg", "turned", "webp", "gif", "bmp", "tiff", "ppm", "jpeg 2000"],
)
def test_files_go_as_they_are_or_to_the_pixel(content, mime, tmp_path):
    path = tmp_path / "picture"
    path.write_bytes(content)
    many = [
        yojo.Example("q", ["a", "b"], images=[source]) for source in (content, path, str(path), memoryview(content))
    ]
    with ScoreServer(Hashed()) as server:
        assert lists(server.remote().score_many(many)) == lists(Hashed().score_many(many))
        sent = [decoded(body).images for body in server.asked]
    assert len(sent) == 4 and all((one == [content]) is (mime is not None) for one in sent)


def mixed():
    """Prompts with media of every kind, and in every place."""
    png, frames = file_of("PNG"), [picture(seed, height=28, width=28) for seed in range(3)]
    data_url = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    video = yojo.Video(np.stack(frames), 2.0)
    dark = [
        np.float32(frames[0]),
        np.ones((28, 28, 3), np.float32),
    ]  # of 255, which the first frame says; alone it were white
    text, part = {"type": "text", "text": "See: <image>"}, {"type": "image"}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"a": [1, 2.5, None, True, ("x", "ü")]}}}]
    return [
        yojo.Example("q ☃ \U0001f600 \x00", ["ä", "b\n"], tools=tools),
        yojo.Example("q", ["a"], images=[Image.fromarray(picture(channels=4)), picture(1), torch.zeros(3, 30, 30)]),
        yojo.Example("one <image> two <image>", ["a", "b"], images=[png, file_of("TIFF")]),
        yojo.Example("one <image> two", ["a", "b"]),
        yojo.Example("is <image> a tag?", ["a", "b"], images=[png], literal_tags=True),
        yojo.Example("q", ["a", "b"], videos=[frames, video, dark, [png, Image.fromarray(picture(2)).rotate(1)]]),
        yojo.Example("then <video> now <video>", ["a", "b"], videos=[[np.float32(f) / 255 for f in frames], video]),
        yojo.Example(
            [
                {"role": "system", "content": "Be <b>brief</b>."},
                {"role": "user", "name": "me", "content": [{"type": "image", "image": png}, "and", part, text]},
                {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
                {"role": "tool", "content": "<image> said"},
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url}}, {"type": "image"}]},
            ],
            ["a", "b", "c"],
            images=[picture(3), picture(4)],
            literal_tags=True,
            tools=tools,
        ),
        yojo.Example(
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "video", "video": frames, "fps": 4},
                        {"type": "video", "index": 1},
                        {"type": "text", "text": "then"},
                        {"type": "video", "index": 0},
                        {"type": "image", "index": 1},
                        {"type": "image", "index": 0},
                    ],
                }
            ],
            ["a", "b"],
            images=[picture(5), picture(6)],
            videos=[video, yojo.Video(frames, 0.5)],
        ),
    ]


def test_scores_are_those_of_the_judge_there(tmp_path):
    many = mixed()
    for n in range(12):  # natural order
        Image.fromarray(picture(n)).save(tmp_path / f"frame_{n}.png")
    many += [yojo.Example("q", ["a", "b"], videos=[tmp_path]), *examples(20)]
    expected = lists(Hashed().score_many(many))
    assert len({str(one) for one in expected}) == len(many)
    with ScoreServer(Hashed()) as server, server.remote(concurrency=3) as judge:
        found = judge.score_many(iter(many))
        assert lists(found) == expected and {one.dtype for one in found} == {torch.float32}
        assert dict(judge.score_each(many)).keys() == set(range(len(many)))
        assert lists(asyncio.run(judge.ascore_many(many))) == expected
        one = many[2]
        assert judge.score(one.prompt, one.responses, images=one.images).tolist() == expected[2]
        assert asyncio.run(judge.ascore(one.prompt, one.responses, images=one.images)).tolist() == expected[2]
        one = many[0]
        assert judge.score(one.prompt, one.responses, tools=one.tools).tolist() == expected[0]
        assert judge.score_many([]) == [] == asyncio.run(judge.ascore_many([]))
        assert isinstance(judge, Judge) and repr(judge) == f"RemoteJudge({server.url!r})"
        assert server.paths.count("/v1/models") == 1 and "model" not in server.asked[0] and server.most <= 3


def test_the_demonstrations_model_scores_as_it_does_here(tmp_path):
    from yojo.demo.reward import load_reward_model

    local = load_reward_model()
    seven = file_of("PNG", picture(height=28, width=28))
    many = [yojo.Example("Which digit is it?", ["A 7.", "No idea.", "Seven."][:n], images=[seven]) for n in (1, 2, 3)]
    expected = lists(local.score_many([one])[0] for one in many)
    with ScoreServer(local) as server:
        judge = server.remote()
        assert lists(judge.score_many(many)) == expected
        assert judge.fingerprint() == local.fingerprint() and judge.mode == local.config.mode
        assert order_free(judge) is order_free(local)
        rows = [{"prompt": one.prompt, "responses": one.responses, "image": "seven.png"} for one in many]
        (tmp_path / "seven.png").write_bytes(seven)
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        yojo.score_file(local, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
        before = len(server.asked)
        again = yojo.score_file(
            judge, tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        )  # the same job: nothing is left to do
        assert again.exit_code == 0 and len(server.asked) == before
        yojo.score_file(judge, tmp_path / "in.jsonl", tmp_path / "other.jsonl")
        assert (tmp_path / "other.jsonl").read_text() == (tmp_path / "out.jsonl").read_text()


def test_fingerprints_are_what_the_server_says():
    with ScoreServer(Hashed(3)) as server:
        judge = server.remote()
        found = fingerprint_of(judge)
        assert found == Hashed(3).fingerprint() and judge.order_free is False and judge.mode == "comparative"
        found["of"]["a"].clear()
        assert judge.fingerprint() == Hashed(3).fingerprint()  # which a caller cannot change


@pytest.mark.parametrize(
    "example, message",
    [
        (dict(images=["nowhere.png"]), "example 'bad': image 0: no such file: nowhere.png"),
        (dict(images=[b"nonsense"]), "example 'bad': image 0: 8 bytes is not a readable image"),
        (dict(images=[file_of("PNG"), 7]), "example 'bad': image 1 must be a PIL image, a path, bytes or an array"),
        (dict(videos=[[b"nonsense"]]), "example 'bad': video 0: frame 0: 8 bytes is not a readable image"),
        (dict(videos=[[]]), "example 'bad': video 0: a video with no frames"),
        (dict(tools=[{"a": {1: 2}}]), "example 'bad': tools cannot be sent as JSON: it holds {1: 2}, a dict"),
        (dict(tools=[{"a": float("nan")}]), "example 'bad': tools cannot be sent as JSON: it holds nan, a float"),
        (
            dict(prompt=[{"role": "user", "content": "q", "when": {7}}]),
            "example 'bad': turn 0 cannot be sent as JSON: it holds {7}, a set",
        ),
        (
            dict(prompt=[{"role": "user", "content": [{"type": "image", "image": "nowhere.png"}]}]),
            "example 'bad': turn 0: image: no such file",
        ),
    ],
)
def test_what_cannot_be_sent(example, message):
    bad = yojo.Example(**{"prompt": "q", "responses": ["a", "b"], "id": "bad", **example})
    with ScoreServer(Hashed()) as server:
        judge = server.remote()
        with pytest.raises((TypeError, ValueError), match=message.replace("{", r"\{")):
            judge.score_many([TWO, bad])
        found = dict(judge.score_each([bad, TWO], errors="return"))
        assert str(found[0]).startswith(message) and found[1].tolist() == Hashed().score_many([TWO])[0].tolist()
        assert all("bad" not in json.dumps(body) for body in server.asked)


def test_video_files_and_what_to_do_instead(tmp_path):
    (tmp_path / "a.webm").write_bytes(b"\x1aE\xdf\xa3\xff\xff\xff")
    (tmp_path / "a.bin").write_bytes(b"12345678901234567890")
    with (
        ScoreServer(Hashed()) as server,
        pytest.raises(ValueError, match="is a video file.*give the frames.*yojo.Video"),
    ):
        server.remote().score("q", ["a", "b"], videos=[tmp_path / "a.bin"])


def test_animations_are_refused_here_as_everywhere():
    frames = [Image.fromarray(picture(n)) for n in range(2)]
    content = file_of("PNG", picture(), save_all=True, append_images=frames)
    with ScoreServer(Hashed()) as server, pytest.raises(ValueError, match="image 0: .* holds 3 frames or pages"):
        server.remote().score("q", ["a", "b"], images=[content])
    assert not server.asked


# ---- the first word ----


def models(change):
    """A server whose /v1/models says something else."""

    class Changed(ScoreServer):
        def model(self, name):
            return super().model(name) | change

    return Changed(Hashed())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"digest": "0" * 32}, "the fingerprint of its model did not come as it was"),
        ({"fingerprint": "x"}, "it is no server of `yojo serve`: .* no dict where there is 'x'"),
        ({"mode": None}, "it is no server of `yojo serve`"),
        ({"order_free": 1}, "it is no server of `yojo serve`"),
    ],
)
def test_what_is_no_server_of_ours(change, message, waits):
    with models(change) as server, pytest.raises(EndpointError, match=f"^{server.url}: {message}"):
        list(server.remote().score_each([TWO], errors="return"))
    assert not server.asked and not waits


def test_other_servers(waits):
    listed = {"data": [{"id": "gpt", "object": "model"}]}
    with (
        Endpoint(lambda body: (200, {}, listed)) as endpoint,
        pytest.raises(EndpointError, match="no server of `yojo serve`"),
    ):
        yojo.RemoteJudge(endpoint.url).fingerprint()
    with (
        Endpoint(lambda body: (200, {}, {"hello": 1})) as endpoint,
        pytest.raises(EndpointError, match="no list of models"),
    ):
        yojo.RemoteJudge(endpoint.url).fingerprint()
    with (
        ScoreServer(Hashed()) as server,
        pytest.raises(ValueError, match=r"status 404: .*\(are url and model right\?\)"),
    ):
        list(yojo.RemoteJudge(server.url + "/deep", api_key=KEY).score_each([TWO], errors="return"))


def test_one_of_several_models():
    with ScoreServer(Hashed()) as server:
        server.names = ["one", "two"]
        judge = server.remote(model="two")
        assert judge.score_many([TWO]) and server.asked[0]["model"] == "two"
        assert repr(judge) == f"RemoteJudge({server.url!r}, model='two')"
        with pytest.raises(ValueError, match=f"{server.url}: there is no model 'three', but one, two"):
            list(server.remote(model="three").score_each([TWO], errors="return"))


# ---- names ----


def test_judges_by_address(monkeypatch):
    monkeypatch.setenv("YOJO_API_KEY", KEY)
    with ScoreServer(Hashed()) as server:
        server.names = ["one", "two"]
        for name, model in ((server.url, None), (f"{server.url}/", None), (f"{server.url}#two", "two")):
            judge = load_judge(name)
            assert isinstance(judge, yojo.RemoteJudge) and (judge.url, judge.model) == (server.url, model)
            check_name(name)
            assert not has_model(name)
        assert not server.paths  # nobody is asked for a name
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert lists(Load(server.url)().score_many([TWO])) == lists(Hashed().score_many([TWO]))
        for option, value in dict(base_model="x", dtype="float32", max_length=3, device="cpu").items():
            with pytest.raises(
                ValueError, match=f"{option}=.* is given, and the served judge http://.* has no model here"
            ):
                load_judge(server.url, **{option: value})


@pytest.mark.parametrize(
    "name, message",
    [
        ("http://u:secret@h", "url must hold no user name and no password.*pass api_key"),
        ("http://h/?key=secret", "url must have no query"),
        ("http://h:8000/score", "url must end in front of /score"),
        ("http:///x", "url must be an address with a host"),
        ("http://h:port", "url cannot be read"),
        ("http://h#", "nothing stands behind #"),
        ("http://h# ", "nothing stands behind #"),
    ],
)
def test_names_that_are_none(name, message):
    for ask in (load_judge, check_name):
        with pytest.raises(ValueError, match=message) as caught:
            ask(name)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"url": "localhost:8000"}, ValueError, r"url must be the http\(s\) address of a server of `yojo serve`"),
        ({"url": None}, ValueError, "url must be"),
        ({"model": " "}, ValueError, "model must be the name of a model at the server, or None"),
        ({"deadline": 0}, ValueError, "deadline must be more than 0"),
        ({"deadline": None}, TypeError, "deadline must be a number"),
        ({"timeout": float("inf")}, ValueError, "timeout must be more than 0 and finite"),
        ({"retries": -1}, ValueError, "retries must be at least 0"),
        ({"concurrency": 0}, ValueError, "concurrency must be at least 1"),
        ({"api_key": "a\nb"}, ValueError, "api_key must be a string of printable ASCII"),
    ],
)
def test_bad_arguments(change, error, message):
    options = {"url": "http://h", **change}
    with pytest.raises(error, match=message):
        yojo.RemoteJudge(options.pop("url"), **options)


def test_whoever_takes_judges_takes_it():
    with ScoreServer(Hashed()) as server:
        found = []
        for judge in (Hashed(), server.remote()):
            reward = yojo.GroupReward(judge, group_size=2)
            rewards = reward(prompts=["q0", "q1"] * 2, completions=["a", "b", "c", "d"])
            bias = yojo.order_bias(judge, examples(3), orders=2).to_dict()
            assert bias.pop("judge") == type(judge).__name__
            found.append((list(rewards), bias))
        assert found[0] == found[1] and len(set(found[0][0])) == 4
        assert len(server.asked) >= 2 + 3 * 2


def test_on_the_command_line(monkeypatch, tmp_path):
    monkeypatch.setenv("YOJO_API_KEY", KEY)
    Image.fromarray(picture()).save(tmp_path / "a.png")
    runner = CliRunner()
    with ScoreServer(Hashed()) as server:
        words = ["score", str(tmp_path / "a.png"), "--prompt", "q", "--response", "a", "--response", "b", "--json"]
        found = runner.invoke(app, [*words, "--model", server.url])
        assert found.exit_code == 0, found.output
        expected = Hashed().score_many([yojo.Example("q", ["a", "b"], images=[tmp_path / "a.png"])])[0].tolist()
        assert [row["score"] for row in json.loads(found.stdout)["scores"]] == expected
        found = runner.invoke(app, [*words, "--model", server.url, "--dtype", "bfloat16"])
        assert found.exit_code == 2 and "the served judge" in found.output
        server.key = "another"
        found = runner.invoke(app, [*words, "--model", server.url])
        assert found.exit_code == 2 and "is api_key, or YOJO_API_KEY, the right one?" in found.output
