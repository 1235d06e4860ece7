"""A fused pipeline: the base's files as they were, and a UNet that is base + LoRA."""

import filecmp
import json
import os

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from safetydpo_jax import load_pipeline, lora
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model import fused
from safetydpo_jax.formats.loras.write import DTYPES, target_modules, write_diffusers
from tests.support import twins
from tests.support.checkpoints import save_tiny_checkpoint
from tests.support.twins import EVERY_KIND

WEIGHTS = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint):
  return load_pipeline(str(tiny_checkpoint), components=("unet",))


@pytest.fixture(scope="module")
def tree(pipeline):
  return twins.random_lora(pipeline.params["unet"], 3, EVERY_KIND, size=0.1)


@pytest.fixture
def base(tmp_path):
  """A checkpoint to spoil."""
  return save_tiny_checkpoint(tmp_path / "base")


def write(base, out, tree, **options):
  with fused.new_folder(out) as folder:
    fused.copy_base(base, folder)
    fused.write_unet(folder, base, tree, **options)
  return out


def files_of(folder):
  return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_everything_but_the_unet_s_weights_is_the_base_s_byte_for_byte(
  tiny_checkpoint, tree, tmp_path
):
  out = write(tiny_checkpoint, tmp_path / "out", tree)
  names = files_of(tiny_checkpoint)
  assert files_of(out) == names
  _, different, errors = filecmp.cmpfiles(tiny_checkpoint, out, names, shallow=False)
  assert different == [f"unet/{WEIGHTS}.safetensors"]
  assert not errors
  assert "Flax" not in (out / "model_index.json").read_text()


def test_images_are_those_of_base_and_lora(tiny_checkpoint, pipeline, tree, tmp_path):
  """In PyTorch, from the same noise, with guidance; and here, for one prediction."""
  out = write(tiny_checkpoint, tmp_path / "out", tree)
  file = write_diffusers(
    tmp_path / "lora",
    tree,
    target_modules(tree, pipeline.unet_shapes()),
    shapes=pipeline.unet_shapes(),
  )
  latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

  def draw(folder, adapter=None):
    theirs = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    if adapter:
      theirs.load_lora_weights(adapter)
    prompts = ["a red one", "the other"]
    options = {"num_inference_steps": 4, "output_type": "np", "latents": latents}
    return theirs(prompts, **options).images

  base = draw(tiny_checkpoint)
  adapted, whole = draw(tiny_checkpoint, file.parent), draw(out)
  assert np.abs(adapted - base).max() > 0.05
  np.testing.assert_allclose(whole, adapted, rtol=0, atol=1e-4)
  inputs = twins.draw_inputs()
  ours = load_pipeline(str(out), components=("unet",))
  np.testing.assert_allclose(
    twins.predict_ours(ours, {}, inputs),
    twins.predict_ours(pipeline, tree, inputs),
    rtol=0,
    atol=1e-4,
  )


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_is_taken_in_float32_and_rounded_once(
  dtype, tiny_checkpoint, pipeline, tree, tmp_path
):
  number = DTYPES[dtype]
  out = write(tiny_checkpoint, tmp_path / "out", tree, dtype=number)
  got = load_file(out / "unet" / f"{WEIGHTS}.safetensors")
  whole = lora.fuse(pipeline.params["unet"], tree)
  names = (
    ("conv_in", "conv_in"),
    ("mid_block.resnets.0.conv1", "mid_block/resnets_0/conv1"),
    ("down_blocks.0.attentions.0.proj_in", "down_blocks_0/attentions_0/proj_in"),
    ("time_embedding.linear_1", "time_embedding/linear_1"),
  )
  for name, path in names:
    leaf = whole
    for part in (*path.split("/"), "kernel"):
      leaf = leaf[part]
    order = (3, 2, 0, 1) if leaf.ndim == 4 else (1, 0)
    expected = np.asarray(leaf).transpose(order)
    tensor = got[f"{name}.weight"]
    assert str(tensor.dtype) == f"torch.{dtype}"
    if tensor.ndim == 4 and expected.ndim == 2:
      expected = expected[:, :, None, None]
    # Half a unit in the last place of weights below 4, and float32's own.
    close = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}[dtype]
    np.testing.assert_allclose(tensor.float().numpy(), expected, rtol=0, atol=close)


def test_a_small_change_is_not_lost_before_the_rounding():
  """bf16's next number after 0.5 is 0.50390625, and half way there 2⁻⁹ = 0.001953125.

  0.5 + 0.001955 rounds up; bf16(0.001955) is 2⁻⁹, and 0.5 + 2⁻⁹ rounds back to 0.5.
  """
  weight = np.full((2, 2), 0.5, ml_dtypes.bfloat16)
  a, b = np.full((2, 1), 0.001955, np.float32), np.ones((1, 2), np.float32)
  layers = {"x.weight": (a, b)}
  summed = fused.fuse_tensor(
    "x.weight", weight, np.dtype(ml_dtypes.bfloat16), layers, {}
  )
  np.testing.assert_array_equal(np.float32(summed), np.full((2, 2), 0.50390625))


