"""A client for OpenAI-compatible chat completions: vLLM, llama.cpp's server, others.

  POST URL/chat/completions
  {"model", "messages": [{"role", "content"}], "temperature", "seed", …}
  → {"choices": [{"message": {"content": "…"}, "finish_reason": "stop"}]}

(https://platform.openai.com/docs/api-reference/chat). Attempts are min(60, 2^n) s
apart, shortened at random by up to a half so that clients do not return together, or
Retry-After where that is longer.

Requests go to the given host and nowhere else: no redirect is followed, no proxy of the
environment is used. What the host sends is read up to a limit of bytes and seconds.
"""

import collections
import contextlib
import email.utils
import http.client
import json
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

from safetydpo_jax.errors import InputError

MAX_BYTES = 4 * 2**20  # of a reply; ten pairs of prompts are about 4 kB
LONGEST_WAIT = 60.0  # seconds of our own back-off
LONGEST_RETRY_AFTER = 300.0  # a host that asks for more is given up on
_AGAIN = {408, 409, 425, 429, *range(500, 600)}
# No other request would fare better; what to do about it.
_HOPELESS = {
  **dict.fromkeys(range(300, 400), "give the address it leads to, if you trust it"),
  **dict.fromkeys((401, 403, 407), "give the key's variable with --api_key_env"),
  **dict.fromkeys((404, 405), "see whether --endpoint and --model are right"),
}
_FORMAT_REFUSED = {400, 422}

Answer = TypeVar("Answer")


class InvalidAnswer(Exception):
  """The host answered, but not what was asked for."""


class RequestFailed(Exception):
  """No valid answer to one request; others may fare better."""


def split_url(url: str) -> tuple[type[http.client.HTTPConnection], str, int, str]:
  """The connection's class, host, port and path of `url`/chat/completions.

  Raises:
    InputError: `url` is no plain http or https address.
  """
  kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
  try:
    parts = urlsplit(url)
    kind, host = kinds[parts.scheme], parts.hostname or ""
    port = parts.port or kind.default_port
    host.encode("idna")  # as the socket will; raises UnicodeError, a ValueError
    plain = url.isascii() and url.isprintable() and " " not in url
  except (ValueError, KeyError):
    plain = False
  if not plain or not host or parts.query or parts.fragment:
    raise InputError(
      "--endpoint is no address like http://localhost:8000/v1: expected http or https, "
      "a host, and neither ? nor #"
    )
  if "@" in parts.netloc:
    raise InputError("--endpoint holds a user name or key; use --api_key_env for keys")
  path = parts.path.rstrip("/").removesuffix("/chat/completions")
  return kind, host, port, f"{path}/chat/completions"


def seconds_to_wait(header: str | None) -> float:
  """Retry-After (RFC 9110, 10.2.3: seconds or a date) in seconds; 0 without one."""
  header = (header or "").strip()
  if header.isascii() and header.isdigit():
    return float(header[:9])
  with contextlib.suppress(ValueError, TypeError, OverflowError):
    return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
  return 0.0


def read_reply(data: bytes) -> tuple[str, bool]:
  """The answer's text, and whether it was cut off at the limit of tokens."""
  try:
    choice = json.loads(data.decode())["choices"][0]
    text, cut_off = choice["message"]["content"], choice.get("finish_reason")
  except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
    raise InvalidAnswer("the reply is no chat completion in JSON") from None
  if not isinstance(text, str):
    raise InvalidAnswer("the reply holds no text; the model may have refused")
  return text, cut_off == "length"


