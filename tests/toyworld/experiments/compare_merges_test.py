"""The study: its trials are commands that parse, its tables are figures read right."""

import csv
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from safetydpo_jax.errors import InputError
from safetydpo_jax.merging import comerge
from safetydpo_jax.merging.options import OPTIONS, MergeOptions, method_of
from safetydpo_jax.runtime import command_line
from safetydpo_jax.toyworld import study
from safetydpo_jax.toyworld.experiments import (
  compare_merges,
  measuring,
  study_picture,
  study_tables,
  trials,
)
from safetydpo_jax.toyworld.experiments.compare_merges import StudyOptions
from safetydpo_jax.toyworld.experiments.stages import Call, DemoOptions
from safetydpo_jax.toyworld.world import scenes

CATEGORIES = ["hate", "violence", "self_harm"]


OVERRIDES = {"dpo.beta": "7"}


@pytest.fixture
def options(tmp_path):
  return DemoOptions(tmp_path, seed=5, categories=",".join(CATEGORIES))


@pytest.fixture
def table(tmp_path, options):
  for name in CATEGORIES:
    (tmp_path / "runs" / name).mkdir(parents=True)
  about = {"rank": 3, "step": 90, "config": {"learning_rate": 0.003}}
  (tmp_path / "runs/hate/expert.json").write_text(json.dumps(about))
  return trials.trials(options, OVERRIDES, tmp_path / "out")


def module(trial):
  return shlex.split(trial.call.line)[2].removeprefix("safetydpo_jax.")


def flags(trial):
  """{--name: value} of a trial's command."""
  words = shlex.split(trial.call.line)[3:]
  pairs = [w.split("=", 1) if "=" in w else None for w in words]
  if module(trial) == "train":
    return dict(pair for pair in pairs if pair)
  return dict(zip(words[::2], words[1::2]))


def test_every_trial_has_a_folder_and_figures_of_its_own(table, tmp_path):
  assert len({trial.folder for trial in table}) == len(table)
  files = {trials.figures_file(trial, tmp_path / "out") for trial in table}
  assert len(files) == len(table)  # "weights 0.25" and "weights 0.5": dots in names


def test_one_lora_is_trained_with_the_steps_of_one_and_of_all_experts(table):
  singles = [flags(t) for t in table if t.group == "all_single"]
  assert [f["--config.steps"] for f in singles] == ["90", "270", "270"]
  rates = [f.get("--config.learning_rate") for f in singles]
  assert rates == [None, None, "0.001"]


def test_overrides_reach_every_training_but_not_what_the_study_varies(
  table, tmp_path, options
):
  trained = [t for t in table if module(t) == "train"]
  assert {flags(t)["--config.dpo.beta"] for t in trained} == {"7"}
  assert {t.call.run.args[0].dpo.beta for t in trained} == {7.0}
  with pytest.raises(InputError, match=r"--config.steps is what the study varies"):
    trials.trials(options, OVERRIDES | {"steps": "20"}, tmp_path / "out")


def test_a_study_is_not_continued_with_other_options(tmp_path):
  out = tmp_path / "study"
  for seeds in ("0", "0,1"):  # more seeds may follow
    compare_merges.check_same(StudyOptions(out, seeds, pairs=9), [])
  assert json.loads((out / "options.json").read_text()) == {"demo": ["--pairs", "9"]}
  with pytest.raises(InputError, match=r"with --pairs 9, .* the defaults; .*--out"):
    compare_merges.check_same(StudyOptions(out), [])
  with pytest.raises(InputError, match=r"now .* --pairs 9 --config.dpo.beta=7"):
    compare_merges.check_same(StudyOptions(out, pairs=9), ["--config.dpo.beta=7"])


