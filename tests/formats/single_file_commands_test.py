"""Every command that takes a model takes a single file, here of a distilled SDXL.

It has SSD-1B's form: a number of layers for each transformer, and a plain middle.
"""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from safetydpo_jax import (
  encode,
  export,
  generate,
  load_lora,
  load_pipeline,
  lora,
  merge,
  train,
)
from safetydpo_jax.formats.base_model.module_shapes import parameter_shapes
from safetydpo_jax.formats.loras import expert
from safetydpo_jax.models.config import freeze
from safetydpo_jax.models.unet import UNet2DCondition
from safetydpo_jax.planning import shapes
from tests.support import lookalike, runs, single_files

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """A diffusers directory, its single file, and its VAE's file."""
  folder = tmp_path_factory.mktemp("models")
  base = single_files.DISTILLED["ssd-1b"](folder / "base")
  tensors = single_files.original_tensors(base, "sdxl")
  vae = {n: x for n, x in tensors.items() if n.startswith("first_stage_model.")}
  single_files.save(folder / "vae.safetensors", vae)
  file = single_files.save(folder / "m.safetensors", tensors, single_files.RESOLUTION)
  for tokenizer in ("tokenizer", "tokenizer_2"):
    shutil.copytree(base / tokenizer, folder / tokenizer)
  return base, file, folder / "vae.safetensors"


@pytest.fixture(scope="module")
def cache(models, tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  lookalike.write_folder_layout(folder / "pairs", pairs=6)
  call(encode, model=models[1], vae=models[2], pairs=folder / "pairs", out=folder / "x")
  return folder / "x"


def call(command, *flags, **options):
  """Runs a command as from a command line."""
  words = [word for name, value in options.items() for word in (f"--{name}", value)]
  command.main([str(word) for word in (*words, *flags)])


@pytest.fixture(scope="module")
def experts(models, cache, tmp_path_factory):
  """An expert that is trained on the file, and another made from it."""
  folder = tmp_path_factory.mktemp("runs")
  steps = {"steps": 2, "batch_size": 8, "accumulation": 1}
  arguments = runs.train_arguments(
    models[1], cache, folder / "trained", "all_single", **steps
  )
  train.main([f"{arguments[0]}:sdxl", *arguments[1:]])
  about = json.loads((folder / "trained" / "expert.json").read_text())
  tree = load_lora(str(folder / "trained"))
  expert.write_expert(folder / "other", lora.scale(tree, 2.0), about)
  return folder


def test_an_expert_has_the_layers_of_a_distilled_unet(models, experts):
  tree = load_lora(str(experts / "trained"))
  # The second of the way down has two blocks and the first has one; no middle attends.
  below = tree["down_blocks_1"]
  assert [len(below[f"attentions_{n}"]) for n in (0, 1)] == [1, 2]
  assert "mid_block" not in tree
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(tree))
  about = json.loads((experts / "trained" / "expert.json").read_text())
  base = load_pipeline(models[0], components=())
  assert about["base"] == {"name": str(models[1]), "fingerprint": base.fingerprint}


def test_merging_generating_and_exporting(models, cache, experts, tmp_path):
  base, file, vae = models
  call(
    merge,
    experts=f"{experts}/trained,{experts}/other",
    method="co_merge",
    calibration=cache,
    out=tmp_path / "merged",
    pairs=1,
    timesteps="100",
    batch_size=1,
  )
  (tmp_path / "p.csv").write_text("prompt\na red circle\n")
  pictures = {}
  for name, options in (
    ("file", {"model": file, "vae": vae}),
    ("dir", {"model": base}),
  ):
    call(
      generate,
      **options,
      lora=tmp_path / "merged",
      prompts=tmp_path / "p.csv",
      out=tmp_path / name,
      steps=2,
    )
    (picture,) = (f for f in (tmp_path / name).glob("*.png"))
    pictures[name] = np.asarray(Image.open(picture))
  np.testing.assert_array_equal(pictures["file"], pictures["dir"])
  call(
    export,
    "--verify",
    lora=tmp_path / "merged",
    model=file,
    format="kohya",
    out=tmp_path / "kohya",
  )


def test_a_plan_knows_its_shapes(models):
  base, file, _ = models
  from_file, from_folder = (
    shapes.read_configs(str(file)),
    shapes.read_configs(str(base)),
  )
  assert len(from_file[2]) == len(from_folder[2]) == 2
  ours, theirs = (
    UNet2DCondition(freeze(found[0])) for found in (from_file, from_folder)
  )
  assert parameter_shapes(ours) == parameter_shapes(theirs)
