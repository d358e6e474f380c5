"""A headless Chromium, driven over the pipe of its DevTools protocol: no package, no port, no driver beside it."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 30.0  # seconds after which a test fails rather than hangs
FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",  # of root, and in containers; all it ever shows is our own
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # whatever is asked for elsewhere is not found
)
# The protocol's pipe has the numbers 3 and 4, which a process that is being started can only be given by itself.
STARTER = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)
KEYS = {
    "Tab": ("Tab", 9, None),
    "Enter": ("Enter", 13, "\r"),
    "Space": (" ", 32, " "),
    "Escape": ("Escape", 27, None),
    "ArrowRight": ("ArrowRight", 39, None),
}
MODIFIERS = {"Alt": 1, "Control": 2, "Shift": 8}


def find():
    """Path of a Chromium; None where there is none."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """A Chromium that runs.

    Args:
        path: of its executable.
        folder: an empty one for its profile.
    """

    def __init__(self, path, folder):
        ours, theirs = os.pipe(), os.pipe()  # what it reads, what it writes
        ends = [_high(ours[0]), _high(theirs[1])]
        command = [
            sys.executable,
            "-I",
            "-S",
            "-c",
            STARTER,
            *map(str, ends),
            path,
            *FLAGS,
            f"--user-data-dir={folder}",
        ]
        self.process = subprocess.Popen(command, pass_fds=ends, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for end in ends:
            os.close(end)
        self._write, self._read = ours[1], theirs[0]
        self._rest, self._asked, self.events = b"", 0, []

    def send(self, method, session=None, **params):
        """A command's result. Events that come before it are kept in `events`."""
        self._asked += 1
        message = {"id": self._asked, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        while True:
            reply = self.receive()
            if reply.get("id") == self._asked:
                if "error" in reply:
                    raise RuntimeError(f"{method}: {reply['error']['message']}")
                return reply["result"]

    def receive(self):
        """The next message: a reply, or an event, which is kept, too."""
        ends = time.monotonic() + PATIENCE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(0.0, ends - time.monotonic()))
            if not ready:
                raise TimeoutError("the browser said nothing")
            data = os.read(self._read, 1 << 16)
            if not data:
                raise RuntimeError("the browser has ended")
            self._rest += data
        message, self._rest = self._rest.split(b"\0", 1)
        message = json.loads(message)
        if "method" in message:
            self.events.append(message)
        return message

    def close(self):
        with contextlib.suppress(RuntimeError, TimeoutError, OSError):
            self.send("Browser.close")
        os.close(self._write)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._read)


def _high(number):
    """The same file under a number that 3 and 4 do not write over."""
    import fcntl

    high = fcntl.fcntl(number, fcntl.F_DUPFD, 10)
    os.close(number)
    return high


@contextlib.contextmanager
def started(path):
    """A `Browser`, ended afterwards."""
    with tempfile.TemporaryDirectory(prefix="chromium", ignore_cleanup_errors=True) as folder:
        browser = Browser(path, folder)
        try:
            yield browser
        finally:
            browser.close()