def test_large_unets_are_split_as_diffusers_splits_them(
  tiny_checkpoint, tree, tmp_path
):
  whole = write(tiny_checkpoint, tmp_path / "whole", tree)
  size = (whole / "unet" / f"{WEIGHTS}.safetensors").stat().st_size
  most = size // 3
  out = write(tiny_checkpoint, tmp_path / "out", tree, shard_bytes=most)
  unet = UNet2DConditionModel.from_pretrained(whole / "unet")
  unet.save_pretrained(tmp_path / "theirs", max_shard_size=most)
  index = f"{WEIGHTS}.safetensors.index.json"
  ours, theirs = (
    json.loads((folder / index).read_text())
    for folder in (out / "unet", tmp_path / "theirs")
  )
  assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
  assert ours["weight_map"].keys() == theirs["weight_map"].keys()
  parts = sorted(path.name for path in (out / "unet").glob("*.safetensors"))
  assert parts[0].startswith(f"{WEIGHTS}-00001-of-0000")
  assert sorted(set(ours["weight_map"].values())) == parts
  assert all((out / "unet" / part).stat().st_size < most + 10**5 for part in parts)
  joined = UNet2DConditionModel.from_pretrained(out / "unet").state_dict()
  for name, tensor in unet.state_dict().items():
    assert torch.equal(tensor, joined[name]), name
  load_pipeline(str(out), components=("unet",))


def test_shards_are_filled_in_order():
  layout = {name: (np.float16, (size,)) for name, size in zip("abcde", (2, 2, 1, 9, 1))}
  assert fused.split(layout, 8) == [["a", "b"], ["c"], ["d"], ["e"]]
  assert fused.split(layout, 100) == [["a", "b", "c", "d", "e"]]
  assert fused.SHARD_BYTES == 10_000_000_000


def test_a_variant_of_the_base_gives_one_that_loads_as_it_does(
  tiny_checkpoint, pipeline, tree, tmp_path
):
  half = StableDiffusionPipeline.from_pretrained(tiny_checkpoint)
  half.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
  out = write(tmp_path / "half", tmp_path / "out", tree, variant="fp16")
  assert [path.name for path in (out / "unet").glob("*.safetensors")] == [
    f"{WEIGHTS}.fp16.safetensors"
  ]
  theirs = StableDiffusionPipeline.from_pretrained(out, variant="fp16")
  inputs = twins.draw_inputs()
  got = twins.predict_torch(theirs.unet.float(), inputs)
  ours = twins.predict_ours(pipeline, tree, inputs)
  np.testing.assert_allclose(got, ours, rtol=0, atol=2e-2)
  tensors = load_file(out / "unet" / f"{WEIGHTS}.fp16.safetensors")
  assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_what_holds_the_unet_without_the_lora_is_not_copied(base, tree, tmp_path):
  names = ("unet/diffusion_pytorch_model.fp16.safetensors", "v1-5-pruned.safetensors")
  names += ("unet/diffusion_pytorch_model.bin", "model.ckpt", "unet/model.onnx")
  names += ("vae/diffusion_pytorch_model.bin", "vae/run.py", "README.md", ".env")
  for name in names:
    (base / name).write_bytes(b"x")
  (base / "LICENSE.md").write_text("terms")
  out = write(base, tmp_path / "out", tree)
  assert not {name for name in names if (out / name).exists()}
  assert (out / "LICENSE.md").read_text() == "terms"


def test_a_component_that_is_pickled_says_how_to_convert(base, tree, tmp_path):
  folder = base / "text_encoder"
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
  with pytest.raises(InputError, match=r"text_encoder .*pytorch_model\.bin.*convert"):
    write(base, tmp_path / "out", tree)
  assert not (tmp_path / "out").exists()


LINKS = (
  "vae/notes.txt",
  "model_index.json",
  "unet/config.json",
  "LICENSE",
  f"unet/{WEIGHTS}.safetensors",
)


@pytest.mark.parametrize("name", LINKS)
def test_a_link_out_of_the_base_is_not_followed(name, base, tree, tmp_path):
  """Else a checkpoint of others could have any file copied, and published."""
  secret = tmp_path / "secret"
  if (base / name).exists():
    (base / name).rename(secret)
  else:
    secret.write_text("secret")
  (base / name).symlink_to(secret)
  with pytest.raises(InputError, match=r"is a link to .*secret, outside "):
    write(base, tmp_path / "out", tree)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "secret"]


