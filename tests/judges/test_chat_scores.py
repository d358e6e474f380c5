"""Models whose own code scores chats, as judges: what reaches that code, and that its scores come back as they are."""

import json

import numpy as np
import pytest
import real_processors
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from turn_cases import tokenizer_of_kind

import yojo
from yojo.judges import ChatScores, load_judge
from yojo.scoring.job import differences

CODE = '''
import numpy as np
import torch
import transformers
from PIL import Image

class SeenConfig(transformers.PretrainedConfig):
    model_type = "seen"

class Seen(transformers.PreTrainedModel):
    config_class = SeenConfig

    def __init__(self, config):
        super().__init__(config)
        self.weight = torch.nn.Linear(3, 1)
        self.dropout = torch.nn.Dropout(0.5)
        self.calls = []
        self.post_init()

    def get_scores(self, conversations, images, max_length=16384, hd_num=24):
        """Letters, pixels and tiles, weighted; cut to max_length, and a bare number for one chat, as the original's."""
        rows = []
        for chat, files in zip(conversations, images):
            assert all(isinstance(file, str) and isinstance(turn["content"], str) for file in files for turn in chat)
            text = "".join(f"<{turn['role']}>{turn['content']}" for turn in chat)[:max_length]
            letters = sum((n % 7 + 1) * ord(letter) for n, letter in enumerate(text)) / 1e4
            pixels = sum((n + 1) * np.asarray(Image.open(file).convert("RGB")).mean() for n, file in enumerate(files))
            rows.append([letters, pixels / 100, hd_num])
        self.calls.append((conversations, images, torch.is_inference_mode_enabled()))
        return self.dropout(self.weight(torch.tensor(rows, dtype=torch.float32))).squeeze().tolist()
'''
scope = {"__name__": "seen"}
exec(CODE, scope)


def model():
    torch.manual_seed(0)
    made = scope["Seen"](scope["SeenConfig"]())
    torch.nn.init.normal_(made.weight.weight)
    made.tokenizer = tokenizer_of_kind("bytes")
    return made.train()


def by_hand(made, chat, pictures=(), hd_num=9):
    text = "".join(f"<{role}>{content}" for role, content in chat)
    letters = sum((n % 7 + 1) * ord(letter) for n, letter in enumerate(text)) / 1e4
    pixels = sum((n + 1) * np.asarray(picture).mean() for n, picture in enumerate(pictures)) / 100
    weight, bias = made.weight.weight[0].tolist(), made.weight.bias.item()
    return weight[0] * letters + weight[1] * pixels + weight[2] * hd_num + bias


PICTURE, OTHER = real_processors.image(24, 18, 1), real_processors.image(8, 30, 2)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_scores_are_those_of_the_code(batch_size):
    made = model()
    found = ChatScores(made, batch_size=batch_size, hd_num=4)
    examples = [
        yojo.Example("Is it?", ["yes", "no, it is not", "who knows"]),
        yojo.Example([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "And?"}], ["so"]),
        yojo.Example("Which?", ["a dog", "a cat"], images=[PICTURE]),
    ]
    scores = found.score_many(iter(examples))
    expected = [
        [by_hand(made, [("user", "Is it?"), ("assistant", r)], hd_num=4) for r in examples[0].responses],
        [by_hand(made, [("system", "Be brief."), ("user", "And?"), ("assistant", "so")], hd_num=4)],
        [by_hand(made, [("user", "Which?"), ("assistant", r)], [PICTURE], 4) for r in examples[2].responses],
    ]
    for some, wanted in zip(scores, expected, strict=True):
        assert some.dtype == torch.float32 and some.tolist() == pytest.approx(wanted, abs=1e-4)
    assert max(len(chats) for chats, _, _ in made.calls) == min(batch_size, 3)
    assert all(inference for _, _, inference in made.calls) and made.training  # scored without dropout, then as before
    assert found.order_free is True and found.score_many([]) == []


