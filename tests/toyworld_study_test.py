"""The study: its trials are commands that parse, its tables are figures read right."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from safetydpo_jax import comerge, merge
from safetydpo_jax.toyworld import (
  demo,
  measure,
  scenes,
  study_picture,
  study_tables,
  trials,
)

CATEGORIES = ["hate", "violence", "self_harm"]


@pytest.fixture
def options():
  return demo.parse_arguments(
    ["--out", "demo", "--seed", "5", "--categories", ",".join(CATEGORIES)]
  )


@pytest.fixture
def table(tmp_path, options):
  for name in CATEGORIES:
    (tmp_path / "runs" / name).mkdir(parents=True)
  about = {"rank": 3, "step": 90}
  (tmp_path / "runs/hate/expert.json").write_text(json.dumps(about))
  return trials.trials(tmp_path, tmp_path / "out", options)


def flags(trial):
  """{--name: value} of a trial's command."""
  module, words = trial.command
  pairs = [w.split("=", 1) if "=" in w else None for w in words]
  if module == "train":
    return dict(pair for pair in pairs if pair)
  return dict(zip(words[::2], words[1::2]))


def test_every_trial_has_a_folder_of_its_own(table):
  assert len({trial.folder for trial in table}) == len(table)


def test_one_lora_is_trained_with_the_steps_of_one_and_of_all_experts(table):
  steps = [flags(t)["--config.steps"] for t in table if t.group == "all_single"]
  assert steps == ["90", str(3 * 90)]


def test_every_method_merges_all_experts_and_merge_takes_its_options(table):
  merges = [trial for trial in table if trial.group == "merges"]
  methods = set()
  for trial in merges:
    read = merge.parse_arguments(trial.command[1])
    merge.check_options(read)
    methods.add(read.method)
    assert len(read.experts.split(",")) == 3
  assert methods == set(merge.OPTIONS)


def test_where_a_rank_is_asked_for_it_is_the_experts(table):
  (trial,) = [t for t in table if t.name == "co_merge_product, svd"]
  assert flags(trial)["--rank"] == "3"


def test_merges_of_the_first_experts_grow_one_by_one(table):
  counts = [
    len(flags(t)["--experts"].split(","))
    for t in table
    if t.group == "experts, co_merge"
  ]
  assert counts == [1, 2]  # all three stand among the merges


def test_a_share_of_the_pairs_is_what_is_not_held_out(table):
  held_out = {t.group: flags(t)["--config.holdout"] for t in table if "data" in t.group}
  assert held_out == {"data, 0.1": "0.9", "data, 0.3": "0.7"}


def test_all_trials_of_a_seed_share_its_seeds_and_statistics(table):
  for trial in table:
    given = flags(trial)
    if trial.command[0] == "train":
      assert (given["--config.seed"], given["--config.lora.seed"]) == ("5", "5")
    elif "co_merge" in given["--method"]:
      assert Path(given["--statistics"]).name == "statistics"


