"""The pages in a headless Chromium: by keyboard, in light and dark; texts stay texts, and no other host is asked."""

import base64
import contextlib
import json

import chromium_cases
import page_cases
import pytest

ANSWERS = ["No.", "A cat sleeps on a red sofa.", "A cat, I think."]
BEST_FIRST = [1, 2, 0]
MARKUP = '<img src=x onerror="window.broken = 1"><script>window.broken = 2</script>'


@pytest.fixture(scope="module")
def browser():
    path = chromium_cases.find()
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(chromium_cases.NAMES)} is installed")
    with chromium_cases.started(path) as browser:
        yield browser


@pytest.fixture()
def opened(browser):
    """Opens a page of a server of its own; afterwards nothing was asked of another host, and the console is empty."""
    with contextlib.ExitStack() as stack:
        tabs = []

        def tab(path="/", width=1280, dark=False, **settings):
            app = page_cases.application(**settings)
            address = stack.enter_context(page_cases.served(app))
            page = chromium_cases.Page(browser, width=width, dark=dark)
            stack.callback(page.close)
            page.go(address + path)
            page.app, page.address = app, address
            page.until("document.querySelector('.operation, .state[data-kind]')")
            tabs.append(page)
            return page

        yield tab
        for page in tabs:
            assert page.complaints() == []
            asked = page.requests()
            assert len(asked) >= 5
            assert [url for url in asked if not url.startswith((page.address + "/", "data:", "blob:"))] == []


def fill(page, prompt="What is shown?", answers=ANSWERS):
    """Writes a prompt and answers, as fast as no keyboard could."""
    page.evaluate(f"""(() => {{
        const write = (field, text) => {{ field.value = text; field.dispatchEvent(new Event("input", {{bubbles: true}})); }};
        const [prompt, answers] = {json.dumps([prompt, answers])};
        write(document.getElementById("prompt"), prompt);
        const fields = () => [...document.querySelectorAll("#answers textarea")];
        while (fields().length < answers.length) document.getElementById("add").click();
        fields().forEach((field, index) => write(field, answers[index] ?? ""));
    }})()""")


def scored(page):
    page.press("Enter", "Control")
    page.until(
        "!document.getElementById('shown').hidden && document.getElementById('form').getAttribute('aria-busy') === 'false'"
    )


def texts(page, selector):
    return page.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].map((one) => one.textContent)")


def focused(page):
    return page.evaluate("document.activeElement.id")


def refused(page, selector):
    """Waits for an error at the element that has the focus then; its text, and that a screen reader is told."""
    page.until(f"document.activeElement.matches({json.dumps(selector)})")
    return page.evaluate("""(() => {
        const at = document.activeElement;
        const told = at.role === "alert" || at.matches("[role=alert]") ? [at] : (at.getAttribute("aria-describedby") ?? "").split(" ")
            .map((id) => document.getElementById(id)).filter((one) => one.matches("[role=alert]"));
        return told.map((one) => one.textContent).join();
    })()""")


def test_by_keyboard_alone(opened):
    page = opened()
    page.tab_to("at.id === 'prompt'")
    page.type("What is shown?")
    for number, answer in enumerate(ANSWERS[:2]):
        page.tab_to("at.matches('#answers textarea')")
        page.type(answer)
        assert page.evaluate("document.activeElement.labels[0].textContent") == f"Answer {number + 1}"
    page.tab_to("at.id === 'add'")
    page.press("Space")
    page.type(ANSWERS[2])  # the new answer has the focus
    page.press("Enter")
    page.type("Or two.")
    page.tab_to("at.id === 'score'")
    page.press("Enter")
    page.until("!document.getElementById('shown').hidden")
    (sent,) = page.app.state.seen
    assert (sent.prompt, sent.responses, sent.images, sent.details) == (
        "What is shown?",
        [*ANSWERS[:2], f"{ANSWERS[2]}\nOr two."],
        None,
        True,
    )
    assert texts(page, ".result .text") == [sent.responses[1], sent.responses[2], sent.responses[0]]
    assert focused(page) == "score"
    summary = page.evaluate("document.querySelector('#summary[role=status]').textContent")
    assert summary == "Of 3 answers, answer 2 is the best with 2.1250: 0.5000 ahead of answer 3."
    page.tab_to("at.value === 'zero'")
    page.press("ArrowRight")
    assert page.evaluate("document.getElementById('axis').textContent").startswith("Bars start at the lowest score")


