"""prompts stopped, run again, run with more rounds: nothing is asked for twice."""

import os
import signal
import subprocess
import sys
import time

import pytest

from safetydpo_jax.errors import InputError
from tests.support.llm_server import concept_of, pairs_json, sent, short


def test_more_rounds_go_on_where_fewer_ended(run_prompts, server):
  short(server)
  with pytest.raises(InputError, match=r"1 of 4 concepts .* --rounds"):
    run_prompts("--rounds", 2)
  asked = len(server.requests)
  server.answer = pairs_json
  assert len(run_prompts("--rounds", 4)) == 48
  assert {concept for concept, _ in sent(server)[asked:]} == {"wug"}


def test_the_same_command_again_asks_nothing_and_writes_the_same(
  run_prompts, server, tmp_path
):
  run_prompts()
  before = (tmp_path / "p.csv").read_bytes()
  (tmp_path / "p.csv").unlink()
  run_prompts()
  assert (tmp_path / "p.csv").read_bytes() == before
  assert len(server.requests) == 8


@pytest.mark.parametrize(
  ("name", "value"), [("temperature", 0.5), ("seed", 3), ("model", "n")]
)
def test_other_settings_do_not_go_on(run_prompts, server, name, value):
  run_prompts()
  with pytest.raises(InputError, match=f"{name} .*, now it is {value!r}; .*--out"):
    run_prompts(f"--{name}", value)
  assert len(server.requests) == 8


def start(arguments):
  line = [sys.executable, "-m", "safetydpo_jax.prompts", *arguments]
  return subprocess.Popen(
    line,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
    # A shell that starts the tests in the background lets its children ignore it.
    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
  )


def test_a_killed_run_goes_on_without_asking_twice(prompts_command, server, tmp_path):
  """Killed at any moment, nothing but what was in flight is asked for again."""
  whole = start(prompts_command(out="whole.csv"))
  assert whole.wait(60) == 0
  server.requests.clear()
  server.times_asked.clear()
  server.delay = lambda body: 0.1
  kills = 0
  for seconds in (0.15, 0.25):
    seen = len(server.requests)
    process = start(prompts_command("--batch", 2))
    while len(server.requests) == seen:
      assert process.poll() is None
      time.sleep(0.005)
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    kills += process.wait() == -signal.SIGKILL
  assert kills == 2
  assert not (tmp_path / "p.csv").exists()
  assert start(prompts_command("--batch", 2)).wait(60) == 0
  assert (tmp_path / "p.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
  asked = sent(server)
  assert len(set(asked)) == 8
  assert 8 < len(asked) <= 8 + kills * 2


def test_an_interrupt_does_not_wait_for_what_is_in_flight(
  prompts_command, server, tmp_path
):
  server.faults = lambda body, _: "silent" if concept_of(body) != "zorp" else None
  process = start(prompts_command("--timeout", 60))
  journal = tmp_path / "p.csv.jsonl"

  def answered():
    return journal.read_text().count("\n") if journal.exists() else 0

  while len(server.requests) < 8 or answered() < 1 + 2:
    assert process.poll() is None
    time.sleep(0.01)
  process.send_signal(signal.SIGINT)
  assert process.wait(30) == 130  # and not after the 60 seconds of --timeout
  assert answered() == 1 + 2
