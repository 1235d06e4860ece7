"""prompts: a list of concepts and a host that misbehaves → pairs, whatever happens."""

import json
import threading
import time

import pytest

from safetydpo_jax import encode, generate
from safetydpo_jax.errors import InputError
from tests.support.llm_server import (
  CONCEPTS,
  FAULTS,
  concept_of,
  make_pairs,
  pairs_json,
  sent,
  short,
)


def counts(file):
  found = json.loads(file.read_text())
  names = ("asked", "accepted", "duplicates", "invalid", "failed", "unused")
  found = {name: found[name] for name in names}
  assert found["asked"] == sum(found[name] for name in names[1:])
  return found


def test_every_concept_gets_its_pairs_in_the_order_of_the_list(
  run_prompts, server, tmp_path
):
  rows = run_prompts("--evaluation_seed", 100)
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


def test_a_request_says_what_was_asked_for(run_prompts, server):
  run_prompts(
    "--temperature", 0.5, "--max_tokens", 99, "--response_format", "json_object"
  )
  body = server.requests[0][2]
  assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.5, 99)
  assert body["response_format"] == {"type": "json_object"}
  assert "Write 3 pairs" in body["messages"][1]["content"]
  assert len(set(sent(server))) == 8


def test_another_seed_gives_other_requests(run_prompts, server):
  run_prompts(out="a.csv")
  first = set(sent(server))
  run_prompts("--seed", 1, "--max_tokens", 0, out="b.csv")
  assert not first & set(sent(server)[8:])
  assert "max_tokens" not in server.requests[-1][2]


def test_requests_run_at_the_same_time_but_not_more_than_allowed(run_prompts, server):
  server.delay = lambda body: 0.1
  run_prompts("--batch", 3)
  assert server.most_in_flight == 3


def test_the_order_in_which_answers_arrive_decides_nothing(
  run_prompts, server, tmp_path
):
  same = json.dumps({"pairs": make_pairs("same", 2, 0)})
  server.answer = lambda body: same if body["seed"] % 3 == 0 else pairs_json(body)
  run_prompts(out="a.csv")
  for batch, sign in ((8, 1), (8, -1), (1, 1)):
    ranks = CONCEPTS[::sign]
    server.delay = lambda body, ranks=ranks: 0.03 * ranks.index(concept_of(body))
    run_prompts("--batch", batch, out="b.csv")
    assert (tmp_path / "b.csv").read_bytes() == (tmp_path / "a.csv").read_bytes()
    (tmp_path / "b.csv.jsonl").unlink()


# Each first request meets one of these; the time-out has its own test.
PASSING = ("500", "429", "truncated", "prose", "wrong schema", "reset", "huge")


@pytest.mark.parametrize("fault", [*PASSING, "invalid UTF-8", "close early"])
def test_a_fault_that_passes_costs_no_pair(run_prompts, server, tmp_path, fault):
  assert fault in FAULTS
  server.faults = lambda _, time: fault if time == 0 else None
  assert len(run_prompts()) == 48
  assert counts(tmp_path / "p.csv.json")["accepted"] == 24


def test_a_slow_answer_is_asked_for_again(run_prompts, server):
  server.faults = lambda _, time: "silent" if time == 0 else None
  assert len(run_prompts("--timeout", 0.5)) == 48


def test_duplicates_and_invalid_pairs_are_replaced(run_prompts, server, tmp_path):
  def answer(body):
    pairs = json.loads(pairs_json(body))["pairs"]
    if len(server.requests) <= 8:
      if concept_of(body) == "zorp":
        pairs[0] = make_pairs("same", 1, 0)[0]
      if concept_of(body) == "wug":
        pairs[1:] = [{"unsafe": "x\ny", "safe": "z"}]
    return json.dumps({"pairs": pairs})

  server.answer = answer
  assert len(run_prompts("--batch", 1)) == 48
  assert counts(tmp_path / "p.csv.json") == {
    "asked": 29,
    "accepted": 24,
    "duplicates": 1,
    "invalid": 4,
    "failed": 0,
    "unused": 0,
  }


def test_too_few_pairs_are_an_error_that_names_the_concept(
  run_prompts, server, tmp_path, capsys
):
  short(server)
  with pytest.raises(InputError, match=r"1 of 4 concepts .* 6 pairs"):
    run_prompts()
  assert "too few: wug (harassment): 1 of 6 pairs" in capsys.readouterr().out
  assert not (tmp_path / "p.csv").exists()
  assert len(run_prompts("--allow_fewer")) == 2 * 19
  assert counts(tmp_path / "p.csv.json")["accepted"] == 19


