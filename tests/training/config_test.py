"""Every value of a run is checked when its config is made, before a model is read."""

import dataclasses

import numpy as np
import pytest

from safetydpo_jax import presets
from safetydpo_jax.data.cache.batches import FLIPS
from safetydpo_jax.errors import InputError
from safetydpo_jax.training import config as configs
from safetydpo_jax.training.config import RunConfig, check_devices, make_config
from tests.support.configs import TOY_CHANGES, run_config

# What `train` wrote into expert.json before configs were dataclasses.
TOY = {
  "accumulation": 1,
  "adam": {"b1": 0.9, "b2": 0.999, "eps": 1e-08},
  "attention": "auto",
  "batch_size": 16,
  "cache": "c",
  "caption_dropout": 0.0,
  "category": "violence",
  "checkpoint_every": 45,
  "clip_norm": 100.0,
  "dpo": {"beta": 3.0, "loss": "dpo"},
  "dtype": "float32",
  "flip": "none",
  "holdout": 0.0,
  "learning_rate": 0.0022,
  "log_every": 10,
  "lora": {
    "alpha": 4.0,
    "alpha_pattern": (("conv1", 8.5),),
    "dropout": 0.1,
    "init": "x",
    "rank": 4,
    "rank_pattern": (("conv1", 8), ("to_q", 2)),
    "seed": 0,
    "targets": ("attn2.to_k", "attn2.to_v"),
  },
  "mesh": {"data": -1, "fsdp": 2},
  "mixture": "unsafe",
  "model": "toy",
  "optimizer": "adamw",
  "remat": "none",
  "resume": False,
  "scale_lr": False,
  "schedule": "cosine",
  "seed": 0,
  "steps": 90,
  "variant": "",
  "warmup_steps": 10,
  "weight_decay": 0.01,
}


def test_the_dict_is_the_one_that_experts_carry_key_by_key_in_its_order():
  config = run_config("violence", "toy", **TOY_CHANGES)
  assert repr(config.to_dict()) == repr(TOY)


@pytest.mark.parametrize("variant", presets.VARIANTS)
def test_every_preset_is_a_config_with_the_same_values(variant):
  values = presets.get_config("hate", variant).to_dict()
  assert repr(make_config(values).to_dict()) == repr(values)


WRONG_VALUES = {
  "model": ["", 3],
  "variant": [None, 3],
  "cache": [None],
  "category": ["hats", None],
  "mixture": ["mild", ""],
  "holdout": [-0.1, 1.0, "half", float("nan")],
  "caption_dropout": [-0.1, 1.1],
  "flip": ["sometimes", True],
  "steps": [0, -1, 1.5, True, "many", None],
  "batch_size": [0, 16.0],
  "accumulation": [0],
  "learning_rate": [-1e-5, float("nan"), float("inf"), "fast"],
  "scale_lr": [1, "yes"],
  "warmup_steps": [-1, 0.5],
  "schedule": ["rising"],
  "optimizer": ["sgd"],
  "adam": [3, None],
  "adam.b1": [-0.1, 1.0, 2],
  "adam.b2": [1.0, "b2"],
  "adam.eps": [0.0, -1e-8],
  "weight_decay": [-0.1, float("inf")],
  "clip_norm": [0.0, -1.0, float("inf")],
  "dpo.loss": ["ppo"],
  "dpo.beta": [0.0, -5.0, float("nan"), True],
  "lora.rank": [0, 4.0, True],
  "lora.alpha": [0.0, -4.0],
  "lora.targets": [(), "to_q", (3,), None, ("to_q", ("to_k",))],
  "lora.rank_pattern": [
    ("conv1", 8),
    "conv1",
    (("conv1", 0),),
    (("conv1", 1.5),),
    (("conv1", 0.5),),
    (("conv1", "8"),),
    (("conv1", True),),
    ((3, 8),),
    None,
  ],
  "lora.alpha_pattern": [
    ("conv1", 8.0),
    (("conv1", -1.0),),
    (("conv1", float("inf")),),
    (("conv1", float("nan")),),
    (("conv1", 8.0, 1),),
  ],
  "lora.dropout": [-0.1, 1.0, 2.0],
  "lora.init": [None],
  "lora.seed": [-1, 2**32, 0.5],
  "seed": [-1, 2**32, 0.5],
  "log_every": [0],
  "checkpoint_every": [0],
  "resume": [1, "no"],
  "mesh.data": [0, -2, 1.0],
  "mesh.fsdp": [0, -1],
  "dtype": ["float16", ""],
  "remat": ["some", None],
  "attention": ["flash"],
}


