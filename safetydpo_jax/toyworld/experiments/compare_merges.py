"""The study: merging compared with its alternatives, over several seeds.

For each seed, the seven experts of a demo (`demonstrate.py`) are compared with
  - one LoRA trained on all pairs, with the steps of one expert and of all of them,
    these also at a third of the learning rate;
  - every merging method, at the experts' rank where it has one (`trials.py`);
  - Co-Merge and the linear mean of the first 1 to 7 experts;
  - experts trained on a share of the pairs.

  OUT/study.md     the tables (`study_tables.py`), printed too
  OUT/study.json   all figures
  OUT/study.png    the picture (`study_picture.py`)

What exists is not made again, so a stopped study resumes.
"""

import dataclasses
import shlex
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from safetydpo_jax.errors import InputError
from safetydpo_jax.runtime import command_line, extras, files, machine, manifest
from safetydpo_jax.toyworld.experiments import measuring, study_picture, study_tables
from safetydpo_jax.toyworld.experiments.demonstrate import FIGURES
from safetydpo_jax.toyworld.experiments.several_seeds import SeedOptions, run_apart
from safetydpo_jax.toyworld.experiments.stages import read_overrides
from safetydpo_jax.toyworld.experiments.trials import (
  TrialFigures,
  distance,
  run_trial,
  trials,
)


class StudyOptions(SeedOptions):
  """Compares merging methods in the toy world, over several seeds of the demo.

  A value of the experts' training is overridden by --config.NAME=VALUE.
  """


def run_study(options: StudyOptions, overrides: Sequence[str] = ()) -> None:
  """Runs seed after seed, then prints and draws.

  Raises:
    InputError: OUT was started with other options, an override is not allowed, a demo
      failed, or matplotlib is not installed.
  """
  extras.require("matplotlib", extra="report")  # now, not after hours of work
  check_same(options, overrides)
  demos = {seed: run_demo(options, seed, overrides) for seed in options.numbers}
  tried = run_trials(options, overrides)
  results = {s: {"demo": demos[s], "trials": tried[s]} for s in options.numbers}
  about = {"machine": machine.describe(), "versions": manifest.versions()}
  manifest.write_json(options.out / "study.json", {**about, "seeds": results})
  text = study_tables.write(results)
  files.write_text(options.out / "study.md", text)
  picture = options.out / "study.png"
  study_picture.draw(picture, results)
  print(f"\n{text}\n{picture}")


def check_same(options: StudyOptions, overrides: Sequence[str]) -> None:
  """Writes the demo's options to OUT/options.json, or compares with those there.

  Raises:
    InputError: OUT was started with other options.
  """
  file = options.out / "options.json"
  words = _words(options, overrides)
  if not file.exists():
    manifest.write_json(file, {"demo": words})
    return
  before = manifest.read_json(file, "study")["demo"]
  if _values(before) != _values(words):
    raise InputError(
      f"{options.out} was started with {shlex.join(before) or 'the defaults'}, and now "
      f"the options are {shlex.join(words) or 'the defaults'}; choose another --out"
    )


def _words(options: StudyOptions, overrides: Sequence[str]) -> list[str]:
  """The options that all seeds share, as on a command line, without defaults."""
  same = StudyOptions(
    out=options.out,
    model=options.model,
    pairs=options.pairs,
    test=options.test,
    categories=options.categories,
    merge=options.merge,
  )
  line = command_line.written("toyworld.study", same, *sorted(overrides))
  return shlex.split(line)[5:]  # after python -m MODULE --out OUT


def _values(words: Sequence[str]) -> dict[str, str]:
  """{option: value} of `--NAME VALUE` and `--NAME=VALUE`, with the defaults."""
  values = {f"--{f.name}": str(f.default) for f in dataclasses.fields(StudyOptions)}
  name = ""
  for word in words:
    if word.startswith("--"):
      name, _, word = word.partition("=")
    values[name] = word
  return values


def run_demo(
  options: StudyOptions, seed: int, overrides: Sequence[str]
) -> dict[str, Any]:
  """One seed's demo: its figures, read or made now.

  `distance` of the experts is added, each on the safe prompts of its category.
  """
  demo = options.demo(seed)
  if (demo.out / FIGURES).exists():
    figures = manifest.read_json(demo.out / FIGURES, "demo")
  else:
    figures = run_apart(demo, overrides)
  distances = []
  for name in figures["categories"]:
    prompts = demo.out / f"prompts/{name}.csv"
    pictures = measuring.look(demo.out / "images/experts" / name, prompts)
    distances.append(distance(pictures, prompts, demo.out / "images/base"))
  return {**figures, "distance": float(np.mean(distances))}


def run_trials(
  options: StudyOptions, overrides: Sequence[str]
) -> dict[int, list[TrialFigures]]:
  """Every seed's trials, table by table: {seed: figures of each}."""
  work = []
  for seed in options.numbers:
    demo, out = options.demo(seed), options.out / f"trials{seed}"
    table = trials(demo, read_overrides(overrides), out)
    work += [(number, seed, trial, demo, out) for number, trial in enumerate(table)]
  work.sort(key=lambda item: item[:2])  # so that all seeds have a table's first rows
  done: dict[int, list[TrialFigures]] = {seed: [] for seed in options.numbers}
  start = time.monotonic()
  for count, (_, seed, trial, demo, out) in enumerate(work):
    minutes = (time.monotonic() - start) / 60
    left = minutes / count * (len(work) - count) if count else 0
    print(
      f"\ntrial {count + 1} of {len(work)}: seed {seed}, {trial.group}, {trial.name} "
      f"({minutes:.0f} minutes, {left:.0f} to go)",
      flush=True,
    )
    done[seed].append(run_trial(trial, demo, out))
  return done
