"""Checkpoints: exact, the newest kept, on any devices, and of this run alone."""

import json
import os
import signal
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from safetydpo_jax.errors import InputError
from safetydpo_jax.runtime import sharding
from safetydpo_jax.training import checkpoint
from safetydpo_jax.training.checkpoint import LATER, run_settings
from safetydpo_jax.training.step import init_state
from tests.support.configs import TOY_CHANGES, run_config

SETTINGS = {"dataset": "d1", "base": "0123", "category": "hate", "batch_size": 16}


def make_state(rank=3, layer="to_q", devices=8):
  """A `TrainState` whose every leaf is its own, after one update, on `devices`."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
  tree = {"mid_block": {layer: {"a": draw(6, rank), "b": draw(rank, 5)}}}
  optimizer = optax.adamw(1e-3)
  state = init_state(tree, optimizer)
  _, opt_state = optimizer.update(tree, state.opt_state, tree)
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])
  state = state.replace(step=jnp.int32(7), opt_state=opt_state)
  return jax.device_put(state, NamedSharding(mesh, PartitionSpec()))


@pytest.fixture
def saved(tmp_path):
  """A run with a checkpoint of step 7, closed."""
  with checkpoint.open_checkpoints(tmp_path) as manager:
    checkpoint.save(manager, 7, make_state(), SETTINGS)
  return tmp_path


def restore(workdir, like, settings=SETTINGS):
  with checkpoint.open_checkpoints(workdir) as manager:
    return checkpoint.restore(manager, like, settings)


@pytest.mark.parametrize("devices", [8, 2, 1])
def test_the_state_is_restored_exactly_on_these_devices(devices, saved):
  like = jax.tree.map(jnp.zeros_like, make_state(devices=devices))
  state = restore(saved, like)
  chex.assert_trees_all_equal(state, make_state())
  chex.assert_trees_all_equal_dtypes(state, make_state())
  for leaf in jax.tree.leaves(state):
    assert leaf.sharding.device_set == set(jax.devices()[:devices])


def test_the_newest_two_are_kept_and_the_newest_is_restored(tmp_path):
  with checkpoint.open_checkpoints(tmp_path) as manager:
    for step in (9, 10, 11):  # In the order of numbers, not of names.
      state = {"x": jnp.float32(step)}
      checkpoint.save(manager, step, state, SETTINGS)
  assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["10", "11"]
  assert restore(tmp_path, {"x": jnp.float32(0)})["x"] == 11


def test_a_step_that_is_there_is_left_alone(saved):
  with checkpoint.open_checkpoints(saved) as manager:
    zeros = jax.tree.map(jnp.zeros_like, make_state())
    checkpoint.save(manager, 7, zeros, SETTINGS)
  chex.assert_trees_all_equal(restore(saved, make_state()), make_state())


def test_a_write_cut_short_is_no_checkpoint(saved):
  """What a kill leaves: a folder under Orbax's temporary name."""
  (saved / "checkpoints" / "8.orbax-checkpoint-tmp-1").mkdir()
  with checkpoint.open_checkpoints(saved) as manager:
    assert manager.latest_step() == 7


@pytest.mark.parametrize(("name", "value"), [("dataset", "d2"), ("batch_size", 32)])
def test_another_setting_is_named_with_both_values(name, value, saved):
  message = (
    f"checkpoints/7 was trained with {name}={SETTINGS[name]}, this run has {value}"
  )
  with pytest.raises(InputError, match=message):
    restore(saved, make_state(), {**SETTINGS, name: value})


OTHERS = {
  "wider": ({"rank": 4}, r"lora/mid_block/to_q/a=\(6, 3\), this run has \(6, 4\)"),
  "narrower": ({"rank": 2}, r"lora/mid_block/to_q/a=\(6, 3\), this run has \(6, 2\)"),
  "elsewhere": (
    {"layer": "to_k"},
    r"lora/mid_block/to_k/a=None, this run has \(6, 3\)",
  ),
}


@pytest.mark.parametrize(("change", "message"), OTHERS.values(), ids=OTHERS)
def test_another_lora_is_refused_and_not_cut_to_fit(change, message, saved):
  with pytest.raises(InputError, match=message):
    restore(saved, make_state(**change))


