"""The table of several demos: every seed's own figures, their mean and spread."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from safetydpo_jax.errors import InputError
from safetydpo_jax.runtime import command_line
from safetydpo_jax.toyworld import seeds
from safetydpo_jax.toyworld.experiments import several_seeds
from safetydpo_jax.toyworld.experiments.stages import DemoOptions


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
  lines = several_seeds.table(results).splitlines()
  rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
  return {name: values for name, *values in rows}


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
    assert command[:3] == [sys.executable, "-m", "safetydpo_jax.toyworld.demo"]
    options, overrides = command_line.parse_alone_with_overrides(
      DemoOptions, command[3:], command="toyworld.demo", example=""
    )
    started.append((options, overrides))
    options.out.mkdir()
    (options.out / "figures.json").write_text(json.dumps(figures(2)))
    return subprocess.CompletedProcess(command, 0)

  monkeypatch.setattr(subprocess, "run", run)
  words = ["--out", str(tmp_path), "--seeds", "0,4", "--pairs", "12"]
  seeds.main([*words, "--config.steps=20"])
  assert started == [
    (
      DemoOptions(tmp_path / f"seed{seed}", seed=seed, pairs=12, no_open=True),
      ["--config.steps=20"],
    )
    for seed in (0, 4)
  ]
  assert re.search(
    r"^\| figure +\| seed 0 +\| seed 4 +\|", capsys.readouterr().out, re.M
  )


def test_options_of_the_demo_are_checked_before_the_first_one_runs():
  with pytest.raises(InputError, match="--test is 1; expected 2 or more"):
    several_seeds.SeedOptions(Path("x"), test=1)


def test_a_demo_that_fails_ends_it(tmp_path, monkeypatch):
  failed = subprocess.CompletedProcess([], 1)
  monkeypatch.setattr(subprocess, "run", lambda command: failed)
  with pytest.raises(InputError, match="the demo of seed 2 failed"):
    seeds.main(["--out", str(tmp_path), "--seeds", "2"])


def test_seeds_that_are_no_numbers_are_refused():
  with pytest.raises(InputError, match="--seeds one: expected numbers, as in 0,1,2"):
    seeds.main(["--out", "x", "--seeds", "one"])
