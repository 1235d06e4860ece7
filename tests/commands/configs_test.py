"""The faithful preset, number by number, and the categories that share it."""

import importlib
from types import SimpleNamespace

import pytest
from flax.traverse_util import flatten_dict

from configs import base
from safetydpo_jax import lora, train
from safetydpo_jax.data.categories import CATEGORIES
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.hub import PRESETS
from safetydpo_jax.training import optimizer
from safetydpo_jax.training.config import run_settings
from tests.support import runs

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


def parse(file, *overrides):
  arguments = [f"--config={runs.ROOT / 'configs' / file}", "--workdir=x", *overrides]
  return train.parse_arguments(arguments)[0]


def numbers(variant):
  """{'dpo.beta': 5000.0, …}: every value of a variant, by its name."""
  flat = flatten_dict(base.get_config(variant).to_dict(), sep=".")
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
  assert optimizer.effective_learning_rate(base.get_config("sdxl")) == 1e-5


@pytest.mark.parametrize("variant", base.VARIANTS)
def test_every_variant_names_a_model_that_is_known(variant):
  assert base.get_config(variant).model in PRESETS


def test_ranks_of_single_layers_are_given_on_the_command_line():
  config = parse("hate.py", "--config.lora.rank_pattern=(('conv1', 8), ('to_q', 2))")
  assert config.lora.rank_pattern == (("conv1", 8), ("to_q", 2))


def test_the_rate_after_scaling_is_the_launchers():
  """1e-5 × batch 4 × accumulation 4 on one GPU."""
  rate = optimizer.effective_learning_rate(base.get_config("sd15"))
  assert rate == pytest.approx(1.6e-4)


def test_the_preset_adapts_the_attention_layers():
  assert base.get_config("sd15").lora.targets == lora.ATTENTION_TARGETS


@pytest.mark.parametrize("variant", base.VARIANTS)
@pytest.mark.parametrize(("file", "category"), FILES.items())
def test_a_category_changes_the_category_alone(file, category, variant):
  """One LoRA seed for all, among others: factor-level merging needs it."""
  config = importlib.import_module(f"configs.{file}").get_config(variant).to_dict()
  expected = {**base.get_config(variant).to_dict(), "category": category}
  assert config == expected


def test_there_is_a_config_for_each_category_and_no_other():
  files = {path.stem for path in (runs.ROOT / "configs").glob("[!_]*.py")}
  assert files == {"base", *FILES}


def test_sd15_is_the_default_variant():
  assert parse("hate.py").to_dict() == parse("hate.py:sd15").to_dict()


def test_values_are_overridden_on_the_command_line():
  config = parse("hate.py", "--config.dpo.beta=2500", "--config.lora.rank=8")
  assert (config.dpo.beta, config.lora.rank, config.category) == (2500.0, 8, "hate")


def test_an_unknown_variant_is_one_clear_line():
  with pytest.raises(InputError, match=r"unknown variant 'sd99'; .*sd15") as caught:
    parse("hate.py:sd99")
  assert "\n" not in str(caught.value)


def test_an_unknown_value_is_one_clear_line():
  for override, message in (
    (
      "batchsize=8",
      """: no value 'batchsize': Did you mean "batch_size" instead of """,
    ),
    ("zzz=1", ": no value zzz"),
  ):
    with pytest.raises(InputError) as caught:
      parse("hate.py", f"--config.{override}")
    assert message in str(caught.value)


def test_an_unknown_config_is_one_clear_line():
  with pytest.raises(InputError, match=r"there is no .*/nope\.py here; run in the"):
    parse("nope.py:toy")


def test_a_misspelled_name_is_refused_and_not_added():
  with pytest.raises(InputError, match="bata"):
    parse("hate.py", "--config.dpo.bata=1")


def test_steps_may_change_in_a_run_unless_the_rate_falls_over_them():
  fingerprint = SimpleNamespace(fingerprint="0")
  config = base.get_config("sd15")
  settings = run_settings(config, fingerprint, fingerprint)
  assert not {"steps", "schedule"} & settings.keys()
  config.schedule = "cosine"
  settings = run_settings(config, fingerprint, fingerprint)
  assert (settings["steps"], settings["schedule"]) == (2000, "cosine")