def test_answers_are_moved_and_removed_by_keyboard(opened):
    page = opened()
    fill(page)
    page.tab_to("at.ariaLabel === 'Move down: answer 1'")
    page.press("Enter")
    assert page.evaluate("document.activeElement.ariaLabel") == "Move down: answer 2"
    page.press("Space")
    page.press("Space")  # it is the last one now
    assert texts(page, "#moved") == ["Answer 3 now, of 3"]
    page.evaluate("document.querySelector('[data-does=Remove]').focus()")
    page.press("Enter")
    assert page.evaluate("document.activeElement.labels[0].textContent") == "Answer 1"
    scored(page)
    assert page.app.state.seen[0].responses == [ANSWERS[2], ANSWERS[0]]


def test_ranking(opened):
    page = opened(mode="comparative", orders=2)
    fill(page, answers=[*ANSWERS, "Yes"])
    scored(page)
    assert texts(page, ".who") == ["Answer 2", "Answer 3", "Answer 1", "Answer 4"]
    assert texts(page, ".rank") == ["Place 1", "Place 2", "Place 3", "Place 3"]
    assert texts(page, ".result .score") == ["2.1250", "0.6250", "−0.8750", "−0.8750"]
    assert texts(page, ".behind") == ["", "1.5000 behind", "3.0000 behind", "3.0000 behind"]
    assert texts(page, ".result.best .who") == ["Answer 2"]
    bars = """[...document.querySelectorAll('.bar, .origin')].map((one) =>
        [one.className, parseFloat(one.style.left).toFixed(2), one.style.width && parseFloat(one.style.width).toFixed(2)])"""
    zero = 100 * 0.875 / 3  # from -0.875 to 2.125
    spans = [(zero, 2.125), (zero, 0.625), (0, 0.875), (0, 0.875)]
    drawn = [["bar", f"{left:.2f}", f"{100 * length / 3:.2f}"] for left, length in spans]
    assert page.evaluate(bars)[::2] == drawn and page.evaluate(bars)[1] == ["origin", f"{zero:.2f}", ""]
    assert "from −0.8750 to 2.1250" in page.evaluate("document.getElementById('axis').textContent")
    assert "order matters" in page.evaluate("document.getElementById('order').textContent")
    facts = texts(page, "#facts dd")
    assert facts[:3] == ["by-rule", page_cases.FINGERPRINT, "43 of the prompt, 17 of answers"]
    stale = "!document.getElementById('stale').hidden"
    assert not page.evaluate(stale)
    fill(page, "Something else?")
    assert page.evaluate(stale)
    fill(page, answers=["Same", "Same"] + ["S"] * 2)
    scored(page)
    assert not page.evaluate(stale)
    assert texts(page, "#summary") == ["2 answers of 4 share the best score, −0.7500."]


@pytest.mark.parametrize(("mode", "orders"), (("isolated", 1), ("comparative", 1), ("comparative", 3)))
def test_mask(opened, mode, orders):
    """Points in the middle of every block are in the drawing where `sees` has them; within a segment, below the diagonal."""
    page = opened(mode=mode, orders=orders)
    fill(page)
    scored(page)
    segments = page_cases.row("What is shown?", ANSWERS, mode=mode, orders=orders)["segments"]
    for drawn in ("tokens", "evenly"):
        page.evaluate(f"document.querySelector('input[value={drawn}]').click()")
        sizes = [one["tokens"] if drawn == "tokens" else 1 for one in segments]
        found = page.evaluate(f"""(() => {{
            const sizes = {sizes};
            const svg = document.getElementById("mask");
            const side = Number(svg.querySelector(".frame").getAttribute("width"));
            const unit = side / sizes.reduce((sum, size) => sum + size, 0);
            const starts = sizes.map((_, i) => sizes.slice(0, i).reduce((sum, size) => sum + size, 0));
            const seen = (x, y) => ["prompt", "own", "earlier"].filter((name) => {{
                const path = svg.querySelector("path." + name);
                return path && path.isPointInFill(Object.assign(svg.createSVGPoint(), {{x: x * unit, y: y * unit}}));
            }}).join();
            return sizes.map((height, i) => sizes.map((width, j) => [0.25, 0.75].map((part) =>
                seen(starts[j] + width * (1 - part), starts[i] + height * part))));
        }})()""")
        for i, looks in enumerate(segments):
            for j, seen in enumerate(segments):
                kind = "prompt" if seen["kind"] == "prompt" else "own" if i == j else "earlier"
                expected = ["", kind] if i == j else [kind, kind] if j in looks["sees"] else ["", ""]
                assert found[i][j] == expected, (drawn, i, j)
    table = page.evaluate(
        "[...document.querySelectorAll('#mask-rows tr')].map((one) => [...one.cells].map((cell) => cell.textContent))"
    )
    assert [tokens for _, tokens, _ in table] == [str(one["tokens"]) for one in segments]
    last = "Answer 2 in order 3" if orders == 3 else "Answer 3"  # 3, 1, 2 is the third order
    assert table[-1][0] == last and table[-1][2].startswith("Prompt, ") and table[-1][2].endswith("itself")
    assert table[-1][2].count("Answer") == (0 if mode == "isolated" else 2)
    name = page.evaluate("document.getElementById('mask-text').textContent")
    assert name.startswith(f"One row of {sum(one['tokens'] for one in segments)} tokens")
    assert ("never another answer" in name) == (mode == "isolated")


