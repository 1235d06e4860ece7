"""What `--config` names: presets in any folder, files, and values by their names."""

import dataclasses
import os
import subprocess
import sys

import pytest

from safetydpo_jax import presets
from safetydpo_jax.errors import InputError
from safetydpo_jax.training.config import make_config
from safetydpo_jax.training.read_config import read_config
from tests.support import runs

OWN = """
from safetydpo_jax import presets

def get_config(variant="sd15"):
  config = presets.get_config("hate", variant)
  config.dpo.beta = 2500
  {more}
  return config
"""


def read(file, *overrides):
  return read_config(str(runs.ROOT / "configs" / file), overrides)


@pytest.fixture
def own(tmp_path):
  """Writes a user's own config file, with a line of their own; returns its path."""

  def write(more="pass"):
    file = tmp_path / "mine.py"
    file.write_text(OWN.format(more=more))
    return str(file)

  return write


@pytest.mark.parametrize("variant", ["", *presets.VARIANTS])
@pytest.mark.parametrize("name", presets.NAMES)
def test_a_preset_and_its_file_are_one_config_in_any_folder(
  name, variant, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  colon = f":{variant}" if variant else ""
  expected = make_config(presets.get_config(name, variant or "sd15").to_dict())
  assert read_config(name + colon) == read(f"{name}.py{colon}") == expected


def test_a_relative_file_works_from_the_repositorys_root(monkeypatch):
  monkeypatch.chdir(runs.ROOT)
  assert read_config("configs/hate.py:toy") == read_config("hate:toy")


def test_a_preset_reaches_training_from_an_empty_folder(tmp_path):
  command = [sys.executable, "-m", "safetydpo_jax.train"]
  done = subprocess.run(
    [*command, "--config", "hate:toy", "--workdir", "run"],
    cwd=tmp_path,
    env={**os.environ, "PYTHONPATH": str(runs.ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 1
  assert done.stderr.strip().splitlines()[-1].startswith("error: config.cache is empty")


def test_a_users_own_file_starts_from_a_preset(own):
  path = list(sys.path)
  config = read_config(f"{own()}:sdxl", ["--config.steps=7"])
  assert sys.path == path
  values = (config.model, config.dpo.beta, config.category, config.steps)
  assert values == ("sdxl", 2500.0, "hate", 7)


def test_the_second_file_is_not_the_first(own, tmp_path):
  read_config(own())
  (tmp_path / "empty.py").write_text("")
  with pytest.raises(InputError, match=r"empty\.py: .*no get_config"):
    read_config(str(tmp_path / "empty.py"))


def test_values_are_overridden_by_their_type():
  config = read(
    "hate.py",
    "--config.dpo.beta=2500",
    "--config.lora.rank=8",
    "--config.lora.rank_pattern=(('conv1', 8), ('to_q', 2))",
    "--config.lora.targets=to_q",
    "--config.resume=False",
    "--config.cache=a=b",
    "--config.seed=1",
    "--config.seed=2",
  )
  assert (config.dpo.beta, config.lora.rank, config.category) == (2500.0, 8, "hate")
  assert type(config.dpo.beta) is float
  assert config.lora.rank_pattern == (("conv1", 8), ("to_q", 2))
  assert config.lora.targets == ("to_q",)
  assert (config.resume, config.cache, config.seed) == (False, "a=b", 2)


WRONG = {
  "batchsize=8": "config.batchsize is unknown; did you mean config.batch_size?",
  "zzz=1": "config.zzz is unknown",
  "dpo.bata=1": "config.dpo.bata is unknown; did you mean config.dpo.beta?",
  "steps.more=1": "config.steps.more is unknown",
  "steps=many": "config.steps is 'many'; expected a whole number",
  "steps=1.5": "config.steps is '1.5'; expected a whole number",
  "steps": "config.steps is ''; expected a whole number",
  "steps=0": "config.steps is 0; expected 1 or more",
  "resume=2": "config.resume is '2'; expected True or False",
  "lora=3": "config.lora is '3'; expected",
  "clip_norm=inf": "config.clip_norm is inf; expected a finite number",
}


@pytest.mark.parametrize(("override", "message"), WRONG.items())
def test_a_wrong_override_is_named(override, message):
  with pytest.raises(InputError) as caught:
    read_config("hate", [f"--config.{override}"])
  assert message in str(caught.value)
  assert "--config hate: " in str(caught.value)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("hate:sd99", r"'sd99'; .*sd15, .*toy"),
    (str(runs.ROOT / "configs" / "hate.py:sd99"), r"'sd99'; .*sd15, .*toy"),
    ("hats", "no file hats .*hate, .*all_single"),
    ("hats:sd15", "no file hats .*hate, .*all_single"),
    ("configs/nope.py:toy", r"no file configs/nope\.py "),
  ],
)
def test_a_config_that_is_not_there_is_named_with_the_presets(name, message):
  with pytest.raises(InputError, match=message) as caught:
    read_config(name)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("more", "message"),
  [
    ("config.foo = 1", "config.foo is unknown"),
    (
      "config.lora.rnak = 1",
      "did you mean config.lora.rank?",
    ),
    ("config.steps = 'many'", "'steps'"),
    ("config.steps = 0", "config.steps is 0; expected 1 or more"),
    ("del config.lora.dropout", "config.lora.dropout is missing"),
    ("import nowhere", "No module named 'nowhere'"),
    ("return None", "returns a NoneType"),
  ],
)
def test_what_is_wrong_in_a_users_file_is_named(more, message, own):
  with pytest.raises(InputError, match=r"mine\.py: ") as caught:
    read_config(own(more))
  assert message in str(caught.value)
  assert "\n" not in str(caught.value)


def test_a_config_cannot_be_changed():
  with pytest.raises(dataclasses.FrozenInstanceError):
    read_config("hate").steps = 1