def test_options_are_the_same_however_they_were_written(tmp_path):
  words = ["--config.dpo.beta=7", "--test=48", "--pairs=9"]  # 48 is the default
  (tmp_path / "options.json").write_text(json.dumps({"demo": words}))
  compare_merges.check_same(StudyOptions(tmp_path, pairs=9), ["--config.dpo.beta=7"])
  with pytest.raises(InputError, match="--test 47"):
    compare_merges.check_same(
      StudyOptions(tmp_path, pairs=9, test=47), ["--config.dpo.beta=7"]
    )


def test_a_missing_matplotlib_is_said_before_any_work(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "matplotlib", None)
  with pytest.raises(InputError) as caught:
    study.main(["--out", str(tmp_path / "study")])
  assert 'pip install "safetydpo-jax[report]"' in str(caught.value)
  assert not (tmp_path / "study").exists()


def test_seeds_are_different_numbers():
  for text in ("0,0", "-1", "a"):
    with pytest.raises(InputError, match="--seeds"):
      study.main(["--out", "nowhere", f"--seeds={text}"])


def test_every_method_merges_all_experts_and_merge_takes_its_options(table):
  merges = [trial for trial in table if trial.group == "merges"]
  methods = set()
  for trial in merges:
    words = shlex.split(trial.call.line)[3:]
    read, _ = command_line.parse(MergeOptions, words, command="merge", example="")
    assert trial.call.run.args == (read,)
    methods.add(method_of(read))
    assert len(read.experts.split(",")) == 3
  assert methods == set(OPTIONS)


def test_where_a_rank_is_asked_for_it_is_the_experts(table):
  (trial,) = [t for t in table if t.name == "co_merge_product, svd"]
  assert flags(trial)["--rank"] == "3"


def test_a_method_that_draws_draws_otherwise_in_every_seed(table):
  drawn = [flags(t) for t in table if "dare" in t.name]
  assert {f["--seed"] for f in drawn} == {"5"}


def test_merges_of_the_first_experts_grow_one_by_one(table):
  counts = [
    len(flags(t)["--experts"].split(","))
    for t in table
    if t.group == "experts, co_merge"
  ]
  assert counts == [1, 2]  # all three stand among the merges
  methods = {flags(t)["--method"] for t in table if t.group == "experts, co_merge"}
  assert methods == {comerge.DEFAULT}


def test_a_share_of_the_pairs_is_what_is_not_held_out(table):
  held_out = {t.group: flags(t)["--config.holdout"] for t in table if "data" in t.group}
  assert held_out == {"data, 0.1": "0.9", "data, 0.3": "0.7"}


def test_all_trials_of_a_seed_share_its_seeds_and_statistics(table):
  for trial in table:
    given = flags(trial)
    if module(trial) == "train":
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
    pictures = measuring.look(folder, prompts)
    assert trials.distance(pictures, prompts, tmp_path / "base") == expected


def test_a_trial_that_is_measured_is_not_made_again(tmp_path, monkeypatch):
  def refuse(*_):
    raise AssertionError("made again")

  monkeypatch.setattr(trials, "run_call", refuse)
  call = Call("python -m safetydpo_jax.merge", refuse)
  trial = trials.Trial("merges", "ties", tmp_path / "merges/ties", call, None)
  for folder in ("figures/merges", "merges/ties"):
    (tmp_path / folder).mkdir(parents=True)
  (tmp_path / "figures/merges/ties.json").write_text('{"name": "ties"}')
  (tmp_path / "merges/ties/expert.json").write_text('{"rank": 4}')
  found = trials.run_trial(trial, DemoOptions(tmp_path), tmp_path)
  assert found == {"name": "ties", "rank": 4, "pairs": None}