def test_a_damaged_checkpoint_is_named(saved):
  for file in (saved / "checkpoints" / "7" / "state").rglob("d/*"):
    file.write_bytes(file.read_bytes()[:3])
  with pytest.raises(InputError, match=r"checkpoints/7 is damaged.*delete it to"):
    restore(saved, make_state())


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / "file").touch()
  for workdir in ("/proc/run", tmp_path / "file"):
    with pytest.raises(InputError, match=f"cannot write checkpoints to {workdir}"):
      checkpoint.open_checkpoints(workdir)


def test_sigterm_is_told_to_the_loop_and_ends_the_process_again_afterwards():
  before = signal.getsignal(signal.SIGTERM)
  with checkpoint.on_preemption() as asked:
    assert not asked(1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert asked(2)
  assert signal.getsignal(signal.SIGTERM) == before


def settings(name="all_single", variant="sd15", /, **changes):
  made_of = SimpleNamespace(fingerprint="0123")
  return run_settings(run_config(name, variant, **changes), made_of, made_of)


# What `run_settings` gave before configs were dataclasses.
HATE = {
  "adam.b1": 0.9,
  "adam.b2": 0.999,
  "adam.eps": 1e-08,
  "batch_size": 16,
  "caption_dropout": 0.2,
  "category": "hate",
  "clip_norm": 1.0,
  "dpo.beta": 5000.0,
  "dpo.loss": "dpo",
  "dtype": "bfloat16",
  "flip": "independent",
  "holdout": 0.0,
  "learning_rate": 1e-05,
  "lora.alpha": 4.0,
  "lora.rank": 4,
  "lora.seed": 0,
  "lora.targets": ["to_q", "to_k", "to_v", "to_out.0"],
  "mixture": "both",
  "optimizer": "adamw",
  "scale_lr": True,
  "seed": 0,
  "warmup_steps": 500,
  "weight_decay": 0.01,
  "dataset": "0123",
  "base": "0123",
}
TOY = {
  **HATE,
  "caption_dropout": 0.0,
  "category": "violence",
  "clip_norm": 100.0,
  "dpo.beta": 3.0,
  "dtype": "float32",
  "flip": "none",
  "learning_rate": 0.0022,
  "lora.alpha_pattern": [["conv1", 8.5]],
  "lora.dropout": 0.1,
  "lora.init": "x",
  "lora.rank_pattern": [["conv1", 8], ["to_q", 2]],
  "lora.targets": ["attn2.to_k", "attn2.to_v"],
  "mixture": "unsafe",
  "scale_lr": False,
  "schedule": "cosine",
  "steps": 90,
  "warmup_steps": 10,
}


def test_settings_are_those_of_older_checkpoints():
  assert json.dumps(settings("hate")) == json.dumps(HATE)
  assert settings("violence", "toy", **TOY_CHANGES) == TOY


def test_options_that_came_later_are_named_only_where_they_are_on():
  """A checkpoint from before them has no such names, and can be resumed."""
  later = set(LATER)
  assert not later & set(settings())
  on = {
    "schedule": "cosine",
    "lora.dropout": 0.1,
    "lora.rank_pattern": (("conv1", 8),),
    "lora.alpha_pattern": (("conv1", 8.0),),
    "lora.init": "before",
  }
  assert later & set(settings(**on)) == later == set(on)


def test_settings_are_what_json_gives_back():
  found = settings(**{"lora.rank_pattern": (("conv1", 8),)})
  assert json.loads(json.dumps(found)) == found


def test_what_changes_no_result_is_left_out():
  changes = {"remat": "full", "accumulation": 2, "mesh.fsdp": 4, "steps": 5}
  assert settings(**changes) == settings()
  assert settings(seed=1) != settings()


def test_steps_may_change_in_a_run_unless_the_rate_falls_over_them():
  assert not {"steps", "schedule"} & settings().keys()
  falling = settings(schedule="cosine")
  assert (falling["steps"], falling["schedule"]) == (2000, "cosine")
