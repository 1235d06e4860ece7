"""A page as a real browser sees it: headless Chromium over the DevTools protocol.

Protocol: JSON messages that end in NUL, written to the browser's file descriptor 3 and
read from its 4 (`--remote-debugging-pipe`), so no port and no package is needed. See
https://chromedevtools.github.io/devtools-protocol/.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
  "--headless",
  "--no-sandbox",  # continuous integration runs as root
  "--disable-gpu",
  "--disable-dev-shm-usage",
  "--disable-background-networking",
  "--hide-scrollbars",
  "--no-first-run",
  "--remote-debugging-pipe",
)
PATIENCE = 60  # seconds for one answer, on a machine that is busy
# A page cannot tell the browser what it is wider than, or which pictures it shows.
LOOK = """(async () => {
  document.querySelectorAll('img').forEach(image => { image.loading = 'eager'; });
  await Promise.all([...document.images].map(i => i.decode().catch(() => null)));
  const box = document.documentElement;
  return {
    broken: [...document.images].filter(i => !i.naturalWidth).map(i => i.alt),
    images: document.images.length,
    content_width: box.scrollWidth,
    viewport_width: box.clientWidth,
    height: box.scrollHeight,
    text: document.body.innerText,
    scripts: document.scripts.length,
    marker: String(window.injected),
  };
})()"""


class View(NamedTuple):
  """What one visit found."""

  problems: list[str]  # console errors, warnings and exceptions
  requests: list[str]  # all addresses asked for, data: URIs left out
  broken: list[str]  # alt texts of images without pixels
  images: int
  content_width: int  # CSS pixels; more than the viewport's means sideways scrolling
  viewport_width: int
  height: int
  text: str
  scripts: int  # script elements in the document
  marker: str  # window.injected, which hostile content would set
  answer: Any  # of the expression asked for


def find() -> str | None:
  """The path of a browser, or None."""
  return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
  """A running browser: `with Browser() as browser: browser.visit(file, 390)`."""

  def __enter__(self) -> "Browser":
    self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    theirs_in, self.write_end = os.pipe()
    self.read_end, theirs_out = os.pipe()
    # Above 9, so that neither takes the other's place as 3 or 4.
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]
    program = find()
    nowhere = os.open(os.devnull, os.O_RDWR)
    self.process = os.posix_spawn(
      program,
      [program, *FLAGS, f"--user-data-dir={self.profile.name}", "about:blank"],
      os.environ,
      file_actions=[
        (os.POSIX_SPAWN_DUP2, nowhere, 1),
        (os.POSIX_SPAWN_DUP2, nowhere, 2),
        (os.POSIX_SPAWN_DUP2, ends[0], 3),
        (os.POSIX_SPAWN_DUP2, ends[1], 4),
      ],
      setpgroup=0,  # its helpers end with it
    )
    for end in (theirs_in, theirs_out, *ends, nowhere):
      os.close(end)
    self.buffer, self.events, self.last_id = b"", [], 0
    return self

  def __exit__(self, *error: Any) -> None:
    os.killpg(self.process, signal.SIGKILL)
    os.waitpid(self.process, 0)
    os.close(self.write_end)
    os.close(self.read_end)
    self.profile.cleanup()

  def call(self, method: str, session: str | None = None, **parameters: Any) -> dict:
    """Sends a command and waits for its answer; events in between are kept."""
    self.last_id += 1
    message = {"id": self.last_id, "method": method, "params": parameters}
    if session:
      message["sessionId"] = session
    content = json.dumps(message).encode() + b"\0"
    while content:
      content = content[os.write(self.write_end, content) :]
    answer = self._until(lambda received: received.get("id") == self.last_id)
    if "error" in answer:
      raise RuntimeError(f"{method}: {answer['error']}")
    return answer["result"]

  def _until(self, wanted) -> dict:
    """Reads messages until one is wanted."""
    end = time.monotonic() + PATIENCE
    while True:
      while b"\0" in self.buffer:
        content, self.buffer = self.buffer.split(b"\0", 1)
        message = json.loads(content)
        if wanted(message):
          return message
        self.events.append(message)
      left = end - time.monotonic()
      if left <= 0 or not select.select([self.read_end], [], [], left)[0]:
        raise TimeoutError("the browser does not answer")
      received = os.read(self.read_end, 1 << 20)
      if not received:
        raise RuntimeError("the browser has ended")
      self.buffer += received

  def visit(
    self,
    file: Path,
    width: int,
    *,
    dark: bool = False,
    media: str = "screen",
    screenshot: Path | None = None,
    expression: str = "null",
  ) -> View:
    """Loads a file and looks at it.

    Args:
      file: an HTML file.
      width: of the viewport, CSS pixels.
      dark: the colour scheme that the reader prefers.
      media: "screen" or "print".
      screenshot: PNG file of the whole page to write.
      expression: JavaScript to evaluate in the page; its value is `View.answer`.
    """
    target = self.call("Target.createTarget", url="about:blank")["targetId"]
    session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
      "sessionId"
    ]
    self.events.clear()
    for domain in ("Page", "Runtime", "Network", "Log"):
      self.call(f"{domain}.enable", session)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    self.call("Emulation.setEmulatedMedia", session, media=media, features=[scheme])
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    self.call("Emulation.setDeviceMetricsOverride", session, **size)
    self.call("Page.navigate", session, url=Path(file).resolve().as_uri())
    loaded = "Page.loadEventFired"
    if not any(event.get("method") == loaded for event in self.events):
      self.events.append(self._until(lambda event: event.get("method") == loaded))
    seen = self._evaluate(session, LOOK)
    answer = self._evaluate(session, expression)
    if screenshot:
      clip = {"x": 0, "y": 0, "width": width, "height": seen["height"], "scale": 1}
      picture = self.call(
        "Page.captureScreenshot", session, captureBeyondViewport=True, clip=clip
      )
      Path(screenshot).write_bytes(base64.b64decode(picture["data"]))
    self.call("Target.closeTarget", targetId=target)
    return View(*_reports(self.events), **seen, answer=answer)

  def _evaluate(self, session: str, expression: str) -> Any:
    result = self.call(
      "Runtime.evaluate",
      session,
      expression=expression,
      awaitPromise=True,
      returnByValue=True,
    )
    if "exceptionDetails" in result:
      raise RuntimeError(result["exceptionDetails"])
    return result["result"].get("value")


def _reports(events: list[dict]) -> tuple[list[str], list[str]]:
  """(problems, requests) that the browser told of."""
  problems, requests = [], []
  for event in events:
    method, details = event.get("method"), event.get("params", {})
    if method == "Runtime.exceptionThrown":
      problems.append(str(details["exceptionDetails"].get("exception", details)))
    elif method == "Runtime.consoleAPICalled" and details["type"] != "log":
      problems.append(str(details["args"]))
    elif method == "Log.entryAdded" and details["entry"]["level"] != "info":
      problems.append(details["entry"]["text"])
    elif method == "Network.requestWillBeSent":
      address = details["request"]["url"]
      if not address.startswith("data:"):
        requests.append(address)
  return problems, requests
