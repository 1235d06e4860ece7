"""The client against a host that does everything that hosts do wrong."""

import datetime
import email.utils
import socket
import threading
import time

import pytest

from safetydpo_jax.data.writing import endpoint as endpoint_module
from safetydpo_jax.data.writing.endpoint import (
  Endpoint,
  RequestFailed,
  seconds_to_wait,
  split_url,
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
  return endpoint.ask(BODY, lambda text: parse_answer(text, 3))


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


@pytest.mark.parametrize("fault", ["silent", "drip"])
def test_a_reply_that_does_not_end_is_given_up(server, fault):
  """`drip` sends a byte within every time-out of the socket."""
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
  with pytest.raises(RequestFailed, match="HTTP 429, asks to wait 3600 s"):
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
  endpoint = client(server, attempts=10, first_wait=1.0)
  monkeypatch.setattr(endpoint._stopped, "wait", waits.append)
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
  with pytest.raises(RequestFailed, match="connection: ConnectionRefusedError"):
    ask(endpoint)


def test_stop_ends_what_is_in_flight(server):
  server.faults = lambda *_: "silent"
  endpoint, errors = client(server, timeout=60.0), []

  def run():
    try:
      ask(endpoint)
    except RequestFailed as error:
      errors.append(error)

  thread = threading.Thread(target=run, daemon=True)
  thread.start()
  while not server.requests:
    time.sleep(0.01)
  endpoint.stop()
  thread.join(5)
  assert len(errors) == 1
  with pytest.raises(RequestFailed, match="stopped"):
    ask(endpoint)


def test_an_address_is_completed_once():
  kind, *place = split_url("https://host.example/api/v1/")
  assert kind.default_port == 443
  assert place == ["host.example", 443, "/api/v1/chat/completions"]
  assert split_url("http://[::1]:8000/v1/chat/completions")[1:] == (
    "::1",
    8000,
    "/v1/chat/completions",
  )


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
)


@pytest.mark.parametrize("url", NO_ADDRESSES)
def test_what_is_no_address_is_refused(url):
  with pytest.raises(InputError, match="--endpoint is no address like"):
    split_url(url)


def test_a_key_in_the_address_is_refused_and_not_shown():
  with pytest.raises(InputError, match="use --api_key_env") as error:
    split_url("http://user:secret@host/v1")
  assert "secret" not in str(error.value)


@pytest.mark.parametrize("key", ["", " ", "a\nX: 1", "ключ"])
def test_a_key_that_no_header_can_hold_is_refused(key):
  with pytest.raises(InputError, match="API key is empty or no printable ASCII"):
    Endpoint("http://host/v1", key=key)


def test_a_check_that_fails_for_another_reason_is_not_hidden(server):
  with pytest.raises(ZeroDivisionError):
    client(server).ask(BODY, lambda text: 1 / 0)