def test_files_are_sent_as_they_are(opened, tmp_path):
    page = opened()
    chosen, dropped, pasted = (page_cases.PNG + b"and what is behind it %d" % number for number in range(3))
    (tmp_path / "chosen.png").write_bytes(chosen)
    (tmp_path / "text.txt").write_text("no image")
    page.choose_files("#files", [tmp_path / "chosen.png", tmp_path / "text.txt"])
    page.until(
        "document.querySelectorAll('.image').length === 1 && document.querySelector('#images-error').textContent"
    )
    assert refused(page, "#files") == "text.txt is not an image."
    page.evaluate(f"""(() => {{
        const carry = (text, name) => {{
            const data = new DataTransfer();
            data.items.add(new File([Uint8Array.from(atob(text), (one) => one.charCodeAt(0))], name, {{type: "image/png"}}));
            return data;
        }};
        const [dropped, pasted] = {json.dumps([base64.b64encode(one).decode() for one in (dropped, pasted)])};
        const how = {{bubbles: true, cancelable: true}};
        document.body.dispatchEvent(new DragEvent("drop", {{...how, dataTransfer: carry(dropped, "dropped.png")}}));
        document.getElementById("prompt").dispatchEvent(new ClipboardEvent("paste", {{...how, clipboardData: carry(pasted, "pasted.png")}}));
    }})()""")
    page.until("[...document.querySelectorAll('.image img')].filter((one) => one.naturalWidth === 8).length === 3")
    assert texts(page, ".file") == ["chosen.png", "dropped.png", "pasted.png"]
    page.evaluate("document.querySelector('.image [data-does=\"Move down\"]').click()")
    fill(page)
    scored(page)
    (sent,) = page.app.state.seen
    kinds, data = zip(*(url.split(",") for url in sent.images), strict=True)
    assert set(kinds) == {"data:image/png;base64"}
    assert [base64.b64decode(one) for one in data] == [dropped, chosen, pasted]