@pytest.mark.parametrize(
  ("name", "value"),
  [(name, value) for name, values in WRONG_VALUES.items() for value in values],
)
def test_a_wrong_value_is_named_and_refused(name, value):
  with pytest.raises(InputError) as caught:
    run_config(**{name: value})
  message = str(caught.value)
  assert message.startswith(f"config.{name}")
  assert "\n" not in message


def field_names(kind=RunConfig, prefix=""):
  for field in dataclasses.fields(kind):
    yield f"{prefix}{field.name}"
    if dataclasses.is_dataclass(field.type):
      yield from field_names(field.type, f"{prefix}{field.name}.")


def test_there_is_a_wrong_value_for_every_field():
  groups = {"dpo", "lora", "mesh"}
  assert set(WRONG_VALUES) == set(field_names()) - groups


@pytest.mark.parametrize(
  ("name", "names"),
  [
    ("optimizer", configs.OPTIMIZERS),
    ("schedule", configs.SCHEDULES),
    ("flip", FLIPS),
    ("mixture", ("both", "unsafe", "safe")),
    ("dpo.loss", ("dpo", "sft")),
    ("dtype", ("bfloat16", "float32")),
    ("remat", ("none", "full", "dots")),
    ("attention", ("auto", "xla", "cudnn", "splash")),
  ],
)
def test_an_unknown_name_is_answered_with_the_known_and_those_are_taken(name, names):
  with pytest.raises(InputError) as caught:
    run_config(**{name: "other"})
  assert f"config.{name} is 'other'; expected {' or '.join(names)}" in str(caught.value)
  for known in names:
    run_config(**{name: known})


@pytest.mark.parametrize(
  ("name", "value", "taken"),
  [
    ("learning_rate", 1, 1.0),
    ("steps", np.int64(5), 5),
    ("dpo.beta", np.float32(0.5), 0.5),
    ("lora.targets", ["to_q"], ("to_q",)),
    ("lora.rank_pattern", [["conv1", 8]], (("conv1", 8),)),
    ("category", "Harrasment", "Harrasment"),
    ("caption_dropout", 1.0, 1.0),
    ("mesh.data", -1, -1),
  ],
)
def test_a_value_that_fits_is_taken_and_has_its_type(name, value, taken):
  found = run_config(**{name: value})
  for part in name.split("."):
    found = getattr(found, part)
  assert (found, type(found)) == (taken, type(taken))


def test_fine_tuning_has_no_beta():
  assert run_config(**{"dpo.loss": "sft", "dpo.beta": 0.0}).dpo.beta == 0.0


def test_a_replaced_value_is_checked_too():
  config = run_config()
  with pytest.raises(InputError, match=r"config\.steps is 0"):
    dataclasses.replace(config, steps=0)
  with pytest.raises(InputError, match=r"config\.lora\.dropout is 1\.0; .*below 1"):
    dataclasses.replace(config.lora, dropout=1.0)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"foo": 1}, "config.foo is unknown"),
    ({"batchsize": 8}, "did you mean config.batch_size?"),
    ({"lora.rnak": 8}, "config.lora.rnak is unknown; did you mean config.lora.rank?"),
  ],
)
def test_an_unknown_key_is_refused_by_name(changes, message):
  with pytest.raises(InputError) as caught:
    run_config(**changes)
  assert message in str(caught.value)


@pytest.mark.parametrize("name", ["steps", "lora"])
def test_a_missing_key_is_named(name):
  values = presets.get_config().to_dict()
  del values[name]
  with pytest.raises(InputError, match=rf"config\.{name} is missing"):
    make_config(values)


@pytest.mark.parametrize(
  ("batch_size", "accumulation", "message"),
  [
    (12, 1, "config.batch_size is 12 pairs; expected a multiple of the 8 devices"),
    (16, 4, "set config.accumulation=2"),
    (48, 4, "set config.accumulation=2"),
  ],
)
def test_a_batch_that_devices_cannot_share_is_named(batch_size, accumulation, message):
  config = run_config(batch_size=batch_size, accumulation=accumulation)
  with pytest.raises(InputError) as caught:
    check_devices(config, 8)
  assert message in str(caught.value)
  check_devices(config, 1)