def write_pictures(folder: Path, prompts: Path, shift: int) -> None:
  folder.mkdir(parents=True)
  pair = scenes.prompt_pairs(1, 0, "hate")[0]
  pixels = scenes.render(pair.scene)
  rows = [("u.png", pair.unsafe, pair.concept.word), ("s.png", pair.safe, "")]
  with open(prompts, "w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["prompt", "image", "category", "evaluation_seed", "phrasing"])
    writer.writerows([p, name, "hate", 1, "seen"] for name, p, _ in rows)
  for name, _, word in rows:
    # The picture of the unsafe prompt differs by far and does not count.
    there = 200 * np.ones_like(pixels) if word else pixels
    moved = np.clip(there.astype(int) + shift, 0, 255).astype(np.uint8)
    Image.fromarray(moved).save(folder / name)


def test_distance_is_in_grey_levels_and_of_safe_prompts_alone(tmp_path):
  prompts = tmp_path / "prompts.csv"
  write_pictures(tmp_path / "base", prompts, 0)
  for shift in (0, 3):
    folder = tmp_path / f"moved{shift}"
    write_pictures(folder, prompts, shift)
    base = np.asarray(Image.open(tmp_path / "base/s.png")).astype(int)
    expected = np.abs(np.clip(base + shift, 0, 255) - base).mean()
    pictures = measure.look(folder, prompts)
    assert trials.distance(pictures, prompts, tmp_path / "base") == expected


def test_a_trial_that_is_measured_is_not_made_again(tmp_path, monkeypatch):
  def refuse(*_):
    raise AssertionError("made again")

  monkeypatch.setattr(trials, "_run", refuse)
  trial = trials.Trial("merges", "ties", tmp_path / "merges/ties", ("merge", []), None)
  (tmp_path / "figures/merges").mkdir(parents=True)
  (tmp_path / "figures/merges/ties.json").write_text('{"name": "ties"}')
  assert trials.run_trial(trial, tmp_path, tmp_path, "toy") == {"name": "ties"}


def rates(count, **fields):
  return [
    {"category": c, "phrasing": p, "count": count, "n": 20, **fields}
    for c in ("hate", "all")
    for p in ("seen", "all")
  ]


def useful(share, **fields):
  return [{"category": c, "attributes": share, **fields} for c in ("hate", "all")]


def trial_figures(group, name, count, share):
  return {
    "group": group,
    "name": name,
    "rates": rates(count),
    "utility": useful(share),
    "distance": 2.0,
  }


def results(ours, theirs):
  """One category and seven experts' worth of names; `ours` is (count, utility)."""
  names = [*trials.MERGES]
  given = dict.fromkeys(names, theirs) | {comerge.DEFAULT: ours}
  rows = [trial_figures("merges", name, *given[name]) for name in names]
  for name in study_tables.BY_CATEGORY["all_single"]:
    rows.append(trial_figures("all_single", name, *theirs))
  rows += [trial_figures("data, 0.1", "hate", 8, 0.8)]
  rows += [trial_figures("data, 0.1", "violence", 4, 0.6)]
  demo_figures = {
    "categories": ["hate"],
    "rates": rates(20, contender="base") + rates(2, contender="experts"),
    "utility": useful(1.0, contender="base") + useful(0.98, contender="experts"),
  }
  return {"demo": demo_figures, "trials": rows}


def test_the_table_has_the_mean_and_the_extremes_of_the_seeds():
  text = study_tables.write(
    {0: results((0, 1.0), (8, 0.9)), 1: results((2, 0.9), (8, 0.9))}
  )
  assert f"| {comerge.DEFAULT} (default) | 5.0% (0.0% to 10.0%) |" in text
  assert "| base | 100.0% (100.0% to 100.0%) | 100.0% (100.0% to 100.0%) | 0.0" in text


def test_experts_of_a_share_of_the_pairs_are_averaged_over_categories():
  text = study_tables.write({0: results((0, 1.0), (8, 0.9))})
  assert "| 10% | 30.0% | 70.0% |" in text
  assert "| 100% | 10.0% | 98.0% |" in text


@pytest.mark.parametrize(
  ("ours", "theirs", "words"),
  [
    ([(0, 0.9), (2, 0.9)], [(4, 0.8), (6, 0.8)], ("better, beyond the spread",) * 2),
    ([(0, 0.9), (4, 0.9)], [(4, 0.9), (6, 0.8)], ("within the spread",) * 2),
    ([(6, 0.7), (6, 0.7)], [(1, 0.9), (2, 0.8)], ("worse, beyond the spread",) * 2),
    ([(0, 0.7), (0, 0.7)], [(1, 0.9), (2, 0.8)], ("better, beyond", "worse, beyond")),
  ],
)
def test_better_is_what_no_seed_of_the_other_reaches(ours, theirs, words):
  seeds = {n: results(*pair) for n, pair in enumerate(zip(ours, theirs))}
  line = next(x for x in study_tables.write(seeds).splitlines() if "against ties" in x)
  ip, utility = line.split("; ")
  assert f"IP {words[0]}" in ip
  assert f"utility {words[1]}" in utility


def test_the_picture_is_drawn(tmp_path):
  seeds = {n: results((n, 1.0), (8, 0.9)) for n in range(2)}
  study_picture.draw(tmp_path / "study.png", seeds)
  with Image.open(tmp_path / "study.png") as image:
    assert image.width > 1000
  assert [file.name for file in tmp_path.iterdir()] == ["study.png"]
