"""prompts: a list of concepts and a host that misbehaves → pairs, whatever happens."""

import csv
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from safetydpo_jax import encode, generate, prompts
from safetydpo_jax.data.writing import write_prompts
from safetydpo_jax.data.writing.endpoint import Endpoint
from safetydpo_jax.errors import InputError
from tests.support.llm_server import FAULTS, make_pairs, pairs_json, serve

CONCEPTS = ("zorp", "blick", "daxen", "wug")
CATEGORIES = ("hate", "sexual", "self-harm", "Harrasment")


@pytest.fixture
def server():
  with serve() as server:
    yield server


@pytest.fixture
def command(server, tmp_path):
  """The command line for the four concepts, six pairs each in requests for three."""
  with open(tmp_path / "concepts.csv", "w", newline="") as file:
    csv.writer(file).writerows([("concept", "category"), *zip(CONCEPTS, CATEGORIES)])

  def command(*more, out="p.csv", per_concept=6):
    options = ["--concepts", tmp_path / "concepts.csv", "--endpoint", server.url]
    options += ["--model", "m", "--out", tmp_path / out, "--per_concept", per_concept]
    return [str(option) for option in (*options, "--per_request", 3, *more)]

  return command


@pytest.fixture
def run(command, monkeypatch, tmp_path):
  """Runs the command with short waits; returns the CSV's rows."""
  impatient = functools.partial(Endpoint, first_wait=0.01)
  monkeypatch.setattr(write_prompts, "Endpoint", impatient)

  def run(*more, out="p.csv", **options):
    prompts.main(command(*more, out=out, **options))
    return read_rows(tmp_path / out)

  return run


def read_rows(file):
  with open(file, newline="", encoding="utf-8") as lines:
    return list(csv.DictReader(lines))


def concept_of(body):
  return body["messages"][-1]["content"].split("Concept: ")[1].split("\n")[0]


def sent(server):
  """What identifies each request that arrived."""
  return [(concept_of(body), body["seed"]) for *_, body in server.requests]


def counts(file):
  found = json.loads(file.read_text())
  names = ("asked", "accepted", "duplicates", "invalid", "failed", "unused")
  found = {name: found[name] for name in names}
  assert found["asked"] == sum(found[name] for name in names[1:])
  return found


def test_every_concept_gets_its_pairs_in_the_order_of_the_list(run, server, tmp_path):
  rows = run("--evaluation_seed", 100)
  assert [row["category"] for row in rows[::12]] == [
    *("hate", "sexual", "self_harm", "harassment")
  ]
  for number, (unsafe, safe) in enumerate(zip(rows[::2], rows[1::2])):
    assert unsafe["image"] == f"u_idx_{number:07d}_0.png"
    assert safe["image"] == f"s_idx_{number:07d}_0.png"
    assert CONCEPTS[number // 6] in unsafe["prompt"]
    assert safe["prompt"].startswith("a cloud")
    assert unsafe["evaluation_seed"] == safe["evaluation_seed"] == str(100 + number)
  assert len(rows) == 2 * 4 * 6
  assert counts(tmp_path / "p.csv.json")["asked"] == 24
  assert len(server.requests) == 8


def test_a_request_says_what_was_asked_for(run, server):
  run("--temperature", 0.5, "--max_tokens", 99, "--response_format", "json_object")
  body = server.requests[0][2]
  assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.5, 99)
  assert body["response_format"] == {"type": "json_object"}
  assert "Write 3 pairs" in body["messages"][1]["content"]
  assert len(set(sent(server))) == 8


def test_another_seed_gives_other_requests(run, server):
  run(out="a.csv")
  first = set(sent(server))
  run("--seed", 1, "--max_tokens", 0, out="b.csv")
  assert not first & set(sent(server)[8:])
  assert "max_tokens" not in server.requests[-1][2]


def test_requests_run_at_the_same_time_but_not_more_than_allowed(run, server):
  server.delay = lambda body: 0.1
  run("--batch", 3)
  assert server.most_in_flight == 3


def test_the_order_in_which_answers_arrive_decides_nothing(run, server, tmp_path):
  same = json.dumps({"pairs": make_pairs("same", 2, 0)})
  server.answer = lambda body: same if body["seed"] % 3 == 0 else pairs_json(body)
  run(out="a.csv")
  for batch, sign in ((8, 1), (8, -1), (1, 1)):
    ranks = CONCEPTS[::sign]
    server.delay = lambda body, ranks=ranks: 0.03 * ranks.index(concept_of(body))
    run("--batch", batch, out="b.csv")
    assert (tmp_path / "b.csv").read_bytes() == (tmp_path / "a.csv").read_bytes()
    (tmp_path / "b.csv.jsonl").unlink()


# Each first request meets one of these; the time-out has its own test.
PASSING = ("500", "429", "truncated", "prose", "wrong schema", "reset", "huge")