def test_nothing_is_cut():
    made = model()
    text = "word " * 5000
    scores = ChatScores(made).score_many([yojo.Example("Is it?", [text, text + "end"])])[0]
    wanted = [by_hand(made, [("user", "Is it?"), ("assistant", r)]) for r in (text, text + "end")]
    assert scores.tolist() == pytest.approx(wanted, rel=1e-5) and scores[0] != scores[1]


def parts(*content, role="user"):
    return {"role": role, "content": [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]}


def test_where_images_stand():
    image = [{"type": "image", "image": p} for p in (PICTURE, OTHER)]
    answer = {"role": "assistant", "content": "A dog."}
    system = {"role": "system", "content": "Be brief."}
    cases = [
        ("What?", [PICTURE], ["What?"]),
        ("What?", [PICTURE, OTHER], ["Image1 <ImageHere>; Image2 <ImageHere>; What?"]),
        ("<image>What? <image>And?", [PICTURE, OTHER], ["Image1 <ImageHere>; What? Image2 <ImageHere>; And?"]),
        ("What is <image>here?", [PICTURE], ["What is <ImageHere>here?"]),
        ([system, parts(image[0], "What?")], [], ["Be brief.", "What?"]),
        ([parts("What?", image[0])], [], ["What?<ImageHere>"]),
        ([parts("Hi."), answer, parts(image[0], "What?")], [], ["Hi.", "A dog.", "<ImageHere>What?"]),
        (
            [parts(image[0], "What?"), answer, parts("And", image[1], "here?")],
            [],
            ["Image1 <ImageHere>; What?", "A dog.", "AndImage2 <ImageHere>; here?"],
        ),
    ]
    for prompt, images, texts in cases:
        made = model()
        ChatScores(made).score_many([yojo.Example(prompt, ["yes"], images=images)])
        ((chats, files, _),) = made.calls
        assert [turn["content"] for turn in chats[0]] == [*texts, "yes"]
        assert len(files[0]) == 1 + any("Image2" in text for text in texts)


def test_files_show_what_a_person_sees(tmp_path):
    plain, turned, strange = tmp_path / "plain.PNG", tmp_path / "turned.jpg", tmp_path / "strange.tiff"
    PICTURE.save(plain)
    exif = Image.Exif()
    exif[0x0112] = 6
    PICTURE.save(turned, exif=exif, quality=95)
    PICTURE.save(strange)
    upright = Image.open(turned).transpose(Image.Transpose.ROTATE_270)
    seen = []

    class Seen(scope["Seen"]):
        def get_scores(self, chats, images, hd_num):
            seen.extend((file, np.asarray(Image.open(file).convert("RGB"))) for file in images[0])
            return [0.0 for _ in chats]

    made = Seen(scope["SeenConfig"]())
    made.tokenizer = tokenizer_of_kind("bytes")
    sources = [str(plain), plain, turned, str(strange), plain.read_bytes(), PICTURE, np.asarray(PICTURE)]
    found = ChatScores(made)
    found.score_many([yojo.Example("What?", ["yes"], images=sources)])
    assert [file == str(plain) for file, _ in seen] == [True, True, *[False] * 5]
    assert str(turned) not in [file for file, _ in seen] and str(strange) not in [file for file, _ in seen]
    for n, (file, pixels) in enumerate(seen):
        assert np.array_equal(pixels, np.asarray(upright if n == 2 else PICTURE)) and file.lower().endswith(".png")


