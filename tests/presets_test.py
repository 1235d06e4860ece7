"""The presets, number by number, and `configs/`, one file for each of them."""

import importlib

import pytest
from flax.traverse_util import flatten_dict

from safetydpo_jax import lora, presets
from safetydpo_jax.data.categories import CATEGORIES
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.hub import PRESETS
from safetydpo_jax.training import optimizer
from tests.support import runs
from tests.support.configs import run_config

# What the launchers released with SafetyDPO set for SD1.5.
SD15 = {
  "model": "sd15",
  "mixture": "both",
  "caption_dropout": 0.2,
  "flip": "independent",
  "steps": 2000,
  "batch_size": 16,
  "accumulation": 4,
  "learning_rate": 1e-5,
  "scale_lr": True,
  "warmup_steps": 500,
  "optimizer": "adamw",
  "adam.b1": 0.9,
  "adam.b2": 0.999,
  "adam.eps": 1e-8,
  "weight_decay": 1e-2,
  "clip_norm": 1.0,
  "dpo.loss": "dpo",
  "dpo.beta": 5000.0,
  "lora.rank": 4,
  "lora.alpha": 4.0,
  "lora.targets": ("to_q", "to_k", "to_v", "to_out.0"),
  "lora.rank_pattern": (),
  "lora.alpha_pattern": (),
  "lora.dropout": 0.0,
  "lora.init": "",
}
# What the other families set otherwise. SDXL's as its launcher: Adafactor at a rate
# neither scaled nor warmed up; the last two change memory and not the result.
FAMILIES = {
  "sd21": {"model": "sd21"},
  "sd21base": {"model": "sd21base"},
  "sdxl": {
    "model": "sdxl",
    "optimizer": "adafactor",
    "scale_lr": False,
    "warmup_steps": 0,
    "accumulation": 16,
    "remat": "full",
  },
}
# What the toy world sets otherwise; everything else is the same.
TOY = {
  "model": "toy",
  "mixture": "unsafe",
  "caption_dropout": 0.0,
  "flip": "none",
  "steps": 90,
  "accumulation": 1,
  "learning_rate": 2.2e-3,
  "scale_lr": False,
  "warmup_steps": 10,
  "clip_norm": 100.0,
  "lora.targets": ("attn2.to_k", "attn2.to_v"),
  "schedule": "linear",
  "dpo.beta": 15.0,
  "checkpoint_every": 45,
  "dtype": "float32",
}
FILES = {**{category: category for category in CATEGORIES}, "all_single": "all"}


def numbers(variant):
  """{'dpo.beta': 5000.0, …}: every value of a variant, by its name."""
  values = presets.get_config(variant=variant).to_dict()
  flat = flatten_dict(values, sep=".")
  return {name: (value, type(value)) for name, value in flat.items()}


@pytest.mark.parametrize(("name", "value"), SD15.items())
def test_sd15_is_trained_as_the_released_launchers_do(name, value):
  assert numbers("sd15")[name] == (value, type(value))


def test_the_toy_world_is_trained_with_these_numbers_and_else_as_sd15():
  toy = {name: (value, type(value)) for name, value in TOY.items()}
  assert numbers("toy") == {**numbers("sd15"), **toy}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_trained_with_these_numbers_and_else_as_sd15(family):
  changed = {name: (value, type(value)) for name, value in FAMILIES[family].items()}
  assert numbers(family) == {**numbers("sd15"), **changed}


def test_sdxls_rate_is_the_launchers_as_it_stands():
  assert optimizer.effective_learning_rate(run_config("hate", "sdxl")) == 1e-5


@pytest.mark.parametrize("variant", presets.VARIANTS)
def test_every_variant_names_a_model_that_is_known(variant):
  assert presets.get_config(variant=variant).model in PRESETS


def test_the_rate_after_scaling_is_the_launchers():
  """1e-5 × batch 4 × accumulation 4 on one GPU."""
  rate = optimizer.effective_learning_rate(run_config("hate", "sd15"))
  assert rate == pytest.approx(1.6e-4)


def test_the_preset_adapts_the_attention_layers():
  assert presets.get_config(variant="sd15").lora.targets == lora.ATTENTION_TARGETS


@pytest.mark.parametrize("variant", presets.VARIANTS)
@pytest.mark.parametrize(("file", "category"), FILES.items())
def test_a_category_changes_the_category_alone(file, category, variant):
  """One LoRA seed for all, among others: factor-level merging needs it."""
  config = importlib.import_module(f"configs.{file}").get_config(variant).to_dict()
  assert config == presets.get_config(file, variant).to_dict()
  every = presets.get_config(variant=variant).to_dict()
  assert config == {**every, "category": category}


def test_there_is_a_config_for_each_category_and_no_other():
  files = {path.stem for path in (runs.ROOT / "configs").glob("[!_]*.py")}
  assert files == set(FILES) == set(presets.NAMES)


def test_sd15_is_the_default_variant():
  assert presets.get_config("hate") == presets.get_config("hate", "sd15")


@pytest.mark.parametrize(
  ("name", "variant", "message"),
  [
    ("hats", "sd15", r"'hats'; .*hate, .*all_single"),
    ("hate", "sd99", r"'sd99'; .*sd15, .*toy"),
  ],
)
def test_what_is_unknown_is_named_with_the_known(name, variant, message):
  with pytest.raises(InputError, match=message) as caught:
    presets.get_config(name, variant)
  assert "\n" not in str(caught.value)
