"""Every family from images to an expert: encode, train, load; SD2.1 and SDXL here.

SD1.5's own spine is in `train_test.py`.
"""

import json
from functools import partial

import chex
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from safetydpo_jax import encode, load_lora, load_pipeline, lora, train
from safetydpo_jax.data.cache import records
from safetydpo_jax.merging import activations
from safetydpo_jax.merging.calibration import choose_pairs
from safetydpo_jax.runtime.sharding import make_mesh
from safetydpo_jax.training.run import COMPONENTS
from tests.support import lookalike, runs
from tests.support.checkpoints import (
  SD2,
  save_tiny_checkpoint,
  save_tiny_sdxl_checkpoint,
)

# The config's variant, how its tiny checkpoint is made, and its cache's time ids.
FAMILIES = {
  "sd21": (partial(save_tiny_checkpoint, **SD2), None),
  "sdxl": (save_tiny_sdxl_checkpoint, [16, 16, 0, 0, 16, 16]),
}
PATTERNS = {
  "lora.targets": "('to_q','ff.net.2','proj_in','conv1','downsamplers.0.conv')",
  "lora.rank_pattern": "(('conv1',2),)",
  "lora.alpha_pattern": "(('to_q',1.0),)",
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
  return request.param


@pytest.fixture(scope="module")
def checkpoint(family, tmp_path_factory):
  return FAMILIES[family][0](tmp_path_factory.mktemp(family) / "checkpoint")


@pytest.fixture(scope="module")
def cache(checkpoint, tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  lookalike.write_folder_layout(folder / "pairs", pairs=6)
  arguments = ["--model", checkpoint, "--pairs", folder / "pairs"]
  encode.main([*map(str, arguments), "--out", str(folder / "cache")])
  return folder / "cache"


def run(family, checkpoint, cache, workdir, **changes):
  changes = {"steps": 3, "batch_size": 8, "accumulation": 1, **changes}
  arguments = runs.train_arguments(checkpoint, cache, workdir, "all_single", **changes)
  train.main([f"{arguments[0]}:{family}", *arguments[1:]])
  return load_lora(str(workdir))


@pytest.fixture(scope="module")
def expert(family, checkpoint, cache, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("runs") / "expert"
  return run(family, checkpoint, cache, workdir), workdir


def test_the_cache_says_sizes_where_the_family_has_them(family, cache):
  manifest = json.loads((cache / "cache.json").read_text())
  assert manifest["time_ids"] == FAMILIES[family][1]
  encoders = 2 if family == "sdxl" else 1
  assert np.shape(manifest["empty_token_ids"]) == (encoders, 77)


def test_training_leaves_an_expert(expert, checkpoint):
  tree, workdir = expert
  shapes = load_pipeline(checkpoint, components=()).unet_shapes()
  fresh = lora.init_lora(jax.random.key(0), shapes, 4)
  chex.assert_trees_all_equal_shapes(tree, fresh)
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(tree))
  metrics = [
    json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()
  ]
  assert [line["step"] for line in metrics] == [1, 2, 3]
  assert metrics[0]["loss"] == pytest.approx(np.log(2), abs=5e-3)


def test_the_plan_says_what_is_predicted(expert, family, checkpoint, cache, capsys):
  run(family, checkpoint, cache, expert[1])
  predicted = {"sd21": "v_prediction", "sdxl": "epsilon"}[family]
  assert f"{predicted}, float32" in capsys.readouterr().out


def test_co_merge_measures_experts_of_every_family(expert, checkpoint, cache):
  pipeline = load_pipeline(checkpoint, components=COMPONENTS)
  opened = records.open_cache(cache)
  (found,) = activations.measure(
    pipeline,
    [expert[0]],
    opened,
    choose_pairs(opened, 1, 0)[:1],
    [500],
    seed=0,
    batch_size=1,
    mesh=make_mesh(),
  )
  factors = flatten_dict(expert[0])
  for path, leaf in flatten_dict(found).items():
    assert leaf.shape == (2, factors[path].shape[-1])
    assert np.isfinite(leaf).all()


@pytest.fixture(scope="module")
def convolutions(family, checkpoint, cache, tmp_path_factory):
  if family != "sd21":
    pytest.skip("one family tells, and every kind of layer is in this one")
  workdir = tmp_path_factory.mktemp("runs") / "convolutions"
  changes = {**PATTERNS, "lora.dropout": 0.2}
  return run(family, checkpoint, cache, workdir, **changes), workdir


def test_convolutions_patterns_and_dropout_are_trained(convolutions):
  tree = flatten_dict(convolutions[0])
  assert all(np.abs(leaf).max() > 0 for leaf in tree.values())
  shapes = {path[1:]: leaf.shape for path, leaf in tree.items()}
  assert shapes["resnets_0", "conv1", "a"][::3] == (3, 2)
  assert shapes["downsamplers_0", "conv", "a"] == (3, 3, 32, 4)
  assert all(leaf.ndim == 2 for path, leaf in tree.items() if path[-1] == "b")
  about = json.loads((convolutions[1] / "expert.json").read_text())
  assert about["rank"] == 4
  assert about["config"]["lora"]["dropout"] == 0.2
  assert "init" not in about


def test_a_warm_start_that_learns_nothing_is_the_lora_it_started_from(
  convolutions, family, checkpoint, cache, tmp_path
):
  tree, workdir = convolutions
  changes = {**PATTERNS, "lora.init": workdir, "lora.alpha": 8.0, "learning_rate": 0.0}
  again = run(family, checkpoint, cache, tmp_path / "run", steps=1, **changes)
  chex.assert_trees_all_close(again, tree, rtol=1e-5)
  about = json.loads((tmp_path / "run" / "expert.json").read_text())
  assert about["init"]["path"] == str(workdir)
  metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
  assert metrics["preferred_error"] != metrics["reference_preferred_error"]
