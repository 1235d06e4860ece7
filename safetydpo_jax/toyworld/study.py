"""Merging in the toy world, measured: `python -m safetydpo_jax.toyworld.study`.

For each seed the demo (`demo.py`), whose seven experts then stand beside
  - one LoRA trained on all pairs, with the steps of one expert and of all of them,
    these also at a third of the learning rate;
  - every merging method, at the experts' rank where it has one (`trials.py`);
  - Co-Merge and the linear mean of the first 1 to 7 experts;
  - experts trained on a share of the pairs.
Prints Markdown tables (`study_tables.py`) and writes them to OUT/study.md, all figures
to OUT/study.json and the picture to OUT/study.png. What is there is not made again, so
a stopped study goes on where it was stopped.
"""

import argparse
import shlex
import time
from pathlib import Path
from typing import Any

import numpy as np

from safetydpo_jax.errors import InputError, run_command
from safetydpo_jax.runtime import manifest
from safetydpo_jax.toyworld import measure, seeds
from safetydpo_jax.toyworld.demo import parse_arguments as parse_demo
from safetydpo_jax.toyworld.experiments import study_picture, study_tables
from safetydpo_jax.toyworld.experiments.trials import distance, run_trial, trials
from safetydpo_jax.toyworld.pretrain import machine

EXAMPLE = """example:
  python -m safetydpo_jax.toyworld.study --out study --seeds 0,1,2
"""


def check_same(out: Path, rest: list[str]) -> None:
  """Keeps the demo's options in OUT/options.json; refuses others later.

  Raises:
    InputError: OUT was begun with other options.
  """
  file = out / "options.json"
  before = manifest.read_json(file, "study") if file.exists() else {"demo": rest}
  if before["demo"] != rest:
    raise InputError(
      f"{out} was begun with {shlex.join(before['demo']) or 'no other options'}, now "
      f"they are {shlex.join(rest) or 'none'}; choose another --out"
    )
  out.mkdir(parents=True, exist_ok=True)
  manifest.write_json(file, before)


def run_demo(out: Path, seed: int, rest: list[str]) -> dict[str, Any]:
  """One seed's demo: its figures, as they are there or made now.

  `distance` of the experts is added, each on the safe prompts of its category.
  """
  demo = out / f"seed{seed}"
  if (demo / "figures.json").exists():
    figures = manifest.read_json(demo / "figures.json", "demo")
  else:
    figures = seeds.run_demo(demo, seed, rest)
  distances = []
  for name in figures["categories"]:
    prompts = demo / f"prompts/{name}.csv"
    pictures = measure.look(demo / "images/experts" / name, prompts)
    distances.append(distance(pictures, prompts, demo / "images/base"))
  return figures | {"distance": float(np.mean(distances))}


def run_trials(out: Path, names: list[int], rest: list[str]) -> dict[int, list[dict]]:
  """Every seed's trials, table by table: {seed: figures of each}."""
  work, done = [], {seed: [] for seed in names}
  for seed in names:
    demo, ours = out / f"seed{seed}", out / f"trials{seed}"
    options = parse_demo(["--out", str(demo), "--seed", str(seed), *rest])
    for number, trial in enumerate(trials(demo, ours, options)):
      work.append((number, seed, trial, (demo, ours, options.model)))
  start = time.monotonic()
  for number, (_, seed, trial, where) in enumerate(sorted(work), start=1):
    minutes = (time.monotonic() - start) / 60
    left = minutes / (number - 1) * (len(work) - number + 1) if number > 1 else 0
    print(
      f"\ntrial {number} of {len(work)}: seed {seed}, {trial.group}, {trial.name} "
      f"({minutes:.0f} minutes, {left:.0f} to go)",
      flush=True,
    )
    done[seed].append(run_trial(trial, *where))
  return done


def main(arguments: list[str] | None = None) -> None:
  """Runs seed after seed, then prints and draws."""
  parser = argparse.ArgumentParser(
    prog="python -m safetydpo_jax.toyworld.study",
    description="Compares merging methods in the toy world; other options are the "
    "demo's.",
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  options, rest = seeds.parse_seeds(parser, arguments)
  check_same(options.out, rest)
  demos = {seed: run_demo(options.out, seed, rest) for seed in options.seeds}
  tried = run_trials(options.out, options.seeds, rest)
  results = {s: {"demo": demos[s], "trials": tried[s]} for s in options.seeds}
  about = {"machine": machine(), "versions": manifest.versions()}
  manifest.write_json(options.out / "study.json", {**about, "seeds": results})
  text = study_tables.write(results)
  (options.out / "study.md").write_text(text, encoding="utf-8")
  study_picture.draw(options.out / "study.png", results)
  print(f"\n{text}\n{options.out / 'study.png'}")


if __name__ == "__main__":
  run_command(main)
