"""The client against a host that does everything that hosts do wrong."""

import asyncio
import datetime
import email.utils
import shutil
import socket
import ssl
import subprocess
import sys
import time

import pytest

from safetydpo_jax.data.writing import endpoint as endpoint_module
from safetydpo_jax.data.writing.endpoint import (
  Endpoint,
  RequestFailed,
  completions_url,
  seconds_to_wait,
)
from safetydpo_jax.data.writing.prompt_pairs import FORMATS, parse_answer
from safetydpo_jax.errors import InputError
from tests.support.llm_server import serve

USER = 'Concept: zorp\nWrite 3 pairs.\n{"pairs": []}'
BODY = {"model": "m", "messages": [{"role": "user", "content": USER}], "seed": 7}


@pytest.fixture
def server():
  with serve() as server:
    yield server


def client(server, **options):
  options = {"first_wait": 0.01, "timeout": 5.0, "attempts": 3, **options}
  return Endpoint(server.url, **options)


def ask(endpoint):
  return asyncio.run(endpoint.ask(BODY, lambda text: parse_answer(text, 3)))


def fail(server, *faults):
  """The first requests meet these faults, in this order; those after them none."""
  server.faults = lambda _, time: faults[time] if time < len(faults) else None


def test_an_answer_needs_one_request_that_holds_what_was_asked(server):
  pairs = ask(client(server, key="secret"))
  assert pairs[2] == ("a zorp beside tree 7 2", "a cloud beside tree 7 2 of zorp")
  ((path, headers, body),) = server.requests
  assert path == "/v1/chat/completions"
  assert headers["Authorization"] == "Bearer secret"
  assert headers["Content-Type"] == "application/json"
  assert body == BODY


def test_without_a_key_none_is_sent(server, monkeypatch):
  monkeypatch.setenv("OPENAI_API_KEY", "secret")
  ask(client(server))
  assert "Authorization" not in server.requests[0][1]


RETRIED = {
  "500": "HTTP 500",
  "503": "HTTP 503",
  "429": "HTTP 429",
  "truncated": "cut off",
  "no completion": "invalid answer",
  "no content": "invalid answer",
  "invalid UTF-8": "invalid answer",
  "deep": "invalid answer",
  "wrong schema": "invalid answer",
  "no JSON": "invalid answer",
  "reset": "connection",
  "close early": "connection",
  "not HTTP": "connection",
  "huge": "invalid answer",
}


@pytest.mark.parametrize(("fault", "reason"), RETRIED.items(), ids=RETRIED)
def test_a_fault_is_tried_again_and_counted(server, fault, reason):
  fail(server, fault, fault)
  endpoint = client(server)
  assert len(ask(endpoint)) == 3
  assert endpoint.retries == {reason: 2}
  assert len(server.requests) == 3


@pytest.mark.parametrize("fault", ["500", "reset", "no JSON"])
def test_attempts_have_a_limit(server, fault):
  server.faults = lambda *_: fault
  with pytest.raises(RequestFailed):
    ask(client(server))
  assert len(server.requests) == 3


def test_only_an_invalid_answer_changes_the_seed(server):
  """A host that honours seeds would give it again; a broken line says nothing."""
  fail(server, "500", "wrong schema", "reset")
  ask(client(server, attempts=4))
  assert [body["seed"] for *_, body in server.requests] == [7, 7, 8, 8]


def test_prose_around_the_answer_does_no_harm(server):
  fail(server, "prose")
  assert len(ask(client(server))) == 3
  assert len(server.requests) == 1


@pytest.mark.parametrize("fault", ["silent", "drip", "drip headers"])
def test_a_reply_that_does_not_end_is_given_up(server, fault):
  """`drip` sends a byte often enough for any time-out of a single read."""
  fail(server, fault)
  endpoint = client(server, timeout=0.3)
  start = time.monotonic()
  ask(endpoint)
  assert 0.3 <= time.monotonic() - start < 3
  assert endpoint.retries == {"time-out": 1}


def test_a_reply_is_read_up_to_a_limit(server, monkeypatch):
  monkeypatch.setattr(endpoint_module, "MAX_BYTES", 2**16)
  fail(server, "huge")
  ask(client(server))
  assert server.sent_bytes < 32 * 2**20


def test_retry_after_is_honoured(server):
  fail(server, "429")
  server.retry_after = 1
  start = time.monotonic()
  ask(client(server))
  assert time.monotonic() - start >= 1


def test_a_host_that_asks_for_an_hour_is_not_waited_for(server):
  fail(server, "429")
  server.retry_after = 3600
  with pytest.raises(RequestFailed, match=r"HTTP 429, .* 3600 s"):
    ask(client(server))


def test_retry_after_is_seconds_or_a_date():
  now = datetime.datetime.now(datetime.UTC)
  later = email.utils.format_datetime(now + datetime.timedelta(seconds=50), True)
  assert 45 < seconds_to_wait(later) <= 50
  assert seconds_to_wait(" 7 ") == 7
  for header in (None, "", "-3", "soon", "nan", "²", email.utils.format_datetime(now)):
    assert seconds_to_wait(header) == 0


def test_waits_double_up_to_a_limit_and_differ(server, monkeypatch):
  waits = []

  async def sleep(seconds):
    waits.append(seconds)

  monkeypatch.setattr(endpoint_module.asyncio, "sleep", sleep)
  endpoint = client(server, attempts=10, first_wait=1.0)
  server.faults = lambda *_: "503"
  with pytest.raises(RequestFailed):
    ask(endpoint)
  for number, wait in enumerate(waits):
    assert 0.5 * min(60, 2**number) <= wait <= min(60, 2**number)
  assert len(waits) == 9
  assert len({wait / min(60, 2**number) for number, wait in enumerate(waits)}) > 1