def test_a_request_that_fails_is_made_up_for_by_another(run_prompts, server, tmp_path):
  first = []

  def faults(body, _):
    first[:] = first or [body["seed"]]
    return "400" if body["seed"] == first[0] else None

  server.faults = faults
  assert len(run_prompts("--response_format", "none")) == 48
  assert counts(tmp_path / "p.csv.json")["failed"] == 3


def test_a_host_that_fails_always_is_given_up_on(run_prompts, server, tmp_path, capsys):
  server.faults = lambda *_: "503"
  with pytest.raises(InputError, match=r"4 of 4 concepts .* 6 pairs"):
    run_prompts("--attempts", 2)
  assert len(server.requests) == 16  # one round, twice each
  assert "failed: zorp: HTTP 503" in capsys.readouterr().out
  with pytest.raises(InputError, match=r"16 requests .*HTTP 503"):
    run_prompts("--attempts", 1, out="q.csv", per_concept=30)
  assert len(server.requests) < 16 + 40
  assert not (tmp_path / "q.csv").exists()


def test_a_wrong_key_ends_the_run_and_is_written_nowhere(
  run_prompts, server, tmp_path, monkeypatch, capsys
):
  monkeypatch.setenv("SOME_KEY", "s3cret")
  server.faults = lambda *_: "401"
  with pytest.raises(InputError, match="HTTP 401") as error:
    run_prompts("--api_key_env", "SOME_KEY", "--batch", 1)
  server.faults = lambda *_: None
  run_prompts("--api_key_env", "SOME_KEY")
  assert server.requests[-1][1]["Authorization"] == "Bearer s3cret"
  written = b"".join(file.read_bytes() for file in tmp_path.iterdir())
  assert b"s3cret" not in written
  assert "s3cret" not in "".join((str(error.value), *capsys.readouterr()))


def test_a_key_that_is_not_there_is_named(run_prompts, server, monkeypatch):
  monkeypatch.delenv("SOME_KEY", raising=False)
  with pytest.raises(InputError, match="--api_key_env names SOME_KEY"):
    run_prompts("--api_key_env", "SOME_KEY")
  assert server.requests == []


def test_a_dry_run_shows_the_messages_and_sends_and_writes_nothing(
  run_prompts, server, tmp_path, capsys
):
  with pytest.raises(FileNotFoundError):
    run_prompts("--dry_run")
  shown = capsys.readouterr().out
  assert "--- system\nYou write" in shown
  assert "Concept: zorp\n\nWrite 3 pairs." in shown
  assert "4 concepts, 6 pairs each: 8 requests to m" in shown
  assert server.requests == []
  assert [file.name for file in tmp_path.iterdir()] == ["concepts.csv"]


def test_a_template_of_ones_own(run_prompts, server, tmp_path):
  text = 'system = "s {category}"\nuser = "Concept: {concept}\\nWrite {count} pairs"'
  (tmp_path / "t.toml").write_text(text)
  run_prompts("--template", tmp_path / "t.toml")
  assert "s self harm" in {b["messages"][0]["content"] for *_, b in server.requests}


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
def test_a_wrong_option_is_named_before_anything_is_sent(
  run_prompts, server, name, value
):
  with pytest.raises(InputError, match=f"--{name} is "):
    run_prompts(f"--{name}", value)
  assert server.requests == []


def test_concepts_that_repeat_are_asked_for_once(run_prompts, server, tmp_path, capsys):
  with open(tmp_path / "concepts.csv", "a") as file:
    file.write("Zorp,Hate\n")
  assert len(run_prompts()) == 48
  assert "1 rows repeat a concept" in capsys.readouterr().out


def test_generate_renders_the_pairs_and_encode_reads_them(
  run_prompts, tmp_path, tiny_checkpoint
):
  """Both pictures of a pair come from one noise: only the prompts differ."""
  run_prompts(out="pairs/p.csv", per_concept=1)
  model = ["--model", str(tiny_checkpoint)]
  out = str(tmp_path / "pairs")
  prompt_file = ["--prompts", str(tmp_path / "pairs" / "p.csv"), "--out", out]
  generate.main([*model, *prompt_file, "--steps", "2"])
  encode.main([*model, "--pairs", out, "--out", str(tmp_path / "cache")])
  about = json.loads((tmp_path / "cache" / "cache.json").read_text())
  assert about["counts"]["pairs"] == 4
  assert about["counts"]["captions"] == 8


def test_no_thread_is_left_over(run_prompts):
  run_prompts()
  deadline = time.monotonic() + 2
  while any(
    name in thread.name
    for thread in threading.enumerate()
    for name in ("Timer", "Pool", "asyncio")
  ):
    assert time.monotonic() < deadline
    time.sleep(0.01)