def test_errors_stand_at_the_field_that_is_wrong(opened, tmp_path):
    page = opened(limits={"image_bytes": 500, "body": 2000})
    fill(page, prompt="")
    page.press("Enter", "Control")
    assert refused(page, "#prompt[aria-invalid=true]") == "The prompt is empty."
    fill(page, answers=["Yes", ""])
    page.press("Enter", "Control")
    assert refused(page, "#answers li:nth-child(2) textarea[aria-invalid=true]") == "The response is empty."
    assert page.evaluate("document.querySelectorAll('[aria-invalid]').length") == 1  # the prompt is right now
    (tmp_path / "good.png").write_bytes(page_cases.PNG)
    (tmp_path / "broken.png").write_bytes(b"nothing")
    fill(page)
    page.choose_files("#files", [tmp_path / "good.png", tmp_path / "broken.png"])
    page.until("document.querySelector('.image:nth-child(2) .blank')")
    page.press("Enter", "Control")
    assert refused(page, ".image:nth-child(2)") == "This is no image that can be read."
    for _ in range(2):
        page.evaluate("document.querySelector('.image [data-does=Remove]').click()")
    fill(page, prompt="busy")
    page.press("Enter", "Control")
    assert refused(page, "#form-error") == "Too much is waiting. Ask again in 7 s."
    asked = len(page.app.state.seen)
    (tmp_path / "large.png").write_bytes(page_cases.PNG + bytes(500))
    page.choose_files("#files", [tmp_path / "large.png"])
    page.until("document.querySelector('.image')")
    page.press("Enter", "Control")
    assert refused(page, ".image") == "The file has 0.6 KiB, and the server takes 0.5 KiB."
    page.evaluate("document.querySelector('.image [data-does=Remove]').click()")
    fill(page, prompt="x" * 3000)
    page.press("Enter", "Control")
    assert refused(page, "#form-error").startswith("All together are 3.0 KiB")
    assert len(page.app.state.seen) == asked  # what is too large is not sent
    fill(page)
    page.evaluate(
        "while (document.querySelector('#answers [data-does=Remove]')) document.querySelector('#answers [data-does=Remove]').click()"
    )
    page.press("Enter", "Control")
    page.until("document.getElementById('answers-error').textContent === 'At least one response is needed.'")
    assert focused(page) == "add"


def test_text_stays_text(opened):
    page = opened()
    fill(page, prompt=MARKUP, answers=[MARKUP, "Yes"])
    page.evaluate(f"""(() => {{
        const data = new DataTransfer();
        data.items.add(new File(["x"], {json.dumps(MARKUP)}, {{type: "image/png"}}));
        document.dispatchEvent(new ClipboardEvent("paste", {{bubbles: true, clipboardData: data}}));
    }})()""")
    page.until("document.querySelector('.image .blank')")
    assert texts(page, ".file") == [MARKUP]
    page.evaluate("document.querySelector('.image [data-does=Remove]').click()")
    scored(page)
    assert texts(page, ".result .text") == [MARKUP, "Yes"]
    assert page.evaluate("document.querySelectorAll('#results img, #results script, #form img').length") == 0
    assert page.evaluate("window.broken") is None
    assert [url for url in page.requests() if url.endswith("/x")] == []
    tried = "(() => { try { document.body.innerHTML = '<p>'; return 'done'; } catch (error) { return error.name; } })()"
    assert page.evaluate(tried) == "TypeError"  # not even a script of ours can
    page.browser.events = [
        one for one in page.browser.events if one["method"] != "Log.entryAdded"
    ]  # which it says, too


def test_cancelled(opened):
    page = opened()
    fill(page)
    page.app.state.hold.clear()
    page.press("Enter", "Control")
    page.until("!document.getElementById('cancel').hidden")
    assert page.evaluate("document.getElementById('form').getAttribute('aria-busy')") == "true"
    page.press("Enter", "Control")  # not twice at once
    page.tab_to("at.id === 'cancel'")
    page.press("Enter")
    page.until("document.getElementById('moved').textContent === 'Cancelled'")
    assert focused(page) == "score" and page.evaluate("document.getElementById('cancel').hidden")
    page.app.state.hold.set()
    scored(page)
    assert len(page.app.state.seen) <= 2
    assert texts(page, ".who") == [f"Answer {index + 1}" for index in BEST_FIRST]


def test_key(opened):
    page = opened(key="open sesame")
    assert texts(page, "#state") == ["The server asks for an API key"]
    fill(page)
    page.press("Enter", "Control")
    assert refused(page, "#key[aria-invalid=true]") == "The API key is missing or wrong."
    page.type("open sesame")
    page.press("Enter")
    page.until("document.querySelector('#model strong')")
    assert (
        page.evaluate("Object.keys(sessionStorage).length + Object.keys(localStorage).length") == 0
    )  # unless asked to
    scored(page)
    page.evaluate("document.getElementById('keep').click()")
    assert page.evaluate("sessionStorage.getItem('yojo-key')") == "open sesame"
    page.go(page.address)
    page.until("document.querySelector('#model strong')")
    page.evaluate("document.getElementById('keep').click()")
    assert page.evaluate("sessionStorage.length") == 0


def test_why_the_server_is_not_ready(opened):
    page = opened(reasons=("the probe's scores differ",))
    assert texts(page, "#state[data-kind=bad]") == ["Not ready: the probe's scores differ"]


