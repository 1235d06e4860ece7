"""The table of several demos: every seed's own figures, their mean and spread."""

import json
import subprocess

import pytest

from safetydpo_jax.errors import InputError
from safetydpo_jax.toyworld import seeds


def figures(after, seconds=60.0, **changes):
  """A demo of one category: of 20 unsafe prompts `after` still show a symbol."""
  counts = {"base": 20, "experts": after, "merged": after + 1}
  rates = [
    {
      "contender": contender,
      "category": category,
      "phrasing": phrasing,
      "count": count if phrasing != "heldout" else 0,
      "right": count,
      "n": 20,
    }
    for contender, count in counts.items()
    for category in ("hate", "all")
    for phrasing in ("seen", "heldout", "all")
  ]
  utility = [
    {
      "contender": contender,
      "category": category,
      "attributes": 1.0 if contender == "base" else 0.9,
      "symbols": 0,
      "n": 20,
    }
    for contender in counts
    for category in ("hate", "all")
  ]
  return {
    "categories": ["hate"],
    "rates": rates,
    "utility": utility,
    "timings": [{"seconds": seconds}, {"seconds": seconds}],
    "resumed": False,
    "peak_memory_gib": 1.5,
    **changes,
  }


def cells(results):
  """{figure: its cells} of the table."""
  lines = [line.strip("| ").split(" | ") for line in seeds.table(results).splitlines()]
  return {name: values for name, *values in lines}


def test_each_figure_stands_for_every_seed_with_mean_and_spread():
  table = cells({0: figures(2), 3: figures(4)})
  assert table["figure"] == ["seed 0", "seed 3", "mean", "spread"]
  assert table["base: IP"] == ["100.0%", "100.0%", "100.0%", "100.0% to 100.0%"]
  row = table["experts, each on its category: IP"]
  assert row == ["10.0%", "20.0%", "15.0%", "10.0% to 20.0%"]
  assert table["merged: IP"][:2] == ["15.0%", "25.0%"]
  assert table["experts: IP in held-out less in seen phrasings"][:1] == ["-10.0%"]
  assert table["experts: utility lost by the worst"][2] == "10.0%"
  assert table["minutes"] == ["2.0", "2.0", "2.0", "2.0 to 2.0"]


def test_the_time_of_a_resumed_demo_is_no_time():
  table = cells({0: figures(2), 1: figures(2, resumed=True)})
  assert table["minutes"][:2] == ["2.0", "–"]


def test_a_base_that_draws_no_symbol_has_no_share_left():
  nothing = figures(0)
  for row in nothing["rates"]:
    row["count"] = 0
  row = cells({0: nothing})["experts: IP of the worst, as share of the base's"]
  assert row[0] == "–%"


def test_each_demo_has_a_process_a_folder_and_a_seed(tmp_path, monkeypatch, capsys):
  started = []

  def run(command):
    started.append(" ".join(command[2:]))
    folder = tmp_path / f"seed{command[command.index('--seed') + 1]}"
    folder.mkdir()
    (folder / "figures.json").write_text(json.dumps(figures(2)))
    return subprocess.CompletedProcess(command, 0)

  monkeypatch.setattr(subprocess, "run", run)
  seeds.main(["--out", str(tmp_path), "--seeds", "0,4", "--pairs", "12"])
  assert started == [
    f"safetydpo_jax.toyworld.demo --out {tmp_path}/seed{seed} --seed {seed} "
    "--no_open --pairs 12"
    for seed in (0, 4)
  ]
  assert "| figure | seed 0 | seed 4 |" in capsys.readouterr().out


def test_a_demo_that_fails_ends_it(tmp_path, monkeypatch):
  failed = subprocess.CompletedProcess([], 1)
  monkeypatch.setattr(subprocess, "run", lambda command: failed)
  with pytest.raises(InputError, match="the demo of seed 2 failed"):
    seeds.main(["--out", str(tmp_path), "--seeds", "2"])


def test_seeds_that_are_no_numbers_are_refused():
  with pytest.raises(InputError, match="--seeds one: expected numbers, as in 0,1,2"):
    seeds.main(["--out", "x", "--seeds", "one"])
