"""Weights are found, renamed and accounted for in both directions."""

import json

import diffusers
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from safetensors.torch import load_file, save_file

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model import component_files, weights
from safetydpo_jax.formats.base_model.pipeline import parameter_shapes
from safetydpo_jax.models import published
from safetydpo_jax.models.clip import CLIPText
from safetydpo_jax.models.config import freeze
from safetydpo_jax.models.unet import UNet2DCondition
from safetydpo_jax.models.vae import AutoencoderKL
from tests.support.checkpoints import VAE

FILE = "diffusion_pytorch_model.safetensors"


class Shape:
  def __init__(self, *shape):
    self.shape = shape


# A miniature tree with every kind of leaf.
SHAPES = {
  "conv_in": {"kernel": Shape(3, 5, 2, 4), "bias": Shape(4)},
  "blocks_0": {"norm": {"scale": Shape(4), "bias": Shape(4)}},
  "attn": {"to_out_0": {"kernel": Shape(4, 6)}, "linear_1": {"kernel": Shape(6, 2)}},
  "words": {"embedding": Shape(7, 4)},
}


def their_tensors():
  rng = np.random.default_rng(0)
  shapes = {
    "conv_in.weight": (4, 2, 3, 5),
    "conv_in.bias": (4,),
    "blocks.0.norm.weight": (4,),
    "blocks.0.norm.bias": (4,),
    "attn.to_out.0.weight": (6, 4),
    "attn.linear_1.weight": (2, 6),
    "words.weight": (7, 4),
  }
  return {k: rng.standard_normal(v, dtype=np.float32) for k, v in shapes.items()}


def convert(theirs, **options):
  return weights.convert(theirs.items(), SHAPES, source="a/file", **options)


def save(folder, theirs, name=FILE):
  folder.mkdir(parents=True, exist_ok=True)
  save_file(
    {k: torch.from_numpy(np.array(v)) for k, v in theirs.items()}, folder / name
  )
  return folder


def test_layouts():
  theirs = their_tensors()
  ours = convert(theirs)
  kernel = ours["conv_in"]["kernel"]
  assert kernel[2, 4, 1, 3] == theirs["conv_in.weight"][3, 1, 2, 4]
  np.testing.assert_array_equal(
    ours["attn"]["to_out_0"]["kernel"], theirs["attn.to_out.0.weight"].T
  )
  np.testing.assert_array_equal(ours["words"]["embedding"], theirs["words.weight"])
  np.testing.assert_array_equal(
    ours["blocks_0"]["norm"]["scale"], theirs["blocks.0.norm.weight"]
  )
  assert all(leaf.flags.c_contiguous for leaf in flatten_dict(ours).values())


def test_a_missing_tensor_is_named():
  theirs = their_tensors()
  del theirs["blocks.0.norm.bias"]
  with pytest.raises(InputError, match=r"a/file.*lacks 1 tensor \(blocks\.0\.norm\.b"):
    convert(theirs)


def test_an_unused_tensor_is_named():
  theirs = their_tensors() | {"blocks.1.norm.bias": np.zeros(4)}
  with pytest.raises(InputError, match=r"no place .* 1 tensor \(blocks\.1\.norm\.bias"):
    convert(theirs)


def test_many_are_counted_and_the_first_named():
  extra = {f"more.{i}.weight": np.zeros(1) for i in range(9)}
  with pytest.raises(InputError, match=r"9 tensors \(more\.0\.weight, .*, …\)"):
    convert(their_tensors() | extra)


def test_a_transposed_or_resized_tensor_is_named_with_its_shape():
  theirs = their_tensors()
  theirs["attn.to_out.0.weight"] = theirs["attn.to_out.0.weight"].T
  with pytest.raises(InputError, match=r"attn\.to_out\.0\.weight \(4, 6\)"):
    convert(theirs)