class Endpoint:
  """One host; `ask` may be called from many threads.

  Attributes:
    retries: a Counter of why requests were sent again.
  """

  def __init__(
    self,
    url: str,
    *,
    key: str | None = None,
    formats: Sequence[dict[str, Any]] = ({},),
    timeout: float = 120.0,
    attempts: int = 6,
    first_wait: float = 1.0,
  ):
    """A client that has not connected yet.

    Args:
      url: as far as /v1, or the whole address of the chat completions.
      key: sent as bearer token.
      formats: fields of a request, the preferred first. If the host refuses a request
        (status 400 or 422), the next are tried, and kept where that helps.
      timeout: seconds for one reply.
      attempts: at most so many per request; other formats do not count.
      first_wait: seconds before the second attempt.

    Raises:
      InputError: `url` or `key` cannot be sent.
    """
    if key is not None and not (key.isascii() and key.isprintable() and key.strip()):
      raise InputError("the API key is empty or no printable ASCII; export it anew")
    self._kind, self._host, self._port, self._path = split_url(url)
    self._key, self._formats, self._format = key, formats, 0
    self._timeout, self._attempts = timeout, attempts
    self._first_wait = first_wait
    self._sockets: set[socket.socket] = set()
    self._stopped = threading.Event()
    self._lock = threading.Lock()
    self.retries: collections.Counter[str] = collections.Counter()

  def ask(self, body: dict[str, Any], check: Callable[[str], Answer]) -> Answer:
    """Sends `body` until `check` accepts the answer's text.

    After an invalid answer the request's "seed" goes up by one; else a host that
    honours seeds would repeat itself.

    Args:
      body: the request without the fields of `formats`.
      check: returns what the text means, or raises InvalidAnswer.

    Raises:
      RequestFailed: this request has no valid answer after all attempts.
      InputError: no request can have one, for example for want of a key.
    """
    level, attempt, seed = self._format, 0, body.get("seed", 0)
    while not self._stopped.is_set():
      trouble, reason, wait = "invalid answer", "", 0.0
      request = {**body, **self._formats[level], "seed": seed}
      try:
        status, retry_after, data = self._post(json.dumps(request).encode())
        if status in _FORMAT_REFUSED and level + 1 < len(self._formats):
          level += 1
          continue
        if status == 200:
          self._format = max(self._format, level)
          text, cut_off = read_reply(data)
          if cut_off:
            trouble = "cut off"
          return check(text)
        trouble = f"HTTP {status}"
        reason = self._printable(data)
        if status in _HOPELESS:
          place = f"{self._host}:{self._port}{self._path}"
          advice = _HOPELESS[status]
          raise InputError(f"{place} answers {trouble} ({reason}); {advice}")
        if status not in _AGAIN:
          raise RequestFailed(f"{trouble}: {reason}")
        if (wait := seconds_to_wait(retry_after)) > LONGEST_RETRY_AFTER:
          raise RequestFailed(f"{trouble}, asks to wait {wait:.0f} s")
      except InvalidAnswer as error:
        reason, seed = str(error), (seed + 1) % 2**31
        if trouble == "cut off":
          reason += "; raise --max_tokens or lower --per_request"
      except ssl.SSLCertVerificationError as error:
        raise InputError(
          f"{self._host}: {error.verify_message}; to trust its certificate, give it in "
          "the environment's SSL_CERT_FILE"
        ) from error
      except TimeoutError:
        trouble, reason = "time-out", f"no reply in {self._timeout:g} s"
      except (OSError, http.client.HTTPException) as error:
        trouble, reason = "connection", type(error).__name__
      attempt += 1
      if attempt == self._attempts:
        raise RequestFailed(f"{trouble}: {reason}" if reason else trouble)
      with self._lock:
        self.retries[trouble] += 1
      own = min(LONGEST_WAIT, self._first_wait * 2.0 ** (attempt - 1))
      self._stopped.wait(max(wait, own * random.uniform(0.5, 1.0)))
    raise RequestFailed("stopped")

  def stop(self) -> None:
    """Ends all requests, now and later; they raise RequestFailed."""
    self._stopped.set()
    with self._lock:
      for sock in self._sockets:
        _hang_up(sock)

  def _post(self, payload: bytes) -> tuple[int, str | None, bytes]:
    """Status, Retry-After and body of the reply; a redirect's body is its address."""
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if self._key:
      headers["Authorization"] = f"Bearer {self._key}"
    connection = self._kind(self._host, self._port, timeout=self._timeout)
    with contextlib.closing(connection):
      connection.connect()
      # The socket's time-out is for one packet; a host may send one byte a second.
      sock, expired = connection.sock, threading.Event()
      timer = threading.Timer(self._timeout, lambda: (expired.set(), _hang_up(sock)))
      timer.daemon = True
      timer.start()
      with self._lock:
        self._sockets.add(sock)
      try:
        if self._stopped.is_set():  # `stop` has not seen this socket
          raise ConnectionAbortedError
        connection.request("POST", self._path, payload, headers)
        response = connection.getresponse()
        with response:
          data = response.read(MAX_BYTES + 1)
          if not expired.is_set() and len(data) <= MAX_BYTES and response.length:
            raise http.client.IncompleteRead(data, response.length)
      except (OSError, http.client.HTTPException):
        if expired.is_set():
          raise TimeoutError from None
        raise
      finally:
        timer.cancel()
        with self._lock:
          self._sockets.discard(sock)
    if expired.is_set():  # what was read ends where the line was cut
      raise TimeoutError
    if len(data) > MAX_BYTES:
      raise InvalidAnswer(f"the reply has more than {MAX_BYTES} bytes")
    if 300 <= response.status < 400:
      data = f"redirect to {response.headers.get('Location')}".encode()
    return response.status, response.headers.get("Retry-After"), data

  def _printable(self, data: bytes) -> str:
    """The beginning of an error's text, without control characters and the key."""
    text = data.decode(errors="replace")
    with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
      text = str(json.loads(text)["error"]["message"])
    if self._key:
      text = text.replace(self._key, "(key)")
    return "".join(c if c.isprintable() else " " for c in text)[:200].strip()


def _hang_up(sock: socket.socket) -> None:
  """Wakes a thread that reads from the socket; also below TLS."""
  with contextlib.suppress(OSError):
    socket.socket.shutdown(sock, socket.SHUT_RDWR)
