"""Training as a command: the whole spine, resuming, and input that is wrong."""

import json
import shutil
import time

import chex
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from safetydpo_jax import encode, load_lora, load_pipeline, lora, train
from safetydpo_jax.data.cache import batches
from safetydpo_jax.errors import InputError, run_command
from safetydpo_jax.training import run
from tests.support import lookalike, runs
from tests.support.checkpoints import save_tiny_checkpoint


@pytest.fixture(scope="module")
def cache(tiny_checkpoint, tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  lookalike.write_folder_layout(folder / "pairs", pairs=12)
  arguments = ["--model", tiny_checkpoint, "--pairs", folder / "pairs"]
  encode.main([*map(str, arguments), "--out", str(folder / "cache")])
  return folder / "cache"


@pytest.fixture(scope="module")
def finished(tiny_checkpoint, cache, tmp_path_factory):
  """A run of 20 steps on eight devices."""
  workdir = tmp_path_factory.mktemp("runs") / "all"
  arguments = runs.train_arguments(
    tiny_checkpoint, cache, workdir, "all_single", checkpoint_every=16
  )
  # A process of its own: with the compiler's flags of those it is compared with.
  process = runs.start("train", arguments, devices=8)
  output, _ = process.communicate(timeout=600)
  assert process.returncode == 0, output
  return workdir


class Fed(Exception):
  """Raised instead of training, with what the feed was asked for."""


def test_what_the_config_says_of_data_reaches_the_feed(
  tiny_checkpoint, cache, tmp_path, monkeypatch
):
  def feed(cache, **asked):
    raise Fed(asked)

  monkeypatch.setattr(batches, "train_batches", feed)
  changes = {"flip": "none", "caption_dropout": 0.5, "mixture": "unsafe"}
  changes |= {"holdout": 0.3, "seed": 7, "steps": 5}
  arguments = runs.train_arguments(tiny_checkpoint, cache, tmp_path / "x", **changes)
  with pytest.raises(Fed) as caught:
    train.main([*arguments, "--config.category=all"])
  asked = caught.value.args[0]
  assert asked["held_out"] == changes.pop("holdout")
  assert {name: asked[name] for name in changes} == changes
  assert (asked["category"], asked["batch_size"], asked["start_step"]) == ("all", 16, 0)


def read_metrics(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_a_run_leaves_an_expert_that_says_what_it_is(finished, tiny_checkpoint):
  about = json.loads((finished / "expert.json").read_text())
  pipeline = load_pipeline(str(tiny_checkpoint), components=("unet",))
  assert about["category"] == "all"
  assert (about["rank"], about["alpha"], about["step"]) == (4, 4.0, 20)
  assert about["base"]["fingerprint"] == pipeline.fingerprint
  assert about["targets"] == list(lora.ATTENTION_TARGETS)
  tree = load_lora(str(finished))
  fresh = lora.init_lora(jax.random.key(0), pipeline.params["unet"], 4)
  chex.assert_trees_all_equal_shapes(tree, fresh)
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(tree))


def test_every_step_is_logged_once_with_its_errors(finished):
  metrics = read_metrics(finished)
  assert [line["step"] for line in metrics] == list(range(1, 21))
  # β = 5000 on an untrained policy: rounding alone decides the step-0 margin.
  assert metrics[0]["loss"] == pytest.approx(np.log(2), abs=5e-3)
  assert metrics[0]["preferred_error"] == pytest.approx(
    metrics[0]["reference_preferred_error"], rel=1e-5
  )
  expected = {"margin", "accuracy", "gradient_norm", "lora_norm", "dispreferred_error"}
  assert expected <= metrics[0].keys()
  assert list((finished / "tensorboard").iterdir())


def test_a_checkpoint_holds_the_lora_and_its_optimizer_alone(finished):
  newest = max((finished / "checkpoints").iterdir(), key=lambda path: int(path.name))
  metadata = json.loads((newest / "state" / "_METADATA").read_text())
  names = metadata["tree_metadata"].keys()
  factors = len(jax.tree.leaves(load_lora(str(finished))))
  assert len([name for name in names if "'lora'" in name]) == factors
  assert not [name for name in names if "kernel" in name]
  # Adam's two moments of each factor, a few counters and empty states; the base has
  # more than a hundred weights.
  assert 3 * factors < len(names) <= 3 * factors + 8


def assert_same_training(run, other):
  """Equal to rounding: every logged figure, and the way each factor b has moved."""
  for ours, theirs in zip(read_metrics(run), read_metrics(other), strict=True):
    for name in ("step", "loss", "preferred_error", "dispreferred_error"):
      assert ours[name] == pytest.approx(theirs[name], rel=5e-3), name
  expected = flatten_dict(load_lora(str(other)))
  for path, leaf in flatten_dict(load_lora(str(run))).items():
    if path[-1] == "b":
      assert np.abs(leaf - expected[path]).mean() < 0.05 * np.abs(leaf).mean()


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(
  tiny_checkpoint, cache, tmp_path
):
  def arguments(name):
    return runs.train_arguments(
      tiny_checkpoint,
      cache,
      tmp_path / name,
      "all_single",
      steps=16,
      batch_size=4,
      checkpoint_every=4,
    )

  whole = runs.start("train", arguments("whole"))
  output, _ = whole.communicate(timeout=300)
  assert whole.returncode == 0, output

  killed = runs.start("train", arguments("killed"))
  first = tmp_path / "killed" / "checkpoints" / "4"
  deadline = time.monotonic() + 300
  while not first.exists():
    assert killed.poll() is None, killed.communicate()[0]
    assert time.monotonic() < deadline
    time.sleep(0.02)
  killed.kill()
  killed.communicate()
  assert not (tmp_path / "killed" / "expert.json").exists()

  again = runs.start("train", arguments("killed"))
  output, _ = again.communicate(timeout=300)
  assert again.returncode == 0, output
  assert "resume from step" in output
  assert "resume from step 16" not in output
  chex.assert_trees_all_equal(
    load_lora(str(tmp_path / "killed")), load_lora(str(tmp_path / "whole"))
  )
  assert read_metrics(tmp_path / "killed") == read_metrics(tmp_path / "whole")


def test_a_checkpoint_of_eight_devices_goes_on_on_one(
  finished, tiny_checkpoint, cache, tmp_path
):
  shutil.copytree(finished, tmp_path / "run")
  (tmp_path / "run" / "expert.json").unlink()
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "20")
  arguments = runs.train_arguments(
    tiny_checkpoint, cache, tmp_path / "run", "all_single", checkpoint_every=16
  )
  process = runs.start("train", arguments, devices=1)
  output, _ = process.communicate(timeout=300)
  assert process.returncode == 0, output
  assert "resume from step 16" in output
  assert_same_training(tmp_path / "run", finished)