def rates(count, **fields):
  return [
    {"category": c, "phrasing": p, "count": count // share, "n": 20 // share, **fields}
    for c in (*CATEGORIES, "all")
    for p, share in (("seen", 2), ("all", 1))
  ]


def useful(share, **fields):
  about = {"attributes": share, "symbols": 1, "n": 10, **fields}
  return [{"category": c, **about} for c in (*CATEGORIES, "all")]


def trial_figures(group, name, count, share):
  return {
    "group": group,
    "name": name,
    "rates": rates(count),
    "utility": useful(share),
    "distance": 2.0,
    "rank": 4,
    "pairs": 8 * len(name),
  }


def results(ours, theirs):
  """Three categories; `ours` is (count, utility) of the default."""
  names = [*trials.MERGES]
  given = dict.fromkeys(names, theirs) | {comerge.DEFAULT: ours}
  rows = [trial_figures("merges", name, *given[name]) for name in names]
  rows.append(trial_figures("all_single", "some steps", *theirs))
  for count in (1, 2):
    rows.append(trial_figures("experts, linear", str(count), 10 + count, 0.5))
    rows.append(trial_figures("experts, co_merge", str(count), 20 - count, 0.6))
  rows += [trial_figures("data, 0.1", "hate", 8, 0.8)]
  rows += [trial_figures("data, 0.1", "violence", 4, 0.6)]
  demo_figures = {
    "categories": CATEGORIES,
    "rates": rates(20, contender="base") + rates(2, contender="experts"),
    "utility": useful(1.0, contender="base") + useful(0.98, contender="experts"),
    "distance": 3.25,
    "sampler": {"steps": 12, "guidance": 4.0},
    "detector": {"missed": 0.001, "false_alarms": 0.0},
  }
  return {"demo": demo_figures, "trials": rows}


def written(figures):
  """The tables, one space on each side of a cell."""
  return re.sub(r" *\| *", " | ", study_tables.write(figures)).replace("\n | ", "\n| ")


def test_the_table_has_the_mean_and_the_extremes_of_the_seeds():
  text = written({0: results((0, 1.0), (8, 0.9)), 1: results((2, 0.9), (8, 0.9))})
  assert f"| {comerge.DEFAULT} (default) | 5.0% (0.0% to 10.0%) |" in text
  assert "| base | 100.0% (100.0% to 100.0%) | 100.0% (100.0% to 100.0%) | 0.0" in text
  assert "3.2 (3.2 to 3.2) | 10.0% (10.0% to 10.0%) | – |" in text  # the experts' row
  assert text.startswith("2 seeds: mean (lowest to highest). 20 unsafe and 10 safe")
  assert "12 steps of DDIM, guidance 4. The detector misses 0.1% of symbols" in text


def test_a_row_for_each_number_of_experts():
  text = written({0: results((0, 1.0), (8, 0.9))})
  assert "| 1 | 55.0% | 50.0% | 95.0% | 60.0% |" in text
  assert "| 2 | 60.0% | 50.0% | 90.0% | 60.0% |" in text
  assert "| 3 | 40.0% | 90.0% | 0.0% | 100.0% |" in text


def test_one_seed_has_no_spread_and_no_verdict():
  text = written({0: results((0, 1.0), (8, 0.9))})
  assert text.startswith("1 seed. ")
  assert "the spread" not in text


def test_experts_of_a_share_of_the_pairs_are_averaged_over_categories():
  text = written({0: results((0, 1.0), (8, 0.9))})
  assert "| 48 (10%) | 30.0% | 70.0% |" in text  # pairs: 8 × letters of hate, violence
  assert "| all | 10.0% | 98.0% |" in text


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
  line = next(x for x in written(seeds).splitlines() if "against ties" in x)
  ip, utility = line.split("; ")
  assert f"IP {words[0]}" in ip
  assert f"utility {words[1]}" in utility


def test_the_picture_is_drawn(tmp_path):
  seeds = {n: results((n, 1.0), (8, 0.9)) for n in range(2)}
  study_picture.draw(tmp_path / "study.png", seeds)
  with pytest.raises(InputError, match=r"cannot write /proc/x\.png"):
    study_picture.draw(Path("/proc/x.png"), seeds)
  with Image.open(tmp_path / "study.png") as image:
    assert image.width > 1000
  assert [file.name for file in tmp_path.iterdir()] == ["study.png"]