# Every text that is shown: its contrast to what is behind it, as WCAG computes it.
CONTRASTS = """(() => {
    const read = (colour) => { const [r, g, b, a = 1] = colour.match(/[\\d.]+/g).map(Number); return {rgb: [r, g, b], a}; };
    const light = (rgb) => rgb.map((one) => one / 255).map((one) => (one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4))
        .reduce((sum, one, index) => sum + one * [0.2126, 0.7152, 0.0722][index], 0);
    const found = [];
    for (const one of document.querySelectorAll("body *")) {
        const said = one.matches("select, textarea, input") ? one.value
            : [...one.childNodes].filter((node) => node.nodeType === 3).map((node) => node.data.trim()).join("");
        if (!said || !one.checkVisibility({visibilityProperty: true}) || one.closest(".hidden, [aria-disabled=true], svg, option, .skip")) continue;
        const ink = read(getComputedStyle(one).color);
        let behind = one;
        while (behind && read(getComputedStyle(behind).backgroundColor).a === 0) behind = behind.parentElement;
        const ground = read(getComputedStyle(behind ?? document.body).backgroundColor);
        const [low, high] = [light(ink.rgb), light(ground.rgb)].sort((a, b) => a - b);
        found.push([(high + 0.05) / (low + 0.05), ink.a, ground.a, one.className, said.slice(0, 40)]);
    }
    return found;
})()"""


@pytest.mark.parametrize("dark", (False, True))
def test_light_and_dark(opened, dark, tmp_path):
    page = opened(dark=dark, mode="comparative")
    fill(page, answers=[*ANSWERS, ""])
    page.press("Enter", "Control")
    refused(page, "[aria-invalid=true]")
    found = page.evaluate(CONTRASTS)
    fill(page, answers=[*ANSWERS, "Or"])
    scored(page)
    fill(page, answers=[*ANSWERS, "Or not"])
    page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    found += page.evaluate(CONTRASTS)
    page.go(page.address + "/docs")
    page.until("document.querySelector('.operation')")
    page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    page.evaluate("document.querySelector('.operation button').click()")
    page.until("document.querySelector('.replied pre')")
    found += page.evaluate(CONTRASTS)
    assert len(found) > 150
    assert [one for one in found if one[0] < 4.5 or one[1:3] != [1, 1]] == []
    ground = "getComputedStyle(document.body).backgroundColor"
    own = page.evaluate(ground)
    assert own == ("rgb(15, 18, 23)" if dark else "rgb(245, 246, 248)")
    choose = "((theme) => { const at = document.getElementById('theme'); at.value = theme; at.dispatchEvent(new Event('change')); })"
    page.evaluate(f"{choose}('{'light' if dark else 'dark'}')")
    other = page.evaluate(ground)
    assert other != own
    page.go(page.address)
    assert page.evaluate(ground) == other and page.evaluate("document.getElementById('theme').value") == (
        "light" if dark else "dark"
    )


@pytest.mark.parametrize("width", (360, 1600))
def test_nothing_sticks_out(opened, width):
    page = opened(width=width, mode="comparative")
    fill(page, prompt="x" * 300, answers=["y" * 300, *ANSWERS])
    scored(page)
    wide = "document.documentElement.scrollWidth"
    assert page.evaluate(wide) == width
    left, right = (
        page.evaluate(f"document.querySelector('{one}').getBoundingClientRect().left") for one in ("#form", "#results")
    )
    assert (left == right) == (width == 360)
    page.evaluate("document.getElementById('key-box').open = true")
    box = page.evaluate("(({left, right}) => [left, right])(document.querySelector('.sheet').getBoundingClientRect())")
    assert box[0] >= 0 and box[1] <= width
    page.go(page.address + "/docs")
    page.until("document.querySelector('.operation')")
    assert page.evaluate(wide) == width


@pytest.mark.parametrize("path", ("/", "/docs"))
def test_everything_that_takes_the_focus_has_a_name(opened, path):
    page = opened(path)
    if path == "/":
        fill(page)
        scored(page)
    page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    names = page.names()
    assert len(names) > 15 and [one for one in names if not one[1]] == []
    shown = """(() => { const {outlineStyle, outlineWidth} = getComputedStyle(document.activeElement); return outlineStyle + outlineWidth; })()"""
    page.press("Tab")
    assert page.evaluate(shown) == "solid2px"