class Page:
    """A tab with cookies and storage of its own.

    Args:
        browser: `Browser`.
        width, height: in CSS pixels.
        dark: whether the system's theme is dark.
    """

    def __init__(self, browser, width=1280, height=900, dark=False):
        self.browser = browser
        self.context = browser.send("Target.createBrowserContext")["browserContextId"]
        target = browser.send("Target.createTarget", url="about:blank", browserContextId=self.context)["targetId"]
        self.session = browser.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "Accessibility", "DOM"):
            self.send(f"{domain}.enable")
        self.size(width, height)
        features = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce"}
        self.send(
            "Emulation.setEmulatedMedia", features=[{"name": name, "value": value} for name, value in features.items()]
        )

    def send(self, method, **params):
        return self.browser.send(method, self.session, **params)

    def size(self, width, height):
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def events(self, method):
        """Parameters of this tab's events of a kind, so far."""
        events = [one for one in self.browser.events if one.get("sessionId") == self.session]
        return [one["params"] for one in events if one["method"] == method]

    def go(self, url):
        """Goes to an address, and waits until everything is loaded."""
        before = len(self.events("Page.loadEventFired"))
        failed = self.send("Page.navigate", url=url).get("errorText")
        assert not failed, f"{url}: {failed}"
        while len(self.events("Page.loadEventFired")) == before:
            self.browser.receive()

    def evaluate(self, expression):
        """The value of an expression; of a promise, what it becomes."""
        result = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"].get("exception", result)
        return result["result"].get("value")

    def until(self, expression):
        """Waits until an expression is true, looked at in every frame that the browser draws."""
        script = f"""new Promise((resolve, reject) => {{
            const ends = performance.now() + {PATIENCE * 1000 / 2};
            const look = () => {{
                const found = {expression};
                if (found) resolve(true);
                else if (performance.now() > ends) resolve(null);
                else requestAnimationFrame(look);
            }};
            look();
        }})"""
        found = self.evaluate(script)
        assert found, f"never true: {expression}; the page says: {self.evaluate('document.body.innerText')}"
        return found

    def press(self, name, *modifiers):
        """A key of `KEYS`, with modifiers held down."""
        key, code, text = KEYS[name]
        held = sum(MODIFIERS[one] for one in modifiers)
        event = {"key": key, "code": name, "windowsVirtualKeyCode": code, "modifiers": held}
        typed = {"text": text} if text and not held else {}
        self.send("Input.dispatchKeyEvent", type="keyDown" if typed else "rawKeyDown", **event, **typed)
        self.send("Input.dispatchKeyEvent", type="keyUp", **event)

    def type(self, text):
        """Text, key by key."""
        for letter in text:
            self.send("Input.dispatchKeyEvent", type="keyDown", key=letter, text=letter)
            self.send("Input.dispatchKeyEvent", type="keyUp", key=letter)

    def tab_to(self, condition):
        """Presses Tab until a condition on `document.activeElement`, named `at`, holds."""
        for _ in range(60):
            self.press("Tab")
            if self.evaluate(f"((at) => {condition})(document.activeElement)"):
                return
        raise AssertionError(f"the keyboard does not come to where {condition}")

    def choose_files(self, selector, paths):
        node = self.send("DOM.querySelector", nodeId=self.send("DOM.getDocument")["root"]["nodeId"], selector=selector)
        self.send("DOM.setFileInputFiles", files=[str(path) for path in paths], nodeId=node["nodeId"])

    def screenshot(self, path):
        """The whole page as a PNG."""
        self.evaluate("scrollTo(0, 0)")
        height = self.evaluate("document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": self.evaluate("innerWidth"), "height": height, "scale": 1}
        data = self.send("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        with open(path, "wb") as file:
            file.write(base64.b64decode(data))

    def requests(self):
        """Addresses of everything that was asked for, data: and blob: among them."""
        return [one["request"]["url"] for one in self.events("Network.requestWillBeSent")]

    def complaints(self):
        """Errors and warnings of the console, but for the replies that it notes because of their status."""
        said = [one["exceptionDetails"] for one in self.events("Runtime.exceptionThrown")]
        said += [
            one for one in self.events("Runtime.consoleAPICalled") if one["type"] in ("error", "warning", "assert")
        ]
        entries = [one["entry"] for one in self.events("Log.entryAdded")]
        noted = "the server responded with a status of"
        return said + [one for one in entries if one["level"] in ("error", "warning") and noted not in one["text"]]

    def names(self):
        """(role, name) of everything that takes the keyboard's focus, as a screen reader is told."""
        nodes = self.send("Accessibility.getFullAXTree")["nodes"]
        able = [
            one
            for one in nodes
            if not one["ignored"] and any(p["name"] == "focusable" and p["value"]["value"] for p in one["properties"])
        ]
        return [(one["role"]["value"], one.get("name", {}).get("value", "")) for one in able]

    def close(self):
        self.browser.send("Target.disposeBrowserContext", browserContextId=self.context)
        self.browser.events = [one for one in self.browser.events if one.get("sessionId") != self.session]
