"""A Hugging Face hub on this machine: the requests that huggingface_hub makes.

  GET  /api/models/NAME/revision/R                  {"id": …, "sha": …}
  GET  /api/models/NAME/tree/R                      [{"type": "file", "path": …}, …]
  HEAD, GET  /NAME/resolve/R/PATH                   a file

Refusals are the real hub's: who is not logged in is told 401 for a repository that does
not exist as for one that is private; terms are asked for at the files.
"""

import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

SHA = "0123456789abcdef0123456789abcdef01234567"
_API = re.compile(
  r"/api/models/(?P<name>[^/]+/[^/]+)(/(?P<what>\w+)/(?P<revision>[^/]+))?"
)
_FILE = re.compile(r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


class Handler(BaseHTTPRequestHandler):
  """Answers from the server's folders; `HEAD` is `GET` without the body."""

  protocol_version = "HTTP/1.1"

  def do_GET(self):
    path = unquote(urlparse(self.path).path)
    self.server.asked.append(path)
    if self.server.status:
      return self.reply(self.server.status, b"", {})
    token = self.headers.get("Authorization", "").removeprefix("Bearer ")
    if token and token not in self.server.tokens:
      message = "Invalid credentials in Authorization header"
      return self.refuse(401, None, message)
    match = _API.fullmatch(path) or _FILE.fullmatch(path)
    name = match["name"]
    private = name in self.server.private and not self.server.tokens.get(token)
    if name not in self.server.folders or private:
      return self.refuse(404 if token else 401, self.server.missing)
    if match["revision"] not in (None, "main", SHA):
      return self.refuse(404, "RevisionNotFound")
    folder = self.server.folders[name]
    files = {str(f.relative_to(folder)): f for f in folder.rglob("*") if f.is_file()}
    if "path" in match.groupdict():
      if name in self.server.gated and not self.server.tokens.get(token):
        return self.refuse(403 if token else 401, "GatedRepo")
      data = files[match["path"]].read_bytes()
      etag = f'"{hashlib.sha1(data).hexdigest()}"'
      return self.reply(200, data, {"ETag": etag, "X-Repo-Commit": SHA})
    if match["what"] == "tree":
      return self.reply_json([self.entry(path, file) for path, file in files.items()])
    siblings = [{"rfilename": path} for path in files]
    return self.reply_json({"id": name, "sha": SHA, "siblings": siblings})

  do_HEAD = do_GET

  def entry(self, path, file):
    oid = hashlib.sha1(file.read_bytes()).hexdigest()
    return {"type": "file", "path": path, "size": file.stat().st_size, "oid": oid}

  def refuse(self, status, code=None, message=None):
    headers = {"X-Error-Code": code, "X-Error-Message": message}
    self.reply(status, b"", {k: v for k, v in headers.items() if v})

  def reply_json(self, content):
    self.reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

  def reply(self, status, data, headers):
    self.send_response(status)
    for name, value in {"Content-Length": str(len(data)), **headers}.items():
      self.send_header(name, value)
    self.end_headers()
    if self.command == "GET":
      self.wfile.write(data)

  def log_message(self, *_):
    pass


class Hub(ThreadingHTTPServer):
  """What it has may be changed while it runs.

  Attributes:
    folders: {repository: its folder on this machine}.
    private, gated: names of repositories.
    tokens: {a valid token: whether its account may see the private and gated ones}.
    status: of every answer, if not 0.
    missing: the code in the answer for a repository that is not there.
    asked: the paths of all requests.
  """

  daemon_threads = True

  def __init__(self):
    super().__init__(("127.0.0.1", 0), Handler)
    self.folders, self.tokens, self.asked = {}, {}, []
    self.private, self.gated, self.status = set(), set(), 0
    self.missing = "RepoNotFound"
    self.url = f"http://127.0.0.1:{self.server_port}"

  def handle_error(self, *_):
    """Clients that hang up are no failure of a test."""


@contextlib.contextmanager
def serve():
  """A hub for the time of a `with` block."""
  with Hub() as hub:
    thread = threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield hub
    hub.shutdown()


def use(monkeypatch, url, cache, *, offline=False):
  """Makes huggingface_hub, which reads its environment once, talk to `url`."""
  from huggingface_hub import constants

  template = url + "/{repo_id}/resolve/{revision}/{filename}"
  for name, value in {
    "ENDPOINT": url,
    "HUGGINGFACE_CO_URL_TEMPLATE": template,
    "HF_HUB_CACHE": str(cache),
    "HF_HUB_OFFLINE": offline,
    "HF_TOKEN_PATH": str(cache / "token"),
  }.items():
    monkeypatch.setattr(constants, name, value)
  monkeypatch.delenv("HF_TOKEN", raising=False)