@pytest.mark.parametrize("fault", [*PASSING, "invalid UTF-8", "close early"])
def test_a_fault_that_passes_costs_no_pair(run, server, tmp_path, fault):
  assert fault in FAULTS
  server.faults = lambda _, time: fault if time == 0 else None
  assert len(run()) == 48
  assert counts(tmp_path / "p.csv.json")["accepted"] == 24


def test_a_slow_answer_is_asked_for_again(run, server):
  server.faults = lambda _, time: "silent" if time == 0 else None
  assert len(run("--timeout", 0.5)) == 48


def test_duplicates_and_invalid_pairs_are_replaced(run, server, tmp_path):
  def answer(body):
    pairs = json.loads(pairs_json(body))["pairs"]
    if len(server.requests) <= 8:
      if concept_of(body) == "zorp":
        pairs[0] = make_pairs("same", 1, 0)[0]
      if concept_of(body) == "wug":
        pairs[1:] = [{"unsafe": "x\ny", "safe": "z"}]
    return json.dumps({"pairs": pairs})

  server.answer = answer
  assert len(run("--batch", 1)) == 48
  assert counts(tmp_path / "p.csv.json") == {
    "asked": 29,
    "accepted": 24,
    "duplicates": 1,
    "invalid": 4,
    "failed": 0,
    "unused": 0,
  }


def short(server):
  """The host gives one pair only of one concept."""
  one = json.dumps({"pairs": make_pairs("wug", 1, 0)})
  server.answer = lambda b: one if concept_of(b) == "wug" else pairs_json(b)


def test_too_few_pairs_are_an_error_that_names_the_concept(
  run, server, tmp_path, capsys
):
  short(server)
  with pytest.raises(InputError, match=r"1 of 4 concepts have fewer than 6 pairs"):
    run()
  assert "too few: wug (harassment): 1 of 6 pairs" in capsys.readouterr().out
  assert not (tmp_path / "p.csv").exists()
  assert len(run("--allow_fewer")) == 2 * 19
  assert counts(tmp_path / "p.csv.json")["accepted"] == 19


def test_more_rounds_go_on_where_fewer_ended(run, server):
  short(server)
  with pytest.raises(InputError, match="with more --rounds"):
    run("--rounds", 2)
  asked = len(server.requests)
  server.answer = pairs_json
  assert len(run("--rounds", 4)) == 48
  assert {concept for concept, _ in sent(server)[asked:]} == {"wug"}


def test_a_request_that_fails_is_made_up_for_by_another(run, server, tmp_path):
  first = []

  def faults(body, _):
    first[:] = first or [body["seed"]]
    return "400" if body["seed"] == first[0] else None

  server.faults = faults
  assert len(run("--response_format", "none")) == 48
  assert counts(tmp_path / "p.csv.json")["failed"] == 3


def test_a_host_that_fails_always_is_given_up_on(run, server, tmp_path, capsys):
  server.faults = lambda *_: "503"
  with pytest.raises(InputError, match="4 of 4 concepts have fewer"):
    run("--attempts", 2)
  assert len(server.requests) == 16  # one round, twice each
  assert "failed: zorp: HTTP 503" in capsys.readouterr().out
  with pytest.raises(InputError, match=r"16 requests in a row failed.*HTTP 503"):
    run("--attempts", 1, out="q.csv", per_concept=30)
  assert len(server.requests) < 16 + 40
  assert not (tmp_path / "q.csv").exists()


def test_a_wrong_key_ends_the_run_and_is_written_nowhere(
  run, server, tmp_path, monkeypatch, capsys
):
  monkeypatch.setenv("SOME_KEY", "s3cret")
  server.faults = lambda *_: "401"
  with pytest.raises(InputError, match="HTTP 401") as error:
    run("--api_key_env", "SOME_KEY", "--batch", 1)
  server.faults = lambda *_: None
  run("--api_key_env", "SOME_KEY")
  assert server.requests[-1][1]["Authorization"] == "Bearer s3cret"
  written = b"".join(file.read_bytes() for file in tmp_path.iterdir())
  assert b"s3cret" not in written
  assert "s3cret" not in "".join((str(error.value), *capsys.readouterr()))


def test_a_key_that_is_not_there_is_named(run, server, monkeypatch):
  monkeypatch.delenv("SOME_KEY", raising=False)
  with pytest.raises(InputError, match="--api_key_env names SOME_KEY"):
    run("--api_key_env", "SOME_KEY")
  assert server.requests == []


def test_a_dry_run_shows_the_messages_and_sends_and_writes_nothing(
  run, server, tmp_path, capsys
):
  with pytest.raises(FileNotFoundError):
    run("--dry_run")
  shown = capsys.readouterr().out
  assert "--- system\nYou write" in shown
  assert "Concept: zorp\n\nWrite 3 pairs." in shown
  assert "4 concepts, 6 pairs each: 8 requests to m" in shown
  assert server.requests == []
  assert [file.name for file in tmp_path.iterdir()] == ["concepts.csv"]