# ---- the description of the interface ----


def test_docs_have_every_endpoint(opened):
    page = opened("/docs")
    spec = page.app.openapi()
    expected = [f"{verb.upper()}{path}" for path, item in spec["paths"].items() for verb in item]
    titles = "[...document.querySelectorAll('.operation h2')].map((one) => one.children[0].textContent + one.children[1].textContent)"
    assert page.evaluate(titles) == expected == texts(page, "#index a")
    assert texts(page, "#title") == ["A reward model"] and texts(page, "#about code") == ["rule"]
    score = "document.getElementById('post-score')"
    table = f"[...{score}.querySelectorAll('details tr')].map((one) => [...one.cells].map((cell) => cell.textContent))"
    rows = page.evaluate(table)
    assert ["prompt required", "string or list of object", "Text, or a list of chat messages."] in rows
    assert ["images ", "list of string or nullitems, at most 32", "Data URLs or base64."] in rows
    assert ["row ", "Row or null", ""] in rows and ["segments required", "list of Segment", ""] in rows
    example = json.loads(page.evaluate(f"{score}.querySelector('textarea').value"))
    assert example == {"prompt": "Two plus two?", "responses": ["4", "It's five"]}
    page.evaluate("document.getElementById('key').value = 'secret'")
    page.evaluate("document.getElementById('key').dispatchEvent(new Event('input'))")
    curl = page.evaluate(f"{score}.querySelector('pre[aria-label^=curl]').textContent")
    assert curl.startswith(f"curl -X POST '{page.address}/score' \\\n") and "It'\\''s five" in curl
    assert '"Authorization: Bearer $YOJO_KEY"' in curl and "secret" not in curl


def test_docs_try_it(opened, tmp_path):
    page = opened("/docs")
    page.tab_to("at.id === 'post-score-body'")
    page.evaluate("document.activeElement.select()")
    page.type('{"prompt": ')
    page.tab_to("at.textContent === 'Try it'")
    page.press("Enter")
    assert refused(page, "#post-score-body[aria-invalid=true]").startswith("This is not JSON")
    page.type('"Two?", "responses": ["<b>"]}')
    page.tab_to("at.textContent === 'Try it'")
    page.press("Enter")
    page.until("document.querySelector('#post-score .replied pre')")
    status = page.evaluate("document.querySelector('#post-score .replied p').textContent")
    assert status == f"200 OK · Yojo-Fingerprint: {page_cases.FINGERPRINT}"
    reply = json.loads(page.evaluate("document.querySelector('#post-score .replied pre').textContent"))
    assert reply["scores"] == [page_cases.score("<b>")] and page.app.state.seen[0].responses == ["<b>"]
    page.evaluate("document.querySelector('#post-score input[type=text]').value = '-1'")  # Yojo-Deadline
    page.evaluate("document.querySelector('#post-score [aria-label^=\"Try it\"]').click()")
    page.until("document.querySelector('#post-score .replied strong')?.textContent.startsWith('422')")
    (tmp_path / "a.bin").write_bytes(b"12345")
    page.choose_files("input[type=file]", [tmp_path / "a.bin"])
    page.evaluate("document.querySelector('#post-upload-name- input').value = 'a/b c'")
    page.evaluate("document.querySelector('#post-upload-name- label:last-of-type input').value = 'noted'")
    page.evaluate("document.querySelector('#post-upload-name- input').dispatchEvent(new Event('input'))")
    curl = page.evaluate("document.querySelector('#post-upload-name- pre').textContent")
    assert curl == f"curl -X POST '{page.address}/upload/a%2Fb%20c' \\\n  -F 'image=@a.bin' \\\n  -F 'note=noted'"
    page.evaluate("document.querySelector('#post-upload-name- input').value = 'ab'")
    page.evaluate("document.querySelector('#post-upload-name- [aria-label^=\"Try it\"]').click()")
    page.until("document.querySelector('#post-upload-name- .replied pre')")
    said = json.loads(page.evaluate("document.querySelector('#post-upload-name- .replied pre').textContent"))
    assert said == {"name": "ab", "note": "noted", "bytes": "5"}
