"""LoRA files of others: what PyTorch predicts with them, we predict."""

import json
import os
import shutil

import chex
import jax
import numpy as np
import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from safetydpo_jax import load_lora, load_pipeline, lora
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.weights import torch_name
from safetydpo_jax.formats.loras import products
from safetydpo_jax.formats.loras.load import load_adapter
from safetydpo_jax.formats.loras.write import torch_factors, write_diffusers
from tests.support import twins
from tests.support.twins import ATTENTION, EVERY_KIND


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint):
  return load_pipeline(str(tiny_checkpoint), components=("unet",))


@pytest.fixture(scope="module")
def tree(pipeline):
  return twins.random_lora(pipeline.params["unet"])


@pytest.fixture(scope="module")
def inputs():
  return twins.draw_inputs()


@pytest.fixture
def exported(tree, tmp_path):
  return write_diffusers(tmp_path, tree, ATTENTION)


def adapted_unet(tiny_checkpoint, **settings):
  """A UNet with a PEFT LoRA whose factors are all far from 0."""
  unet = UNet2DConditionModel.from_pretrained(tiny_checkpoint / "unet").eval()
  torch.manual_seed(0)
  settings = {"r": 3, "lora_alpha": 6, "target_modules": list(ATTENTION), **settings}
  unet.add_adapter(peft.LoraConfig(init_lora_weights=False, **settings))
  return unet


def save_peft_folder(folder, unet, **changes):
  state = peft.get_peft_model_state_dict(unet)
  tensors = {f"base_model.model.{name}": t.numpy() for name, t in state.items()}
  save_file(tensors, folder / "adapter_model.safetensors")
  config = unet.peft_config["default"].to_dict() | changes
  config = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
  (folder / "adapter_config.json").write_text(json.dumps(config))


def assert_same_predictions(pipeline, name, unet, inputs):
  np.testing.assert_allclose(
    twins.predict_ours(pipeline, load_lora(str(name)), inputs),
    twins.predict_torch(unet, inputs),
    rtol=0,
    atol=1e-4,
  )


