"""A client for OpenAI-compatible chat completions: vLLM, llama.cpp's server, others.

  POST URL/chat/completions
  {"model", "messages": [{"role", "content"}], "temperature", "seed", …}
  → {"choices": [{"message": {"content": "…"}, "finish_reason": "stop"}]}

(https://platform.openai.com/docs/api-reference/chat), over httpx2. Attempts are
min(60, 2^n) s apart, shortened at random by up to a half so that clients do not return
together, or Retry-After where that is longer.

Requests go to the given host and nowhere else: no redirect is followed, and neither a
proxy nor a password of the environment is used. A reply has a limit of bytes, and of
seconds from the connection to its last byte.
"""

import asyncio
import collections
import contextlib
import email.utils
import json
import random
import ssl
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from safetydpo_jax.errors import InputError
from safetydpo_jax.runtime import extras

if TYPE_CHECKING:
  import httpx2

MAX_BYTES = 4 * 2**20  # of a reply; ten pairs of prompts are about 4 kB
LONGEST_WAIT = 60.0  # seconds of our own back-off
LONGEST_RETRY_AFTER = 300.0  # seconds; the request fails if a host asks for more
_AGAIN = {408, 409, 425, 429, *range(500, 600)}
# Every other request would meet the same; what to do about it.
_HOPELESS = {
  **dict.fromkeys(range(300, 400), "give the address it leads to, if you trust it"),
  **dict.fromkeys((401, 403, 407), "give the key's variable with --api_key_env"),
  **dict.fromkeys((404, 405), "check --endpoint and --model"),
}
_FORMAT_REFUSED = {400, 422}

Answer = TypeVar("Answer")


class InvalidAnswer(Exception):
  """The host answered, but not what was asked for."""


class RequestFailed(Exception):
  """No valid answer to one request; others may fare better."""


class Reply(NamedTuple):
  """What the host sent.

  Attributes:
    status: of HTTP.
    retry_after: seconds the host asks to wait, 0 if it does not.
    data: the body; of a redirect, where it leads to.
  """

  status: int
  retry_after: float
  data: bytes


def completions_url(url: str) -> str:
  """`url`/chat/completions, also if `url` ends so already.

  Raises:
    InputError: `url` is not a plain http or https address.
  """
  try:
    parts = urlsplit(url)
    host = parts.hostname or ""
    host.encode("idna")  # raises UnicodeError, a ValueError
    plain = parts.scheme in ("http", "https") and parts.port != 0
    plain = plain and url.isascii() and url.isprintable() and " " not in url
  except ValueError:
    plain = False
  if not plain or not host or parts.query or parts.fragment:
    raise InputError(
      "--endpoint is not an address like http://localhost:8000/v1: expected http or "
      "https, a host, and neither ? nor #"
    )
  if "@" in parts.netloc:
    raise InputError(
      "--endpoint holds a user name or key; name the variable that holds the key with "
      "--api_key_env"
    )
  path = parts.path.rstrip("/").removesuffix("/chat/completions")
  return f"{parts.scheme}://{parts.netloc}{path}/chat/completions"


def seconds_to_wait(header: str | None) -> float:
  """Retry-After (RFC 9110, 10.2.3: seconds or a date) in seconds; 0 without one."""
  header = (header or "").strip()
  if header.isascii() and header.isdigit():
    return float(header[:9])
  with contextlib.suppress(ValueError, TypeError, OverflowError):
    return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
  return 0.0


def read_completion(data: bytes) -> tuple[str, bool]:
  """The answer's text, and whether it was cut off at the limit of tokens.

  Raises:
    InvalidAnswer: there is no text.
  """
  try:
    choice = json.loads(data.decode())["choices"][0]
    text, cut_off = choice["message"]["content"], choice.get("finish_reason")
  except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
    raise InvalidAnswer("the reply is not a chat completion in JSON") from None
  if not isinstance(text, str):
    raise InvalidAnswer("the reply holds no text; the model may have refused")
  return text, cut_off == "length"


def untrusted_certificate(error: BaseException | None) -> str | None:
  """Why TLS refused the host's certificate; None if `error` has another cause."""
  while error is not None:
    if isinstance(error, ssl.SSLCertVerificationError):
      return error.verify_message
    error = error.__cause__ or error.__context__
  return None