def test_a_tensor_under_two_names_is_refused():
  theirs = their_tensors()
  theirs["text_model.words.weight"] = theirs["words.weight"]
  with pytest.raises(InputError, match=r"contains twice 1 tensor \(text_model\.words"):
    convert(theirs)


def test_position_ids_of_older_files_are_no_weight():
  theirs = their_tensors() | {"text_model.embeddings.position_ids": np.arange(77)}
  convert(theirs)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [jnp.float32, jnp.bfloat16])
def test_every_float_type_is_read_into_every_other(tmp_path, stored, wanted):
  theirs = {k: torch.from_numpy(v).to(stored) for k, v in their_tensors().items()}
  save_file(theirs, tmp_path / FILE)
  ours = weights.load_component(tmp_path, SHAPES, dtype=wanted)
  kernel = ours["attn"]["to_out_0"]["kernel"]
  assert kernel.dtype == wanted
  expected = theirs["attn.to_out.0.weight"].T.float()
  expected = expected.to(torch.bfloat16).float() if wanted == jnp.bfloat16 else expected
  np.testing.assert_array_equal(np.float32(kernel), expected)


def test_the_variant_asked_for_is_read(tmp_path):
  plain, half = their_tensors(), their_tensors()
  half["conv_in.bias"] = half["conv_in.bias"] + 1
  save(tmp_path, plain)
  save(tmp_path, half, "diffusion_pytorch_model.fp16.safetensors")
  for variant, theirs in ((None, plain), ("fp16", half)):
    ours = weights.load_component(tmp_path, SHAPES, variant=variant)
    np.testing.assert_array_equal(ours["conv_in"]["bias"], theirs["conv_in.bias"])
  with pytest.raises(InputError, match=r"no weights of variant 'ema', only .*fp16"):
    component_files.weight_files(tmp_path, "ema")


@pytest.mark.parametrize(
  ("index", "shard", "variant"),
  [
    ("model.safetensors.index.json", "model-0000{}-of-00002.safetensors", None),
    (
      "model.safetensors.index.fp16.json",
      "model.fp16-0000{}-of-00002.safetensors",
      "fp16",
    ),
    (
      "model.fp16.safetensors.index.json",
      "model-0000{}-of-00002.fp16.safetensors",
      "fp16",
    ),
  ],
)
def test_shards_are_joined(tmp_path, index, shard, variant):
  theirs = their_tensors()
  table = {}
  for part in (1, 2):
    some = {k: v for i, (k, v) in enumerate(theirs.items()) if i % 2 == part - 1}
    save(tmp_path, some, shard.format(part))
    table |= dict.fromkeys(some, shard.format(part))
  (tmp_path / index).write_text(json.dumps({"weight_map": table}))
  ours = weights.load_component(tmp_path, SHAPES, variant=variant)
  np.testing.assert_array_equal(ours["words"]["embedding"], theirs["words.weight"])
  (tmp_path / shard.format(2)).unlink()
  with pytest.raises(InputError, match="does not exist"):
    weights.load_component(tmp_path, SHAPES, variant=variant)


def test_legacy_attention_names_of_the_published_vae_are_read(tmp_path):
  """SD 1.5's VAE file says query, key, value and proj_attn, partly as convolutions."""
  theirs = diffusers.AutoencoderKL(**VAE)
  theirs.save_pretrained(tmp_path / "new")
  shapes = parameter_shapes(AutoencoderKL(freeze(dict(theirs.config))))
  new = load_file(tmp_path / "new" / FILE)
  names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value."}
  names[".to_out.0."] = ".proj_attn."
  old = {}
  for name, value in new.items():
    renamed = next((name.replace(n, o) for n, o in names.items() if n in name), name)
    if renamed.endswith(("query.weight", "proj_attn.weight")):
      value = value[:, :, None, None].contiguous()
    old[renamed] = value
  assert len(set(old) - set(new)) == 16
  expected = weights.load_component(tmp_path / "new", shapes)
  (tmp_path / "old").mkdir()
  save_file(old, tmp_path / "old" / FILE)
  got = weights.load_component(tmp_path / "old", shapes)
  for path, leaf in flatten_dict(expected).items():
    np.testing.assert_array_equal(flatten_dict(got)[path], leaf, err_msg=str(path))