SETTINGS = {
  "plain": {},
  "every kind of layer": {"target_modules": list(EVERY_KIND)},
  "rslora": {"use_rslora": True},
  "patterns": {
    "rank_pattern": {"attn1.to_q": 5, "^mid_block.*attn2.to_k": 2},
    "alpha_pattern": {"attn1.to_q": 1.5, "mid_block.*to_k": 9, "to_(v|q)": 4},
  },
  "rslora with patterns": {
    "use_rslora": True,
    "rank_pattern": {"to_v": 2},
    "alpha_pattern": {"to_v": 1},
  },
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("naming", ["diffusers", "peft"])
def test_a_lora_trained_by_peft_predicts_the_same_here(
  naming, settings, pipeline, inputs, tiny_checkpoint, tmp_path
):
  unet = adapted_unet(tiny_checkpoint, **settings)
  if naming == "diffusers":
    state = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(
      tmp_path,
      unet_lora_layers=state,
      unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
  else:
    save_peft_folder(tmp_path, unet)
  assert_same_predictions(pipeline, tmp_path, unet, inputs)


def write_kohya(file, tree, alphas, shapes, **more):
  """A file as kohya's trainer writes it: alphas differ from ranks and each other."""
  tensors = {}
  for n, (path, down, up) in enumerate(torch_factors(tree, shapes)):
    name = "lora_unet_" + torch_name(path).replace(".", "_")
    tensors[f"{name}.lora_down.weight"] = np.ascontiguousarray(down)
    tensors[f"{name}.lora_up.weight"] = np.ascontiguousarray(up)
    tensors[f"{name}.alpha"] = np.array(alphas[n % len(alphas)], np.float32)
  save_file(tensors | more, file)
  return file


@pytest.mark.parametrize("alphas", [(1.5,), (1.5, 2, 6)], ids=["one alpha", "alphas"])
def test_a_kohya_file_with_alpha_unlike_its_rank_predicts_the_same_here(
  alphas, pipeline, tree, inputs, tiny_checkpoint, tmp_path
):
  """The reference is PyTorch's arithmetic: W + alpha / r · up down in every layer."""
  shapes = pipeline.unet_shapes()
  wide = twins.random_lora(pipeline.params["unet"], 3, EVERY_KIND)
  file = write_kohya(tmp_path / "kohya.safetensors", wide, alphas, shapes)
  unet = UNet2DConditionModel.from_pretrained(tiny_checkpoint / "unet").eval()
  tensors = {name: torch.from_numpy(t) for name, t in load_file(file).items()}
  for name, module in unet.named_modules():
    flat = "lora_unet_" + name.replace(".", "_")
    if f"{flat}.alpha" in tensors:
      down, up = (tensors[f"{flat}.lora_{part}.weight"] for part in ("down", "up"))
      delta = up.flatten(1) @ down.flatten(1) * (tensors[f"{flat}.alpha"] / 3)
      with torch.no_grad():
        module.weight += delta.reshape(module.weight.shape)
  assert_same_predictions(pipeline, file, unet, inputs)


def test_a_kohya_file_of_one_alpha_is_to_diffusers_what_it_is_here(
  pipeline, tree, inputs, tiny_checkpoint, tmp_path
):
  file = write_kohya(tmp_path / "x.safetensors", tree, (1.5,), pipeline.unet_shapes())
  theirs = StableDiffusionPipeline.from_pretrained(tiny_checkpoint)
  theirs.load_lora_weights(tmp_path, weight_name=file.name)
  assert_same_predictions(pipeline, file, theirs.unet, inputs)


def test_sgm_s_names_give_the_same_lora_as_diffusers_names(tmp_path):
  """As kohya's trainer names SDXL's layers."""
  rng = np.random.default_rng(0)
  names = {
    "input_blocks_4_1_transformer_blocks_0_attn1_to_q": (
      "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    ),
    "middle_block_1_transformer_blocks_9_attn2_to_out_0": (
      "mid_block_attentions_0_transformer_blocks_9_attn2_to_out_0"
    ),
    "output_blocks_5_2_conv": "up_blocks_1_upsamplers_0_conv",
    "output_blocks_3_0_skip_connection": "up_blocks_1_resnets_0_conv_shortcut",
    "label_emb_0_0": "add_embedding_linear_1",
  }
  trees = []
  factors = [
    (np.float32(rng.standard_normal((3, 8))), np.float32(rng.standard_normal((6, 3))))
    for _ in names
  ]
  for spelling in (names.keys(), names.values()):
    tensors = {}
    for name, (down, up) in zip(spelling, factors):
      tensors[f"lora_unet_{name}.lora_down.weight"] = down
      tensors[f"lora_unet_{name}.lora_up.weight"] = up
      tensors[f"lora_unet_{name}.alpha"] = np.float32([1.0]).reshape(())
    save_file(tensors, tmp_path / "x.safetensors")
    trees.append(load_lora(str(tmp_path / "x.safetensors")))
  chex.assert_trees_all_equal(*trees)
  paths = {"_".join(path[:-1]) for path in flatten_dict(trees[0])}
  assert paths == set(names.values())


def test_diffusers_old_attention_names_are_read(tree, exported, tmp_path):
  old = {}
  for name, tensor in load_file(exported).items():
    name = name.replace("to_out.0.lora", "to_out.lora")
    for part in ("to_q", "to_k", "to_v", "to_out"):
      name = name.replace(f".{part}.lora.", f".processor.{part}_lora.")
    old[name] = tensor
  assert not set(old) & set(load_file(exported))
  save_file(old, tmp_path / "old.safetensors")
  chex.assert_trees_all_equal(load_lora(str(tmp_path / "old.safetensors")), tree)


def test_tensors_of_text_encoders_are_left_out_and_counted(
  pipeline, tree, tmp_path, capsys, monkeypatch
):
  layer = "lora_te_text_model_encoder_layers_0_mlp_fc1"
  more = {
    f"{layer}.lora_down.weight": np.ones((3, 8), np.float32),
    f"{layer}.lora_up.weight": np.ones((8, 3), np.float32),
    f"{layer}.alpha": np.array(3, np.float32),
  }
  file = write_kohya(
    tmp_path / "x.safetensors", tree, (3,), pipeline.unet_shapes(), **more
  )
  chex.assert_trees_all_equal(load_lora(str(file)), tree)
  assert "3 tensors of text encoders left out;" in capsys.readouterr().err
  again = shutil.copy(file, tmp_path / "again.safetensors")
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  load_lora(str(again))
  assert capsys.readouterr().err == ""
  save_file(more, tmp_path / "text.safetensors")
  with pytest.raises(InputError, match="no tensors of a UNet LoRA"):
    load_lora(str(tmp_path / "text.safetensors"))


def test_alpha_tensors_scale_the_product(tree, exported, tmp_path):
  tensors = load_file(exported)
  for name in list(tensors):
    if name.endswith("down.weight"):
      alpha = name.replace(".lora.down.weight", ".alpha")
      tensors[alpha] = np.array(1.5, np.float32)
  save_file(tensors, tmp_path / "alpha.safetensors")
  chex.assert_trees_all_close(
    load_lora(str(tmp_path / "alpha.safetensors")), lora.scale(tree, 0.5), rtol=1e-6
  )


HEADERS = {
  "dora": ('{"unet.use_dora": true}', "no lora_magnitude_vector, although .* use_dora"),
  "alpha": ('{"unet.lora_alpha": "four"}', "lora_alpha is 'four'"),
  "infinite": ('{"unet.lora_alpha": 1e999}', "lora_alpha is inf"),
  "beyond all floats": (f'{{"unet.lora_alpha": {10**400}}}', "a finite number"),
  "a switch": ('{"unet.use_rslora": "false"}', "use_rslora is 'false'; expected true"),
  "list": ("[]", "is not a JSON object"),
  "cut": ('{"unet.r"', "is not JSON"),
  "deep": ("[" * 100_000, "is not JSON"),
  "patterns": (
    '{"unet.alpha_pattern": ["to_q"]}',
    "alpha_pattern is not a JSON object",
  ),
  "endless pattern": (
    '{"unet.alpha_pattern": {"((a+)+)+x": 1}}',
    "is not a simple pattern",
  ),
  "broken pattern": ('{"unet.alpha_pattern": {"(to_q": 1}}', "is not a pattern"),
  "repeated forever": (
    f'{{"unet.alpha_pattern": {{"a{{{10**30}}}": 1}}}}',
    "is not a pattern",
  ),
  "moves the base": ('{"unet.init_lora_weights": "pissa_niter_4"}', "base weights"),
}


@pytest.mark.parametrize(("metadata", "message"), HEADERS.values(), ids=HEADERS)
def test_settings_that_cannot_be_followed_are_refused(
  metadata, message, exported, tmp_path
):
  file = tmp_path / "other.safetensors"
  save_file(load_file(exported), file, metadata={"lora_adapter_metadata": metadata})
  with pytest.raises(InputError, match=message):
    load_lora(str(file))


def test_a_peft_folder_of_another_adapter_is_refused(tiny_checkpoint, tmp_path):
  unet = adapted_unet(tiny_checkpoint)
  for changes, message in (
    ({"use_dora": True}, "use_dora"),
    ({"peft_type": "OFT"}, "is a OFT adapter"),
    ({"peft_type": "LOKR", "r": 0}, "a rank below 1"),
    ({"lora_bias": True}, "lora_bias"),
  ):
    save_peft_folder(tmp_path, unet, **changes)
    with pytest.raises(InputError, match=message):
      load_lora(str(tmp_path))
  (tmp_path / "adapter_config.json").write_text("[1]")
  with pytest.raises(InputError, match="is not a JSON object"):
    load_lora(str(tmp_path))


LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
FLAT = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
A, B = np.ones((3, 8), np.float32), np.ones((8, 3), np.float32)
BROKEN = {
  "no LoRA": ({"unet.conv_in.weight": A}, "is not a UNet LoRA tensor"),
  "no UNet's": ({"unet.blocks.0.lora.down.weight": A}, "is not a UNet LoRA tensor"),
  "a path": ({"unet.../../x.lora.down.weight": A}, "is not a UNet LoRA tensor"),
  "no module": ({f"{FLAT}_x.lora_down.weight": A}, "is not a UNet LoRA tensor"),
  "one factor": ({f"{LAYER}.lora.down.weight": A}, "only one of its two factors"),
  "twice": (
    {f"{LAYER}.lora.down.weight": A, f"{LAYER}.lora_A.weight": A},
    "listed twice, under two names",
  ),
  "ranks": (
    {f"{LAYER}.lora.down.weight": A, f"{LAYER}.lora.up.weight": np.ones((8, 2))},
    "expected one rank",
  ),
  "no rank": (
    {f"{LAYER}.lora.down.weight": A[:0], f"{LAYER}.lora.up.weight": B[:, :0]},
    "expected one rank",
  ),
  "a wide up": (
    {
      f"{FLAT}.lora_down.weight": np.ones((3, 8, 3, 3)),
      f"{FLAT}.lora_up.weight": np.ones((8, 3, 3, 3)),
    },
    "expected one rank",
  ),
  "alphas": (
    {f"{FLAT}.lora_down.weight": A, f"{FLAT}.lora_up.weight": B, f"{FLAT}.alpha": A},
    "alpha of shape",
  ),
  "NaN": (
    {f"{LAYER}.lora.down.weight": A * np.nan, f"{LAYER}.lora.up.weight": B},
    "NaN or infinity",
  ),
  "alpha NaN": (
    {
      f"{FLAT}.lora_down.weight": A,
      f"{FLAT}.lora_up.weight": B,
      f"{FLAT}.alpha": np.array(np.nan),
    },
    "NaN or infinity",
  ),
  "OFT": ({f"{FLAT}.oft_blocks": A}, "is OFT .*expected a LoRA, LoHa"),
  "half a LoHa": ({f"{FLAT}.hada_w1_a": A}, "has hada_w1_a, which is not"),
  "half a LoKr": ({f"{FLAT}.lokr_w1": A}, "has lokr_w1, which is not"),
  "a core alone": ({f"{FLAT}.lora_mid.weight": A}, "has mid, which is not"),
  "magnitudes alone": ({f"{FLAT}.dora_scale": A}, "has no factors"),
  "magnitudes of a norm": (
    {
      f"{FLAT}.lora_down.weight": A,
      f"{FLAT}.lora_up.weight": B,
      f"{FLAT}.dora_scale": A,
    },
    r"dora_scale of shape \(3, 8\)",
  ),
  "magnitudes of PEFT": (
    {
      f"{LAYER}.lora_A.weight": A,
      f"{LAYER}.lora_B.weight": B,
      f"{LAYER}.lora_magnitude_vector": A[0, :3],
    },
    "magnitudes of shape",
  ),
  "magnitudes twice": (
    {
      f"{FLAT}.lora_down.weight": A,
      f"{FLAT}.lora_up.weight": B,
      f"{FLAT}.dora_scale": B[:, :1],
      f"{FLAT}.lora_magnitude_vector": B[:, 0],
    },
    "both dora_scale and lora_magnitude_vector",
  ),
  "LoHa of two sizes": (
    {
      f"{FLAT}.hada_w1_a": B,
      f"{FLAT}.hada_w1_b": A,
      f"{FLAT}.hada_w2_a": B,
      f"{FLAT}.hada_w2_b": A[:, :6],
    },
    "do not fit each other",
  ),
  "LoKr beyond measure": (
    {f"{FLAT}.lokr_w1": np.ones((999, 999)), f"{FLAT}.lokr_w2": np.ones((99, 99))},
    "larger than any of a Stable Diffusion UNet",
  ),
  "a bias of two axes": ({f"{FLAT}.diff_b": A}, "norm or bias"),
  "NaN in a norm": ({f"{FLAT}.w_norm": A[0] * np.nan}, "NaN or infinity"),
  "nothing": ({}, "no tensors of a UNet LoRA"),
}


@pytest.mark.parametrize(("tensors", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named(tensors, message, tmp_path):
  file = tmp_path / "broken.safetensors"
  save_file({name: np.asarray(t, np.float32) for name, t in tensors.items()}, file)
  with pytest.raises(InputError, match=message) as error:
    load_lora(str(file))
  assert str(file) in str(error.value)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.bool_])
def test_integers_are_no_factors(dtype, tmp_path):
  """They would be a quantised file's, whose scale is elsewhere; alpha may be one."""
  tensors = {f"{FLAT}.lora_down.weight": A.astype(dtype), f"{FLAT}.lora_up.weight": B}
  save_file(tensors, tmp_path / "x.safetensors")
  with pytest.raises(InputError, match=r"to_q holds integers \(.* as its down"):
    load_lora(str(tmp_path / "x.safetensors"))
  tensors |= {f"{FLAT}.lora_down.weight": A, f"{FLAT}.alpha": np.array(3).astype(dtype)}
  save_file(tensors, tmp_path / "x.safetensors")
  load_lora(str(tmp_path / "x.safetensors"))


def test_a_small_file_does_not_fill_the_memory(tmp_path, monkeypatch):
  tensors = {
    f"lora_unet_mid_block_resnets_{n}_conv1.{part}": np.ones((8, 8), np.float32)
    for n in (0, 1)
    for part in ("lokr_w1", "lokr_w2")
  }
  save_file(tensors, tmp_path / "x.safetensors")
  load_adapter(str(tmp_path / "x.safetensors"))
  monkeypatch.setattr(products, "LARGEST_UNET", 2 * 64**2 - 1)
  with pytest.raises(InputError, match="more numbers than any Stable Diffusion"):
    load_adapter(str(tmp_path / "x.safetensors"))


def test_a_truncated_file_is_named(exported):
  os.truncate(exported, exported.stat().st_size // 2)
  with pytest.raises(InputError, match="is not a readable safetensors file"):
    load_lora(str(exported))


@pytest.mark.parametrize("name", ["lora.bin", "lora.pt", "lora.ckpt"])
def test_a_pickle_is_never_opened(name, tmp_path):
  (tmp_path / name).write_bytes(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00exit\x85R.")
  with pytest.raises(InputError, match=r"is a pickle.*safetensors"):
    load_lora(str(tmp_path / name))


def test_something_that_is_no_lora_is_named(tmp_path):
  with pytest.raises(InputError, match="no LoRA at"):
    load_lora(str(tmp_path / "nothing"))
  with pytest.raises(InputError, match=r"it has no expert\.json"):
    load_lora(str(tmp_path))


def test_the_tree_is_plain_float32_numpy(exported):
  for leaf in jax.tree.leaves(load_lora(str(exported))):
    assert type(leaf) is np.ndarray
    assert leaf.dtype == np.float32
    assert leaf.flags.c_contiguous