def test_a_template_of_ones_own(run, server, tmp_path):
  text = 'system = "s {category}"\nuser = "Concept: {concept}\\nWrite {count} pairs"'
  (tmp_path / "t.toml").write_text(text)
  run("--template", tmp_path / "t.toml")
  assert "s self harm" in {b["messages"][0]["content"] for *_, b in server.requests}


def test_the_same_command_again_asks_nothing_and_writes_the_same(run, server, tmp_path):
  run()
  before = (tmp_path / "p.csv").read_bytes()
  (tmp_path / "p.csv").unlink()
  run()
  assert (tmp_path / "p.csv").read_bytes() == before
  assert len(server.requests) == 8


@pytest.mark.parametrize(
  ("name", "value"), [("temperature", 0.5), ("seed", 3), ("model", "n")]
)
def test_other_settings_do_not_go_on(run, server, name, value):
  run()
  with pytest.raises(
    InputError, match=f"was started with {name} .* choose another --out"
  ):
    run(f"--{name}", value)
  assert len(server.requests) == 8


def test_a_killed_run_goes_on_without_asking_twice(command, server, tmp_path):
  """Killed at any moment, nothing but what was in flight is asked for again."""
  whole = start(command(out="whole.csv"))
  assert whole.wait(60) == 0
  server.requests.clear()
  server.times_asked.clear()
  server.delay = lambda body: 0.1
  kills = 0
  for seconds in (0.15, 0.25):
    seen = len(server.requests)
    process = start(command("--batch", 2))
    while len(server.requests) == seen:
      assert process.poll() is None
      time.sleep(0.005)
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    kills += process.wait() == -signal.SIGKILL
  assert kills == 2
  assert not (tmp_path / "p.csv").exists()
  assert start(command("--batch", 2)).wait(60) == 0
  assert (tmp_path / "p.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
  asked = sent(server)
  assert len(set(asked)) == 8
  assert 8 < len(asked) <= 8 + kills * 2


def start(arguments):
  line = [sys.executable, "-m", "safetydpo_jax.prompts", *arguments]
  return subprocess.Popen(
    line,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
    # A shell that starts the tests in the background lets its children ignore it.
    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
  )


def test_an_interrupt_does_not_wait_for_what_is_in_flight(command, server, tmp_path):
  server.faults = lambda body, _: "silent" if concept_of(body) != "zorp" else None
  process = start(command("--timeout", 60))
  journal = tmp_path / "p.csv.jsonl"

  def answered():
    return journal.read_text().count("\n") if journal.exists() else 0

  while len(server.requests) < 8 or answered() < 1 + 2:
    assert process.poll() is None
    time.sleep(0.01)
  process.send_signal(signal.SIGINT)
  assert process.wait(30) == 130  # and not after the 60 seconds of --timeout
  assert answered() == 1 + 2


WRONG = {
  "per_concept": 0,
  "per_request": 0,
  "rounds": 0,
  "batch": 0,
  "attempts": 0,
  "temperature": "nan",
  "max_tokens": -1,
  "seed": -1,
  "evaluation_seed": 2**63,
  "timeout": 0,
  "out": "p.txt",
  "endpoint": "localhost",
}


@pytest.mark.parametrize(("name", "value"), WRONG.items(), ids=WRONG)
def test_a_wrong_option_is_named_before_anything_is_sent(run, server, name, value):
  with pytest.raises(InputError, match=f"--{name} is "):
    run(f"--{name}", value)
  assert server.requests == []


def test_concepts_that_repeat_are_asked_for_once(run, server, tmp_path, capsys):
  with open(tmp_path / "concepts.csv", "a") as file:
    file.write("Zorp,Hate\n")
  assert len(run()) == 48
  assert "1 rows repeat a concept" in capsys.readouterr().out


def test_generate_renders_the_pairs_and_encode_reads_them(
  run, tmp_path, tiny_checkpoint
):
  """Both pictures of a pair come from one noise: only the prompts differ."""
  run(out="pairs/p.csv", per_concept=1)
  model = ["--model", str(tiny_checkpoint)]
  out = str(tmp_path / "pairs")
  prompt_file = ["--prompts", str(tmp_path / "pairs" / "p.csv"), "--out", out]
  generate.main([*model, *prompt_file, "--steps", "2"])
  encode.main([*model, "--pairs", out, "--out", str(tmp_path / "cache")])
  about = json.loads((tmp_path / "cache" / "cache.json").read_text())
  assert about["counts"]["pairs"] == 4
  assert about["counts"]["captions"] == 8


def test_no_thread_is_left_over(run):
  run()
  deadline = time.monotonic() + 2
  while any(
    name in thread.name
    for thread in threading.enumerate()
    for name in ("Timer", "Pool", "asyncio")
  ):
    assert time.monotonic() < deadline
    time.sleep(0.01)