def full_size_pairs():
  unets = {
    "sd15": published.SD15_UNET,
    "sd21": published.SD21_UNET,
    "sdxl": published.SDXL_UNET,
  }
  for name, config in unets.items():
    yield f"{name} unet", diffusers.UNet2DConditionModel, config, UNet2DCondition
  yield "vae", diffusers.AutoencoderKL, published.SD15_VAE, AutoencoderKL


@pytest.mark.parametrize(
  ("theirs", "config", "ours"),
  [pair[1:] for pair in full_size_pairs()],
  ids=[pair[0] for pair in full_size_pairs()],
)
def test_names_and_shapes_of_the_full_size_models_are_a_bijection(theirs, config, ours):
  with torch.device("meta"):
    expected = {k: tuple(v.shape) for k, v in theirs(**config).state_dict().items()}
  shapes = flatten_dict(parameter_shapes(ours(freeze(config))))
  got = {}
  for path, leaf in shapes.items():
    shape = leaf.shape
    if path[-1] == "kernel":
      shape = tuple(shape[i] for i in ((3, 2, 0, 1) if len(shape) == 4 else (1, 0)))
    got[weights.torch_name(path)] = shape
  assert len(got) == len(shapes)
  assert got == expected
  for path in shapes:
    module = path[:-1]
    assert weights.tree_path(weights.torch_name(module)) == module


def test_names_of_the_text_encoders_are_a_bijection():
  import transformers

  for config, theirs in (
    (published.CLIP_L, transformers.CLIPTextModel),
    (published.CLIP_BIGG, transformers.CLIPTextModelWithProjection),
  ):
    with torch.device("meta"):
      model = theirs(transformers.CLIPTextConfig(**config))
    expected = {weights.canonical_name(name) for name in model.state_dict()}
    shapes = flatten_dict(parameter_shapes(CLIPText(freeze(config))))
    assert sorted(map(weights.torch_name, shapes)) == sorted(expected)


def test_linear_1_keeps_its_underscore():
  path = ("time_embedding", "linear_1", "kernel")
  assert weights.torch_name(path) == "time_embedding.linear_1.weight"
  path = ("down_blocks_0", "transformer_blocks_10", "attn1", "to_out_0")
  name = "down_blocks.0.transformer_blocks.10.attn1.to_out.0"
  assert weights.torch_name(path) == name
  assert weights.tree_path(name) == path


def test_the_fingerprint_is_of_the_numbers_not_of_their_type(tmp_path):
  theirs = their_tensors()
  half = {k: v.astype(np.float16) for k, v in theirs.items()}
  backwards = dict(reversed(list(theirs.items())))
  digest = weights.fingerprint(theirs.items())
  assert len(digest) == 16
  assert weights.fingerprint(half.items()) == digest
  assert weights.fingerprint(backwards.items()) == digest
  for name, value in theirs.items():
    assert weights.fingerprint((theirs | {name: 1.01 * value}).items()) != digest
  renamed = {f"x{name}": value for name, value in theirs.items()}
  assert weights.fingerprint(renamed.items()) != digest


def test_integers_are_no_weights():
  """Quantised weights may have the names and shapes of others; their scale is lost."""
  shapes = {"norm": {"scale": np.zeros(3)}}
  with pytest.raises(
    InputError, match=r"has integers.* 1 tensor \(norm\.weight int8\)"
  ):
    weights.convert([("norm.weight", np.ones(3, np.int8))], shapes)
  found = weights.convert([("norm.weight", np.ones(3, ml_dtypes.bfloat16))], shapes)
  assert found["norm"]["scale"].dtype == np.float32