class Endpoint:
  """One host; `ask` may run many times at once.

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
      attempts: the most per request; trying another format does not count.
      first_wait: seconds before the second attempt.

    Raises:
      InputError: `url` or `key` cannot be sent, or httpx2 is not installed.
    """
    if key is not None and not (key.isascii() and key.isprintable() and key.strip()):
      raise InputError("the API key is empty or not printable ASCII; export it again")
    self._url = completions_url(url)
    self._http = extras.require("httpx2", extra="prompts")
    # Reads SSL_CERT_FILE, which `trust_env=False` would leave out.
    self._certificates = ssl.create_default_context()
    self._key, self._formats, self._format = key, formats, 0
    self._timeout, self._attempts = timeout, attempts
    self._first_wait = first_wait
    self.retries: collections.Counter[str] = collections.Counter()

  async def ask(self, body: dict[str, Any], check: Callable[[str], Answer]) -> Answer:
    """Sends `body` until `check` accepts the answer's text.

    After an invalid answer the request's "seed" goes up by one; otherwise a host that
    honours seeds would repeat itself.

    Args:
      body: the request without the fields of `formats`.
      check: returns what the text means, or raises InvalidAnswer.

    Raises:
      RequestFailed: this request has no valid answer after all attempts.
      InputError: no request can have one, for example because a key is missing.
    """
    level, attempt, seed = self._format, 0, body.get("seed", 0)
    while True:
      trouble, reason, wait = "invalid answer", "", 0.0
      request = {**body, **self._formats[level], "seed": seed}
      try:
        reply = await self._post(json.dumps(request).encode())
        if reply.status in _FORMAT_REFUSED and level + 1 < len(self._formats):
          level += 1
          continue
        if reply.status == 200:
          self._format = max(self._format, level)
          text, cut_off = read_completion(reply.data)
          if cut_off:
            trouble = "cut off"
          return check(text)
        trouble, wait = f"HTTP {reply.status}", reply.retry_after
        reason = self._printable(reply.data)
        self._check_retriable(reply, trouble, reason)
      except InvalidAnswer as error:
        reason, seed = str(error), (seed + 1) % 2**31
        if trouble == "cut off":
          reason += "; raise --max_tokens or lower --per_request"
      except TimeoutError:
        trouble, reason = "time-out", f"no reply in {self._timeout:g} s"
      except self._http.TransportError as error:
        if why := untrusted_certificate(error):
          raise InputError(
            f"{self._url}: {why}; to trust its certificate, set SSL_CERT_FILE to the "
            "file that holds it"
          ) from error
        trouble, reason = "connection", f"{type(error).__name__} {error}".strip()
      attempt += 1
      if attempt == self._attempts:
        raise RequestFailed(f"{trouble}: {reason}" if reason else trouble)
      self.retries[trouble] += 1
      own = min(LONGEST_WAIT, self._first_wait * 2.0 ** (attempt - 1))
      await asyncio.sleep(max(wait, own * random.uniform(0.5, 1.0)))

  def _check_retriable(self, reply: Reply, trouble: str, reason: str) -> None:
    """Raises if the same request is not worth another attempt."""
    if reply.status in _HOPELESS:
      advice = _HOPELESS[reply.status]
      raise InputError(f"{self._url} answers {trouble} ({reason}); {advice}")
    if reply.status not in _AGAIN:
      raise RequestFailed(f"{trouble}: {reason}")
    if reply.retry_after > LONGEST_RETRY_AFTER:
      wait = f"the host asks to wait {reply.retry_after:.0f} s"
      raise RequestFailed(f"{trouble}, and {wait}")

  async def _post(self, payload: bytes) -> Reply:
    """One request on a connection of its own.

    Raises:
      TimeoutError: the reply did not end in time.
      InvalidAnswer: it is too long.
      httpx2.TransportError: the connection failed.
    """
    # Not compressed: a small reply could become a large one.
    headers = {
      "Content-Type": "application/json",
      "Accept": "application/json",
      "Accept-Encoding": "identity",
    }
    if self._key:
      headers["Authorization"] = f"Bearer {self._key}"
    client = self._http.AsyncClient(
      verify=self._certificates, trust_env=False, follow_redirects=False, timeout=None
    )
    # httpx's time-outs are for one packet; a host may send one byte a second.
    async with (
      asyncio.timeout(self._timeout),
      client,
      client.stream("POST", self._url, content=payload, headers=headers) as response,
    ):
      data = await _read(response)
      if 300 <= response.status_code < 400:
        data = f"redirect to {response.headers.get('Location')}".encode()
      retry_after = seconds_to_wait(response.headers.get("Retry-After"))
      return Reply(response.status_code, retry_after, data)

  def _printable(self, data: bytes) -> str:
    """The beginning of an error's text, without control characters and the key."""
    text = data.decode(errors="replace")
    with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
      text = str(json.loads(text)["error"]["message"])
    if self._key:
      text = text.replace(self._key, "(key)")
    return "".join(c if c.isprintable() else " " for c in text)[:200].strip()


async def _read(response: "httpx2.Response") -> bytes:
  """The body, up to MAX_BYTES."""
  data = bytearray()
  async for part in response.aiter_raw():
    data += part
    if len(data) > MAX_BYTES:
      raise InvalidAnswer(f"the reply has more than {MAX_BYTES} bytes")
  return bytes(data)
