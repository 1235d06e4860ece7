"""The commands as several processes: equal to one, and what a lost one leaves.

`multihost_test` has what the hosts do to each other; here they do the work.
"""

import json
import os
import signal
import time

import chex
import numpy as np
import pytest
from PIL import Image

from safetydpo_jax import encode, evaluate, generate, load_lora, merge, train
from safetydpo_jax.data.cache import batches, records
from safetydpo_jax.training import checkpoint
from tests.commands.train_test import assert_same_training, read_metrics
from tests.support import lookalike, runs
from tests.support.galleries import write_gallery

SHARD = 3  # pairs; twelve pairs make a shard for each of four processes
PROMPTS = "prompt,image,evaluation_seed\n" + "".join(
  f"a shape,{n}.png,{n}\n" for n in range(6)
)
MERGE = ["--method", "co_merge", "--pairs", 1, "--timesteps", "10,900"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
  return lookalike.write_folder_layout(tmp_path_factory.mktemp("data"), pairs=12)


@pytest.fixture(scope="module")
def cache(tiny_checkpoint, pairs, tmp_path_factory):
  folder = tmp_path_factory.mktemp("cache")
  encode.main(list(map(str, encode_arguments(tiny_checkpoint, pairs, folder))))
  return folder


def encode_arguments(model, pairs, out):
  common = ["--model", model, "--pairs", pairs, "--shard_size", SHARD]
  return [*common, "--batch_size", 2, "--out", out]


def run_hosts(command, arguments, count, seconds=900):
  """Runs a command as `count` processes that all succeed; what each printed."""
  processes = runs.start_hosts(command, arguments, count)
  try:
    printed = [process.communicate(timeout=seconds)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [process.returncode for process in processes] == [0] * count, printed
  return printed


def wait_for(path, process, seconds=600):
  end = time.monotonic() + seconds
  while not path.exists():
    assert process.poll() is None, process.communicate()[0]
    assert time.monotonic() < end
    time.sleep(0.05)


def test_sigterm_saves_and_says_how_to_go_on(
  tiny_checkpoint, cache, tmp_path, monkeypatch, capsys
):
  def feed(*args, make=batches.train_batches, **asked):
    for step, batch in enumerate(make(*args, **asked), start=1):
      if step == 3:
        os.kill(os.getpid(), signal.SIGTERM)
      yield batch

  monkeypatch.setattr(batches, "train_batches", feed)
  run = tmp_path / "run"
  arguments = runs.train_arguments(tiny_checkpoint, cache, run, "all_single")
  with pytest.raises(SystemExit) as stopped:
    train.main(arguments)
  assert stopped.value.code == checkpoint.PREEMPTED == 143
  printed = capsys.readouterr().out
  assert "saved at step 3; the same command resumes from there" in printed
  assert [path.name for path in (run / "checkpoints").glob("[0-9]*")] == ["3"]
  assert [line["step"] for line in read_metrics(run)] == [1, 2, 3]
  assert not (run / "expert.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("count", "then"), [(2, 4), (4, 2)])
def test_every_command_as_several_processes_equals_one(
  count, then, tiny_checkpoint, pairs, cache, tmp_path
):
  # encode: the same records, to rounding.
  many = tmp_path / "cache"
  run_hosts("encode", encode_arguments(tiny_checkpoint, pairs, many), count)
  ours, theirs = records.open_cache(str(many)), records.open_cache(str(cache))
  assert (ours.fingerprint, len(ours)) == (theirs.fingerprint, len(theirs))
  for number in range(len(ours)):
    np.testing.assert_array_equal(
      ours[number]["token_ids"], theirs[number]["token_ids"]
    )
    np.testing.assert_allclose(
      ours[number]["moments"], theirs[number]["moments"], atol=2e-3
    )

  # train, and resume as another number of processes: as one process without a stop.
  def arguments(name, steps):
    return runs.train_arguments(
      tiny_checkpoint, cache, tmp_path / name, "all_single", steps=steps, accumulation=1
    )

  run_hosts("train", arguments("run", 5), count)
  printed = run_hosts("train", arguments("run", 10), then)
  assert "resume from step 5" in printed[0]
  train.main(arguments("whole", 10))
  assert_same_training(tmp_path / "run", tmp_path / "whole")

  # merge: every bit.
  experts = f"{tmp_path / 'run'},{tmp_path / 'whole'}"
  common = ["--experts", experts, "--calibration", cache, *MERGE, "--out"]
  run_hosts("merge", [*common, tmp_path / "merged"], count)
  merge.main(list(map(str, [*common, tmp_path / "alone"])))
  chex.assert_trees_all_close(
    load_lora(str(tmp_path / "merged")),
    load_lora(str(tmp_path / "alone")),
    rtol=0,
    atol=1e-6,
  )

  # generate: the same images, to a level of brightness.
  (tmp_path / "prompts.csv").write_text(PROMPTS)
  common = ["--model", tiny_checkpoint, "--lora", tmp_path / "merged", "--steps", 3]
  common += ["--prompts", tmp_path / "prompts.csv", "--out"]
  run_hosts("generate", [*common, tmp_path / "images"], count)
  generate.main(list(map(str, [*common, tmp_path / "one"])))
  for number in range(6):
    left, right = (
      np.asarray(Image.open(tmp_path / name / f"{number}.png")).astype(int)
      for name in ("images", "one")
    )
    assert np.abs(left - right).max() <= 1


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(tmp_path):
  gallery = write_gallery(tmp_path, 2)
  common = ["--images", gallery.images, "--reference", gallery.reference]
  common += ["--prompts", gallery.prompts, "--detector", "toy", "--out"]
  run_hosts("evaluate", [*common, tmp_path / "two"], 2)
  evaluate.main(list(map(str, [*common, tmp_path / "one"])))
  two, one = (
    json.loads((tmp_path / name / "figures.json").read_text())
    for name in ("two", "one")
  )
  assert {**two, "created": None} == {**one, "created": None}
  tables = [(tmp_path / name / "images.csv").read_text() for name in ("two", "one")]
  assert tables[0] == tables[1]


@pytest.mark.slow
def test_a_process_killed_in_a_step_ends_the_job_and_the_run_goes_on(
  tiny_checkpoint, cache, tmp_path
):
  arguments = runs.train_arguments(
    tiny_checkpoint,
    cache,
    tmp_path / "run",
    "all_single",
    steps=2000,
    checkpoint_every=4,
  )
  one, other = runs.start_hosts("train", arguments, 2)
  wait_for(tmp_path / "run" / "checkpoints" / "4", one)
  other.kill()
  printed = one.communicate(timeout=300)[0]  # 100 s of silence, and busy processors
  assert one.returncode not in (0, None)
  assert "the same command on every host" in printed or "another task died" in printed
  assert not (tmp_path / "run" / "expert.json").exists()

  saved = max(int(p.name) for p in (tmp_path / "run" / "checkpoints").glob("[0-9]*"))
  arguments = [a.replace("steps=2000", f"steps={saved + 2}") for a in arguments]
  assert f"resume from step {saved}" in run_hosts("train", arguments, 2)[0]
  assert (tmp_path / "run" / "expert.json").exists()


@pytest.mark.slow
def test_sigterm_on_one_of_two_processes_saves_on_both(
  tiny_checkpoint, cache, tmp_path
):
  arguments = runs.train_arguments(
    tiny_checkpoint,
    cache,
    tmp_path / "run",
    "all_single",
    steps=2000,
    checkpoint_every=4,
  )
  processes = runs.start_hosts("train", arguments, 2)
  wait_for(tmp_path / "run" / "checkpoints" / "4", processes[0])
  processes[1].send_signal(signal.SIGTERM)
  printed = [process.communicate(timeout=300)[0] for process in processes]
  assert [process.returncode for process in processes] == [143, 143], printed
  step = int(printed[0].partition("stopped and saved at step ")[2].split(";")[0])
  saved = max(int(p.name) for p in (tmp_path / "run" / "checkpoints").glob("[0-9]*"))
  assert saved == step
