"""export: what PyTorch users get, counted at full size and followed from the images."""

import json
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from flax.core import freeze
from flax.traverse_util import flatten_dict
from safetensors import safe_open

from safetydpo_jax import encode, export, load_lora, load_pipeline, lora, train
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats import expert, lora_files
from safetydpo_jax.formats.pipeline import parameter_shapes
from safetydpo_jax.models.unet import UNet2DCondition
from tests import lookalike, runs
from tests.published import SD15_UNET


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint):
  return load_pipeline(tiny_checkpoint, components=("unet",))


@pytest.fixture(scope="module")
def trained(tiny_checkpoint, tmp_path_factory):
  """20 steps on look-alikes of CoProV2's CSV and images: an expert's directory."""
  folder = tmp_path_factory.mktemp("spine")
  pairs = lookalike.write_csv_layout(folder / "pairs", pairs=12)
  arguments = ["--model", tiny_checkpoint, "--pairs", pairs, "--out", folder / "cache"]
  encode.main([str(argument) for argument in arguments])
  train.main(
    runs.train_arguments(
      tiny_checkpoint, folder / "cache", folder / "run", batch_size=8, accumulation=1
    )
  )
  return folder / "run"


@pytest.fixture
def run(tiny_checkpoint, tmp_path):
  def run(name, out=tmp_path / "out", model=tiny_checkpoint):
    options = ["--lora", name, "--model", model, "--format", "diffusers", "--out", out]
    export.main([str(option) for option in options])
    return out

  return run


def make_expert(folder, tree, fingerprint):
  about = {"base": {"name": "tiny", "fingerprint": fingerprint}}
  expert.write_expert(folder, tree, about)
  return folder


def test_a_trained_expert_predicts_in_diffusers_what_it_predicts_here(
  trained, run, pipeline, tiny_checkpoint
):
  """Images and a CSV → encode → train → export → load_lora_weights."""
  out = run(trained)
  rng = np.random.default_rng(0)
  latents = rng.standard_normal((2, 6, 8, 4)).astype(np.float32)
  context = rng.standard_normal((2, 5, 24)).astype(np.float32)
  timesteps = np.array([3, 700])
  theirs = StableDiffusionPipeline.from_pretrained(tiny_checkpoint)

  def predict():
    with torch.no_grad():
      inputs = torch.from_numpy(latents).permute(0, 3, 1, 2), torch.tensor(timesteps)
      sample = theirs.unet(*inputs, torch.from_numpy(context)).sample
    return sample.permute(0, 2, 3, 1).numpy()

  before = predict()
  theirs.load_lora_weights(out)
  after = predict()
  variables = {"params": pipeline.params["unet"], "lora": load_lora(str(trained))}
  ours = jax.jit(pipeline.unet.apply)(variables, latents, timesteps, context)
  assert np.abs(after - before).max() > 1e-3, "the LoRA must be seen"
  np.testing.assert_allclose(ours, after, rtol=0, atol=1e-4)
  np.testing.assert_allclose(ours - before, after - before, rtol=0, atol=1e-5)


def test_an_export_says_what_it_is(trained, run, pipeline, tiny_checkpoint, capsys):
  out = run(trained)
  assert "rank 4, " in capsys.readouterr().out
  assert sorted(file.name for file in out.iterdir()) == [
    "export.json",
    lora_files.FILE_NAME,
  ]
  about = json.loads((out / "export.json").read_text())
  assert about["about"]["category"] == "hate"
  assert about["lora"] == str(trained)
  assert about["base"] == {
    "name": str(tiny_checkpoint),
    "fingerprint": pipeline.fingerprint,
  }


def test_a_scale_is_folded_in(trained, run, tmp_path):
  whole = load_lora(str(run(trained)))
  half = load_lora(str(run(f"{trained}:0.5", tmp_path / "half")))
  chex.assert_trees_all_close(half, lora.scale(whole, 0.5), rtol=1e-6)
  chex.assert_trees_all_equal(whole, load_lora(str(trained)))


def test_a_lora_of_sd15_is_256_tensors_with_797184_parameters(tmp_path):
  """At full size, from shapes alone: no weight of the model is made."""
  shapes = parameter_shapes(UNet2DCondition(freeze(SD15_UNET)))
  fresh = jax.eval_shape(lambda key: lora.init_lora(key, shapes, 4), jax.random.key(0))
  tree = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), fresh)
  lora.check_shapes(shapes, tree)
  targets = lora_files.adapted_layers(tree)
  assert targets == sorted(lora.ATTENTION_TARGETS)
  with safe_open(lora_files.write_diffusers(tmp_path, tree, targets), "numpy") as file:
    sizes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
  assert len(sizes) == 256
  assert sum(np.prod(size) for size in sizes.values()) == 797_184
  layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora"
  assert sizes[f"{layer}.down.weight"] == [4, 768]
  assert sizes[f"{layer}.up.weight"] == [320, 4]


def test_layer_kinds_are_named_as_peft_names_targets(pipeline):
  targets = ("attn2.to_q", "to_out.0", "net.0.proj", "net.2")
  tree = lora.init_lora(jax.random.key(0), pipeline.params["unet"], 2, targets)
  assert lora_files.adapted_layers(tree) == ["net.2", "proj", "to_out.0", "to_q"]


def test_an_expert_of_another_model_is_refused(pipeline, run, tmp_path):
  tree = lora.init_lora(jax.random.key(0), pipeline.params["unet"], 2)
  other = make_expert(tmp_path / "other", tree, "0123456789abcdef")
  with pytest.raises(InputError, match=r"was trained on tiny .*0123456789abcdef"):
    run(other)
  assert not (tmp_path / "out").exists()


def test_a_lora_of_other_shapes_is_refused(pipeline, run, tmp_path):
  """A foreign file names no model; its shapes do."""
  tree = lora.init_lora(jax.random.key(0), pipeline.params["unet"], 2)
  flat = flatten_dict(tree)
  path = next(path for path in flat if path[-1] == "a")
  layer = {"a": np.zeros((7, 2)), "b": flat[(*path[:-1], "b")]}
  for name in reversed(path[:-1]):
    layer = {name: layer}
  file = lora_files.write_diffusers(tmp_path / "other", layer, ("to_q",))
  with pytest.raises(InputError, match=f"{'/'.join(path[:-1])} is .*another model"):
    run(file)
  assert not (tmp_path / "out").exists()


def test_a_lora_of_layers_the_model_lacks_is_refused(run, tmp_path):
  factors = {"a": np.zeros((8, 2)), "b": np.zeros((2, 8))}
  layer = {"mid_block": {"attentions_7": {"to_q": factors}}}
  file = lora_files.write_diffusers(tmp_path / "other", layer, ("to_q",))
  with pytest.raises(InputError, match="mid_block/attentions_7/to_q, which this model"):
    run(file)


def test_a_folder_that_cannot_be_written_is_named(trained, run, tmp_path):
  (tmp_path / "file").touch()
  for out in ("/proc/export", tmp_path / "file"):
    with pytest.raises(InputError, match=f"cannot write {out}.*--out"):
      run(trained, out)


def test_help_shows_an_example():
  command = [sys.executable, "-m", "safetydpo_jax.export", "--help"]
  shown = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True)
  assert shown.returncode == 0
  assert "export --lora runs/hate --model sd15 --format diffusers" in shown.stdout