def test_what_is_refused():
    found = ChatScores(model())
    video = yojo.Video(real_processors.frames(4), fps=2)
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    call = {"role": "assistant", "content": "", "tool_calls": [tool]}
    bad = [
        (yojo.Example("What?", ["yes"], videos=[video], id="v"), "example 'v': the prompt has videos"),
        (yojo.Example("What?", ["yes"], tools=[tool]), "the prompt has tools"),
        (yojo.Example("What is <ImageHere>?", ["yes"]), r"spells '<ImageHere>', which the model's code cannot tell"),
        (yojo.Example("What?", ["see <ImageHere>"]), "spells '<ImageHere>'"),
        (yojo.Example("What?", ["no[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]assistant\nyes"]), "spells '.UNUSED_TOKEN_'"),
        (yojo.Example("What?", ["no</s>"]), "spells '</s>'"),
        (yojo.Example("What is <image>?", ["yes"]), "the tag <image>, but no images are given"),
        (yojo.Example([parts("Hi."), call, parts("So?")], ["yes"]), "the field tool_calls"),
        (yojo.Example([parts("Hi."), parts("1", role="tool"), parts("So?")], ["yes"]), "the role tool"),
        (yojo.Example("What?", ["yes"], images=["nowhere.png"], id=3), r"example 3: image 0"),
    ]
    for example, message in bad:
        with pytest.raises(ValueError, match=message):
            found.score_many([example])
    for options in ({"hd_num": 0}, {"hd_num": 2.0}, {"batch_size": 0}, {"batch_size": True}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be an int of at least 1"):
            ChatScores(model(), **options)
    with pytest.raises(TypeError, match=r"with get_scores\(chats, images\), got Linear"):
        ChatScores(torch.nn.Linear(1, 1))
    made = model()
    made.get_scores = lambda chats, images: [0.0]
    with pytest.raises(TypeError, match="get_scores takes no hd_num"):
        ChatScores(made)
    made = model()
    made.tokenizer = None
    with pytest.raises(ValueError, match="has no tokenizer"):
        ChatScores(made)
    made = model()
    made.get_scores = lambda chats, images, hd_num: [0.0]
    with pytest.raises(RuntimeError, match="gave 1 scores for 2 chats"):
        ChatScores(made, batch_size=2).score_many([yojo.Example("What?", ["yes", "no"])])


def test_folders_and_fingerprints(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, made = tmp_path / "model", model()
    made.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    (folder / "code_of_it.py").write_text(CODE)
    settings = json.loads((folder / "config.json").read_text())
    settings["auto_map"] = {"AutoConfig": "code_of_it.SeenConfig", "AutoModel": "code_of_it.Seen"}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="trust_remote_code must be True, got False: .* read them first"):
        ChatScores.from_pretrained(folder, trust_remote_code=False)
    with pytest.raises(TypeError, match="trust_remote_code"):
        ChatScores.from_pretrained(folder)
    found = load_judge(f"chat-scores:{folder}", device="cpu")
    example = yojo.Example("Which?", ["a dog", "a cat"], images=[PICTURE])
    wanted = ChatScores(made).score_many([example])[0]
    assert found.hd_num == 9 and torch.equal(found.score_many([example])[0], wanted)
    assert not found.model.training and repr(found) == f"ChatScores(Seen, {str(folder)!r})"
    before = found.fingerprint()
    assert json.loads(json.dumps(before)) == before and differences(before, ChatScores(made).fingerprint()) == []

    def told(other):
        return [line.split(":")[0] for line in differences(before, other.fingerprint())]

    assert told(ChatScores(made, hd_num=8)) == ["hd_num"] and told(ChatScores(made, batch_size=3)) == []
    with torch.no_grad():
        made.weight.weight[0, 0] += 1e-6
    assert told(ChatScores(made)) == ["weights"]
    for option, value in (("max_length", 9), ("base_model", "x")):
        with pytest.raises(ValueError, match=f"{option}={value!r} is given, and chat-scores:.* takes none"):
            load_judge(f"chat-scores:{folder}", **{option: value})
    with pytest.raises(ValueError, match="names no model"):
        load_judge("chat-scores:")
    with pytest.raises(ValueError, match="is no model whose code scores chats"):
        load_judge(f"chat-scores:{tmp_path}")
    file = folder / "model.safetensors"
    save_file({"weight.weight": load_file(file)["weight.weight"]}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights of its model: weight.bias; .* random numbers"):
        load_judge(f"chat-scores:{folder}")
