"""What version 0.1.0 wrote is read: runs resume, caches open, LoRAs load, merges go on.

`fixtures/v0.1.0` was written by the commands of that version from a tiny random model:

  model/  pairs/  cache/     the checkpoint, four pairs that it rendered, their cache
  interrupted/               a run of the hate expert, stopped after step 1 of 2
  experts/hate, violence     both experts after step 2, the first not interrupted
  merged/                    Co-Merge of both, with its activations
  diffusers/  kohya/         exports of the merge
"""

import json
import shutil
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from safetydpo_jax import export, generate, load_lora, merge, train
from safetydpo_jax.data.cache import records

OLD = Path(__file__).parent / "fixtures" / "v0.1.0"
CONFIG = Path(__file__).parents[1] / "configs" / "hate.py"
SETTINGS = {
  "model": OLD / "model",
  "cache": OLD / "cache",
  "batch_size": 4,
  "accumulation": 1,
  "checkpoint_every": 1,
  "dtype": "float32",
  "warmup_steps": 0,
  "learning_rate": "1e-3",
  "steps": 2,
}


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  """As the fixture was written: a batch of 4 is no multiple of the tests' 8 devices."""
  first = jax.devices()[:1]
  monkeypatch.setattr(jax, "devices", lambda *_, **__: first)
  monkeypatch.setattr(jax, "local_devices", lambda *_, **__: first)
  monkeypatch.setattr(jax, "device_count", lambda *_, **__: 1)
  monkeypatch.setattr(jax, "local_device_count", lambda *_, **__: 1)


def copy(name, folder):
  return shutil.copytree(OLD / name, folder / name)


def test_a_run_resumes_and_ends_where_an_uninterrupted_one_did(tmp_path, capsys):
  run = copy("interrupted", tmp_path)
  values = [f"--config.{name}={value}" for name, value in SETTINGS.items()]
  train.main([f"--config={CONFIG}:sd15", f"--workdir={run}", *values])
  assert "resume from step 1" in capsys.readouterr().out
  ours, theirs = load_lora(str(run)), load_lora(str(OLD / "experts" / "hate"))
  # A step moves a weight by the rate, 4e-3. The same bits come out where XLA compiles
  # as it did then; at the tests' optimization level rounding moves weights by 1 % of a
  # step, and those of nearly no gradient by a whole one: Adam divides it by itself.
  pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
  far = np.concatenate([np.abs(a - b).ravel() > 4e-4 for a, b in pairs])
  assert far.mean() < 0.01
  about, before = (
    json.loads((folder / "expert.json").read_text())
    for folder in (run, OLD / "experts" / "hate")
  )
  assert about.keys() == before.keys()
  assert about["config"].keys() == before["config"].keys()
  lines = (run / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_a_cache_opens():
  cache = records.open_cache(OLD / "cache")
  assert cache.count("hate", "both", 0.0) == (2, 4)
  assert cache.count("all", "unsafe", 0.0) == (4, 4)


def test_a_merge_and_its_exports_are_one_lora():
  merged = load_lora(str(OLD / "merged"))
  assert sum(leaf.size for leaf in jax.tree.leaves(merged)) == 4992
  for name in ("diffusers", "kohya"):
    chex.assert_trees_all_equal(load_lora(str(OLD / name)), merged)


def test_activations_are_not_measured_again(tmp_path, capsys):
  out = copy("merged", tmp_path)
  before = load_lora(str(OLD / "merged"))
  experts = ",".join(str(OLD / "experts" / name) for name in ("hate", "violence"))
  line = ["--experts", experts, "--method", "co_merge", "--out", str(out)]
  line += ["--model", str(OLD / "model"), "--calibration", str(OLD / "cache")]
  merge.main([*line, "--pairs", "1", "--timesteps", "100,600"])
  assert "0 experts on" in capsys.readouterr().out
  chex.assert_trees_all_equal(load_lora(str(out)), before)


def test_an_export_is_the_same_bytes(tmp_path):
  line = ["--lora", str(OLD / "merged"), "--model", str(OLD / "model")]
  for name in ("diffusers", "kohya"):
    export.main([*line, "--format", name, "--out", str(tmp_path / name)])
    (file,) = (tmp_path / name).glob("*.safetensors")
    assert file.read_bytes() == (OLD / name / file.name).read_bytes()


def test_a_folder_of_images_is_complete(tmp_path):
  folder = copy("pairs", tmp_path)
  files = {file: file.stat().st_mtime_ns for file in folder.glob("*.png")}
  assert len(files) == 8
  line = ["--model", str(OLD / "model"), "--prompts", str(folder / "prompts.csv")]
  generate.main([*line, "--out", str(folder), "--steps", "3", "--guidance", "4"])
  assert {file: file.stat().st_mtime_ns for file in files} == files


def test_the_fixture_is_what_it_says():
  about = json.loads((OLD / "merged" / "expert.json").read_text())
  assert about["versions"]["safetydpo-jax"] == "0.1.0"
  assert [expert["category"] for expert in about["experts"]] == ["hate", "violence"]
  assert np.isfinite(jax.tree.leaves(load_lora(str(OLD / "merged")))[0]).all()