def test_a_linked_folder_is_not_followed(base, tree, tmp_path):
  (base / "vae").rename(tmp_path / "secret")
  (base / "vae").symlink_to(tmp_path / "secret")
  with pytest.raises(InputError, match=r"outside "):
    write(base, tmp_path / "out", tree)


def test_links_of_the_hub_s_cache_are_followed(base, tree, tmp_path):
  """models--name/snapshots/<commit>/… link to models--name/blobs/<hash>."""
  model = tmp_path / "models--x--y"
  (model / "blobs").mkdir(parents=True)
  (model / "snapshots").mkdir()
  snapshot = model / "snapshots" / "0123"
  base.rename(snapshot)
  for n, path in enumerate(p for p in sorted(snapshot.rglob("*")) if p.is_file()):
    path.rename(model / "blobs" / str(n))
    path.symlink_to(model / "blobs" / str(n))
  out = write(snapshot, tmp_path / "out", tree)
  assert not any(path.is_symlink() for path in out.rglob("*"))
  assert (out / "vae" / "config.json").stat().st_nlink == 1
  load_pipeline(str(out))


INDEXES = {
  "a path": (
    {"../secret": ["diffusers", "UNet2DConditionModel"]},
    "not a valid component name",
  ),
  "missing": ({"image_encoder": ["transformers", "CLIP"]}, "image_encoder is missing"),
  "Flax": ({"_class_name": "FlaxStableDiffusionPipeline"}, "names FlaxStable"),
  "Flax class": ({"vae": ["diffusers", "FlaxAutoencoderKL"]}, "names FlaxAuto"),
}


@pytest.mark.parametrize(("entries", "message"), INDEXES.values(), ids=INDEXES)
def test_an_index_that_lists_something_else_is_refused(
  entries, message, base, tree, tmp_path
):
  index = json.loads((base / "model_index.json").read_text())
  (base / "model_index.json").write_text(json.dumps(index | entries))
  with pytest.raises(InputError, match=message):
    write(base, tmp_path / "out", tree)


def test_a_flax_config_is_refused(base, tree, tmp_path):
  config = json.loads((base / "unet" / "config.json").read_text())
  config["_class_name"] = "FlaxUNet2DConditionModel"
  (base / "unet" / "config.json").write_text(json.dumps(config))
  with pytest.raises(InputError, match="names FlaxUNet2DConditionModel"):
    write(base, tmp_path / "out", tree)


def test_weights_that_do_not_fit_float16_are_named(base, tree, tmp_path):
  big = lora.scale(tree, 1e7)
  with pytest.raises(InputError, match=r"unet\..*too large for float16; use --dtype"):
    write(base, tmp_path / "out", big, dtype=np.float16)
  assert os.listdir(tmp_path) == ["base"]


def test_a_layer_the_weights_lack_is_named(base, tree, tmp_path):
  more = {"mid_block": {"attentions_9": {"to_q": {"a": np.ones((8, 2)), "b": A}}}}
  with pytest.raises(InputError, match=r"mid_block\.attentions\.9\.to_q\.weight"):
    write(base, tmp_path / "out", more)


A = np.ones((2, 8), np.float32)


def test_a_folder_that_holds_something_is_not_written_to(base, tree, tmp_path):
  out = tmp_path / "out"
  out.mkdir()
  write(base, out, tree)  # an empty one is
  with pytest.raises(InputError, match=f"--out {out} already exists"):
    write(base, out, tree)
  with pytest.raises(InputError, match="cannot write /proc/out"):
    write(base, "/proc/out", tree)


def test_one_tensor_is_in_memory_at_a_time(base, tree, tmp_path, monkeypatch):
  alive = []

  def fuse(*arguments, original=fused.fuse_tensor):
    array = original(*arguments)
    alive.append(array.nbytes)
    return array

  seen = []

  def written(file, layout, tensors, metadata):
    for _ in tensors:
      seen.append(len(alive))

  monkeypatch.setattr(fused, "fuse_tensor", fuse)
  monkeypatch.setattr(fused, "write_safetensors", written)
  fused.write_unet(tmp_path / "out", base, tree)
  assert seen == list(range(1, len(seen) + 1)), "a tensor is made when it is written"
  assert len(jax.tree.leaves(tree)) < len(seen)


def test_a_file_that_git_lfs_has_not_fetched_is_not_copied(base, tree, tmp_path):
  pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
  (base / "vae" / "diffusion_pytorch_model.safetensors").write_text(pointer)
  with pytest.raises(InputError, match=r"vae/.*safetensors is a Git LFS pointer"):
    write(base, tmp_path / "out", tree)
