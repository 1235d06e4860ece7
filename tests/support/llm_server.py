"""A chat completions host on this machine, with the faults that real ones have.

It answers from what it is asked alone: the pairs are a function of concept, count and
seed, in invented words, so two runs with the same requests get the same answers.
"""

import collections
import contextlib
import json
import re
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CONCEPTS = ("zorp", "blick", "daxen", "wug")
RESET = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s: close sends RST


def make_pairs(concept, count, seed):
  """Pairs that no other concept or seed has."""
  return [
    {
      "unsafe": f"a {concept} beside tree {seed} {number}",
      "safe": f"a cloud beside tree {seed} {number} of {concept}",
    }
    for number in range(count)
  ]


def completion(content, finish_reason="stop"):
  """A reply in OpenAI's form."""
  message = {"role": "assistant", "content": content}
  choice = {"index": 0, "message": message, "finish_reason": finish_reason}
  return json.dumps({"object": "chat.completion", "choices": [choice]}).encode()


def pairs_json(body):
  """The right answer's text."""
  user = body["messages"][-1]["content"]
  concept = re.search(r"Concept: (.+)", user)[1]
  count = int(re.search(r"Write (\d+) pairs", user)[1])
  return json.dumps({"pairs": make_pairs(concept, count, body["seed"])})


def drip(handler, _):
  """One byte now and then: every read succeeds, and there is no end."""
  handler.send_response(200)
  handler.end_headers()
  send_spaces(handler)


def drip_headers(handler, _):
  """The same, in the middle of a header line."""
  handler.wfile.write(b"HTTP/1.1 200 OK\r\nServer: slow")
  send_spaces(handler)


def send_spaces(handler):
  with contextlib.suppress(OSError):
    while not handler.server.closing.wait(0.05):
      handler.wfile.write(b" ")
      handler.wfile.flush()


def huge(handler, _):
  """More than anyone should read; says nothing about its length."""
  handler.send_response(200)
  handler.end_headers()
  with contextlib.suppress(OSError):
    for _ in range(64):
      handler.wfile.write(b" " * 2**20)
      handler.server.sent_bytes += 2**20


def reset(handler, _):
  handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
  handler.connection.close()


def close_early(handler, body):
  """Promises more bytes than it sends."""
  data = completion(pairs_json(body))
  handler.reply(200, data[:-20], {"Content-Length": len(data)})


def silent(handler, _):
  handler.server.closing.wait(30)


FAULTS = {
  "500": lambda h, _: h.reply(500, b"out of \x1b[31mmemory"),
  "503": lambda h, _: h.reply(503, b""),
  "429": lambda h, _: h.reply(429, b"", {"Retry-After": h.server.retry_after}),
  "400": lambda h, _: h.reply(400, b'{"error": {"message": "not this one"}}'),
  "401": lambda h, _: h.reply(401, h.headers.get("Authorization", "").encode()),
  "404": lambda h, _: h.reply(404, b'{"error": {"message": "no such model"}}'),
  "redirect": lambda h, _: h.reply(307, b"", {"Location": h.server.elsewhere}),
  "truncated": lambda h, b: h.reply(200, completion(pairs_json(b)[:40], "length")),
  "no completion": lambda h, _: h.reply(200, b'{"choices": []}'),
  "no content": lambda h, _: h.reply(200, completion(None)),
  "invalid UTF-8": lambda h, b: h.reply(200, completion("\x01").replace(b"1", b"\xff")),
  "deep": lambda h, _: h.reply(200, b"[" * 200_000),
  "wrong schema": lambda h, _: h.reply(200, completion('{"pairs": [["a", "b"]]}')),
  "no JSON": lambda h, _: h.reply(200, completion("I cannot do that.")),
  "prose": lambda h, b: h.reply(
    200, completion(f"Sure {{here}}:\n```json\n{pairs_json(b)}\n```\nEnjoy {{}}!")
  ),
  "reset": reset,
  "close early": close_early,
  "silent": silent,
  "drip": drip,
  "drip headers": drip_headers,
  "huge": huge,
  "not HTTP": lambda h, _: h.wfile.write(b"220 mail ready\r\n"),
}


class Handler(BaseHTTPRequestHandler):
  """Writes down each request, then does what `faults` says or answers."""

  def do_POST(self):
    server = self.server
    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    with server.lock:
      server.requests.append((self.path, dict(self.headers), body))
      server.in_flight += 1
      server.most_in_flight = max(server.most_in_flight, server.in_flight)
      user = body["messages"][-1]["content"]
      time_before = server.times_asked[user]
      server.times_asked[user] += 1
    fault = server.faults(body, time_before)
    time.sleep(server.delay(body))
    with server.lock:
      server.in_flight -= 1
    if fault:
      FAULTS[fault](self, body)
    else:
      self.reply(200, completion(server.answer(body)))

  def reply(self, status, data, headers=()):
    headers = {"Content-Length": len(data), **dict(headers)}
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name, str(value))
    self.end_headers()
    self.wfile.write(data)

  def log_message(self, *_):
    pass


class Server(ThreadingHTTPServer):
  """What it does may be changed while it runs.

  Attributes:
    faults: (request, how often these messages were asked before) → a name or None.
    answer: request → the text of a good answer.
    delay: request → seconds.
    requests: (path, headers, body) of each.
  """

  daemon_threads = True
  request_queue_size = 64

  def __init__(self):
    super().__init__(("127.0.0.1", 0), Handler)
    self.lock, self.closing = threading.Lock(), threading.Event()
    self.requests, self.times_asked = [], collections.Counter()
    self.faults = lambda body, time: None
    self.answer, self.delay = pairs_json, lambda body: 0.0
    self.retry_after, self.elsewhere = 0, ""
    self.in_flight = self.most_in_flight = self.sent_bytes = 0
    self.url = f"http://127.0.0.1:{self.server_port}/v1"

  def handle_error(self, *_):
    """Clients that hang up are part of the tests."""


@contextlib.contextmanager
def serve(tls=None):
  """A server for the time of a `with` block; `tls` is an `ssl.SSLContext`."""
  with Server() as server:
    if tls:
      server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()


def concept_of(body):
  """The concept that a request asks pairs of."""
  return body["messages"][-1]["content"].split("Concept: ")[1].split("\n")[0]


def sent(server):
  """What identifies each request that arrived."""
  return [(concept_of(body), body["seed"]) for *_, body in server.requests]


def short(server):
  """The host gives one pair only of one concept."""
  one = json.dumps({"pairs": make_pairs("wug", 1, 0)})
  server.answer = lambda b: one if concept_of(b) == "wug" else pairs_json(b)
