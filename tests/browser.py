"""A headless Chromium that tests drive over its own protocol: it opens pages, reads them, takes pictures."""

import base64
import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, _NAMES)), None)

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, Debian's package of that name")


class Browser:
    """One tab. `errors`: that the console has told; `fetched`: addresses of everything that was loaded."""

    def __init__(self, socket):
        self._socket = socket
        self._number = 0
        self._session = None
        self.errors, self.fetched = [], []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def _call(self, method, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv(timeout=60))
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self._heard(answer)

    def _heard(self, event):
        method, told = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(told["exceptionDetails"]["text"])
        elif method == "Runtime.consoleAPICalled" and told["type"] == "error":
            self.errors.append(str([one.get("value", one.get("description")) for one in told["args"]]))
        elif method == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.errors.append(told["entry"]["text"] + " " + told["entry"].get("url", ""))
        elif method == "Network.requestWillBeSent":
            self.fetched.append(told["request"]["url"])

    def size(self, width, height):
        """Of the window."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def dark(self, on):
        """What the browser says that its user prefers."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if on else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, url):
        self._call("Page.navigate", url=url)

    def run(self, script):
        """The value of a JavaScript expression."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def text(self):
        return self.run("document.body ? document.body.innerText : ''")

    def until(self, condition, seconds=30):
        """Block until condition(self) holds; what it gave."""
        end = time.monotonic() + seconds
        while not (found := condition(self)):
            assert time.monotonic() < end, self.text()
            time.sleep(0.05)
        return found

    def key(self, name, code):
        """Press and release a key."""
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code)

    def picture(self, path):
        """The whole page as a PNG."""
        told = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(told["data"]))


@contextlib.contextmanager
def browser():
    """A browser of its own, without a profile of anybody's."""
    client = pytest.importorskip(
        "websockets.sync.client", reason="needs websockets, which comes with NiceGUI"
    )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            CHROMIUM,
            "--headless",
            "--disable-gpu",
            "--no-first-run",
            "--hide-scrollbars",
            "--remote-debugging-port=0",
        ]
        command += [
            f"--user-data-dir={profile}",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
        ]
        command += ["--no-sandbox"] if os.geteuid() == 0 else []
        process = subprocess.Popen(
            [*command, "about:blank"], stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            url = None
            for line in process.stderr:
                if (found := re.search(r"ws://\S+", line)) is not None:
                    url = found.group(0)
                    break
            assert url, "chromium did not say where it can be driven"
            with client.connect(url, max_size=None) as socket:
                yield Browser(socket)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait(20)
            process.stderr.close()