def test_other_formats_are_tried_and_the_one_that_works_is_kept(server):
  kinds = []

  def faults(body, _):
    kinds.append(body.get("response_format", {}).get("type"))
    return "400" if kinds[-1] else None

  server.faults = faults
  endpoint = client(server, formats=list(FORMATS.values()), attempts=1)
  ask(endpoint)
  ask(endpoint)
  assert kinds == ["json_schema", "json_object", None, None]


def test_a_request_that_no_format_helps_does_not_change_the_next(server):
  fail(server, "400", "400", "400")
  endpoint = client(server, formats=list(FORMATS.values()))
  with pytest.raises(RequestFailed, match="HTTP 400: not this one"):
    ask(endpoint)
  ask(endpoint)
  assert "json_schema" in server.requests[-1][2]["response_format"]
  assert len(server.requests) == 4


def test_a_wrong_key_ends_everything_and_is_not_shown(server):
  fail(server, "401")
  with pytest.raises(InputError, match=r"HTTP 401 .*--api_key_env") as error:
    ask(client(server, key="secret"))
  assert "secret" not in str(error.value)
  assert "(key)" in str(error.value)


def test_an_unknown_model_ends_everything(server):
  fail(server, "404")
  with pytest.raises(InputError, match=r"HTTP 404 \(no such model\); .*--model"):
    ask(client(server))


def test_a_redirect_is_not_followed(server):
  with serve() as other:
    fail(server, "redirect")
    server.elsewhere = f"{other.url}/chat/completions"
    with pytest.raises(InputError, match=r"HTTP 307 .redirect to http://127.*; give"):
      ask(client(server, key="secret"))
    assert other.requests == []


def test_proxies_of_the_environment_are_not_used(server, monkeypatch):
  with serve() as other:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{other.server_port}")
    ask(client(server))
    assert other.requests == []


def test_what_a_host_says_is_shown_without_control_characters(server):
  server.faults = lambda *_: "500"
  with pytest.raises(RequestFailed, match=r"HTTP 500: out of  \[31mmemory"):
    ask(client(server))


def test_nobody_there_is_a_failed_request():
  with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
  endpoint = Endpoint(f"http://127.0.0.1:{port}/v1", attempts=2, first_wait=0.01)
  with pytest.raises(RequestFailed, match="connection: ConnectError"):
    ask(endpoint)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes the certificate")
def test_an_untrusted_certificate_ends_everything(tmp_path):
  """And the host does not see the key."""
  certificate, private = tmp_path / "certificate.pem", tmp_path / "private.pem"
  subprocess.run(
    [
      *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
      *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
      *("-keyout", private, "-out", certificate),
    ],
    check=True,
    capture_output=True,
  )
  context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
  context.load_cert_chain(certificate, private)
  with serve(context) as server:
    url = f"https://localhost:{server.server_port}/v1"
    with pytest.raises(InputError, match=r"self.signed.*SSL_CERT_FILE"):
      ask(Endpoint(url, key="secret"))
    assert server.requests == []
    with pytest.MonkeyPatch.context() as environment:
      environment.setenv("SSL_CERT_FILE", str(certificate))
      assert len(ask(Endpoint(url, key="secret"))) == 3


def test_a_cancelled_request_ends_at_once(server):
  server.faults = lambda *_: "silent"

  async def cancel():
    endpoint = client(server, timeout=60.0)
    task = asyncio.create_task(endpoint.ask(BODY, str))
    while not server.requests:
      await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
      await task

  start = time.monotonic()
  asyncio.run(cancel())
  assert time.monotonic() - start < 5


def test_without_the_client_s_library_it_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "httpx2", None)
  with pytest.raises(InputError, match=r'pip install "safetydpo-jax\[prompts\]"'):
    Endpoint("http://host/v1")


@pytest.mark.parametrize(
  ("url", "complete"),
  [
    ("https://host.example/api/v1/", "https://host.example/api/v1/chat/completions"),
    ("http://[::1]:8000/v1/chat/completions", "http://[::1]:8000/v1/chat/completions"),
  ],
)
def test_an_address_is_completed_once(url, complete):
  assert completions_url(url) == complete


NO_ADDRESSES = (
  "localhost:8000",
  "file:///etc/passwd",
  "http://",
  "http://h:x/",
  "http://a..b/",
  "http://h/v1?key=1",
  "http://h/a b",
  "http://h/\r\nX: 1",
  "http://h/ü",
  "http://[h",
  "http://h:99999/",
  "ftp://h/v1",
)


@pytest.mark.parametrize("url", NO_ADDRESSES)
def test_other_addresses_are_refused(url):
  with pytest.raises(InputError, match="--endpoint is not an address like"):
    completions_url(url)


def test_a_key_in_the_address_is_refused_and_not_shown():
  with pytest.raises(InputError, match="--api_key_env") as error:
    completions_url("http://user:secret@host/v1")
  assert "secret" not in str(error.value)


@pytest.mark.parametrize("key", ["", " ", "a\nX: 1", "ключ"])
def test_a_key_that_no_header_can_hold_is_refused(key):
  with pytest.raises(InputError, match="API key is empty or not printable ASCII"):
    Endpoint("http://host/v1", key=key)


def test_a_check_that_fails_for_another_reason_is_not_hidden(server):
  with pytest.raises(ZeroDivisionError):
    asyncio.run(client(server).ask(BODY, lambda text: 1 / 0))