def test_two_processes_equal_one(finished, tiny_checkpoint, cache, tmp_path):
  arguments = runs.train_arguments(
    tiny_checkpoint, cache, tmp_path / "run", "all_single"
  )
  processes = runs.start_hosts("train", arguments, count=2)
  outputs = [process.communicate(timeout=300)[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0], outputs
  assert "2 process(es) × 1 cpu" in outputs[0]
  assert_same_training(tmp_path / "run", finished)


WRONG = {
  "unknown key": ({"lora.rnak": 4}, "rnak"),
  "wrong type": ({"steps": "many"}, "steps"),
  "no cache": ({"cache": ""}, "config.cache is empty"),
  "cache missing": ({"cache": "/nowhere"}, "/nowhere"),
  "unknown category": ({"category": "hats"}, "hats"),
  "unknown loss": ({"dpo.loss": "ppo"}, "expected dpo or sft"),
  "unknown optimizer": ({"optimizer": "sgd"}, "expected adamw or adafactor"),
  "unknown target": ({"lora.targets": "('to_x',)"}, "'to_x' matches no dense layer"),
  "unknown remat": ({"remat": "some"}, "config.remat is 'some'"),
  "unknown mixture": ({"mixture": "mild"}, "mild"),
  "batch": ({"batch_size": 12}, "expected a multiple of the 8 devices"),
  "accumulation": ({"accumulation": 4}, "set config.accumulation=2"),
  "no accumulation": ({"accumulation": 0}, "expected 1 or more"),
  "no logging": ({"log_every": 0}, "expected 1 or more"),
  "mesh": ({"mesh.data": 3}, "there are 8 devices"),
  "no model": ({"model": "no/such/model"}, "no/such/model"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_clear_line(
  changes, message, tiny_checkpoint, cache, tmp_path, capsys
):
  values = {"model": tiny_checkpoint, "cache": cache, **changes}
  arguments = runs.train_arguments(workdir=tmp_path / "run", **values)
  with pytest.raises(SystemExit) as stopped:
    run_command(lambda: train.main(arguments))
  assert stopped.value.code == 1
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert error.startswith("error: ")
  assert message in error
  assert not (tmp_path / "run" / "expert.json").exists()


@pytest.mark.parametrize(
  "override",
  ["optimizer=sgd", "adam.b1=1", "lora.targets=()", "holdout=1", "dpo.bata=1"],
)
def test_a_wrong_value_is_refused_before_a_model_is_read(override, monkeypatch):
  def train_anyway(*_):
    raise AssertionError("training has begun")

  monkeypatch.setattr(run, "train", train_anyway)
  with pytest.raises(InputError, match=f"config.{override.partition('=')[0]}"):
    train.main(["--config=hate:sd15", "--workdir=x", f"--config.{override}"])


def test_a_config_file_that_is_not_there_is_named(tmp_path):
  with pytest.raises(InputError, match=r"hats\.py"):
    train.main(["--config=configs/hats.py", f"--workdir={tmp_path}"])


def test_an_empty_split_is_named(tiny_checkpoint, tmp_path):
  lookalike.write_folder_layout(tmp_path / "pairs", pairs=2)
  arguments = ["--model", tiny_checkpoint, "--pairs", tmp_path / "pairs"]
  encode.main([*map(str, arguments), "--out", str(tmp_path / "cache")])
  with pytest.raises(InputError, match="self_harm"):
    train.main(
      runs.train_arguments(
        tiny_checkpoint, tmp_path / "cache", tmp_path / "run", "self_harm"
      )
    )


def test_a_cache_of_another_base_model_is_refused(cache, tmp_path):
  other = save_tiny_checkpoint(tmp_path / "other", seed=1)
  with pytest.raises(InputError, match=r"does not fit .*fingerprint"):
    train.main(runs.train_arguments(other, cache, tmp_path / "run", "all_single"))


def test_an_output_folder_that_cannot_be_written_is_named(tiny_checkpoint, cache):
  with pytest.raises(InputError, match=r"/proc/run.*--workdir"):
    train.main(runs.train_arguments(tiny_checkpoint, cache, "/proc/run", "all_single"))


OTHER_RUNS = {
  "seed": ({"seed": 5}, "was trained with seed=0, this run has 5"),
  "alpha": ({"lora.alpha": 64.0}, "with lora.alpha=4.0, this run has 64.0"),
  "β": ({"dpo.beta": 50.0}, "with dpo.beta=5000.0, this run has 50.0"),
  "flip": ({"flip": "none"}, "with flip=independent, this run has none"),
  "steps": ({"steps": 10}, "is already at step 20, config.steps is 10"),
  "resume off": ({"resume": False}, "already holds a run"),
}


@pytest.mark.parametrize(("changes", "message"), OTHER_RUNS.values(), ids=OTHER_RUNS)
def test_a_run_with_other_settings_does_not_go_on_from_this_one(
  changes, message, finished, tiny_checkpoint, cache
):
  values = {"steps": 30, **changes}
  with pytest.raises(InputError, match=message):
    train.main(
      runs.train_arguments(tiny_checkpoint, cache, finished, "all_single", **values)
    )


def test_a_diverged_update_is_not_saved(tiny_checkpoint, cache, tmp_path):
  arguments = runs.train_arguments(
    tiny_checkpoint,
    cache,
    tmp_path / "run",
    "all_single",
    learning_rate=1e30,
    checkpoint_every=1,
  )
  with pytest.raises(InputError, match=r"lora_norm is inf at step 1; no checkpoint"):
    train.main(arguments)
  assert not list((tmp_path / "run" / "checkpoints").iterdir())
  assert not (tmp_path / "run" / "expert.json").exists()


def test_help_shows_an_example(capsys):
  with pytest.raises(SystemExit):
    train.main(["--help"])
  assert "--config hate:sd15 --workdir runs/hate" in capsys.readouterr().out
