"""A CLIP directory loads whole, in transformers' form and in OpenCLIP's."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.clip import open_clip
from safetydpo_jax.formats.clip.files import MEAN, load_clip, tokenize
from tests.support.checkpoints import save_tokenizer
from tests.support.clips import (
  open_clip_config,
  save_tiny_clip,
  to_open_clip,
  write_json,
)
from tests.support.parity import NETWORK, apply, draw, tensor

TEXTS = ["a red thing", "the and in", "", "on " * 200]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  folder = tmp_path_factory.mktemp("clip") / "model"
  return folder, save_tiny_clip(folder, vision={"hidden_act": "gelu"})


@pytest.fixture
def open_model(tmp_path):
  """(a folder with OpenCLIP's config and a tokenizer, the model, its tensors)."""
  activation = {"hidden_act": "gelu"}
  theirs = save_tiny_clip(tmp_path / "theirs", vision=activation, text=activation)
  folder = tmp_path / "open"
  save_tokenizer(folder)
  write_json(folder / "open_clip_config.json", open_clip_config(theirs))
  return folder, theirs, to_open_clip(theirs.state_dict())


def assert_equals(loaded, theirs):
  size = loaded.image_size
  images = draw(2, size, size, 3)
  ids = tokenize(loaded, TEXTS)
  with torch.no_grad():
    expected = theirs(input_ids=torch.tensor(ids).long(), pixel_values=tensor(images))
  for tower, inputs, embeddings in (
    ("vision", images, expected.image_embeds),
    ("text", ids, expected.text_embeds),
  ):
    got = apply(loaded.towers[tower], loaded.params[tower], inputs)
    got = getattr(got, "pooled", got)
    got = got / np.linalg.norm(got, axis=-1, keepdims=True)
    np.testing.assert_allclose(got, embeddings, rtol=0, atol=NETWORK)
  np.testing.assert_allclose(loaded.logit_scale, np.exp(3.5), rtol=1e-6)


def test_a_transformers_directory_gives_its_embeddings(model):
  folder, theirs = model
  loaded = load_clip(folder)
  assert_equals(loaded, theirs)
  np.testing.assert_array_equal(loaded.mean, np.float32(MEAN))
  assert [file.name for file in loaded.files] == ["model.safetensors"]


def test_a_config_that_leaves_defaults_out_means_the_same(model, tmp_path):
  """Files of 2022 repeat every field in each tower; the outer projection_dim rules."""
  folder, theirs = model
  copy = tmp_path / "copy"
  copy.mkdir()
  for file in folder.iterdir():
    (copy / file.name).write_bytes(file.read_bytes())
  config = json.loads((copy / "config.json").read_text())
  for part in ("vision_config", "text_config"):
    config[part] |= {"projection_dim": 77, "architectures": None, "torchscript": False}
  write_json(copy / "config.json", config)
  assert_equals(load_clip(copy), theirs)


def test_one_tower_alone_needs_no_tokenizer(model, tmp_path):
  folder, _ = model
  for name in ("config.json", "model.safetensors"):
    (tmp_path / name).write_bytes((folder / name).read_bytes())
  loaded = load_clip(tmp_path, towers=["vision"])
  assert set(loaded.params) == {"vision"}
  assert loaded.tokenizer is None
  with pytest.raises(InputError, match="no tokenizer"):
    load_clip(tmp_path)
  assert load_clip(tmp_path, tokenizer=folder).tokenizer is not None


@pytest.mark.parametrize("form", ["safetensors", "bin", "old bin", "a file"])
def test_open_clip_files_give_the_same_embeddings(open_model, form):
  folder, theirs, state = open_model
  name = "open_clip_model.safetensors"
  if "bin" in form:
    name = "open_clip_pytorch_model.bin"
    new = form == "bin"
    torch.save(state, folder / name, _use_new_zipfile_serialization=new)
  else:
    safetensors.torch.save_file(state, folder / name)
  loaded = load_clip(folder / name if form == "a file" else folder)
  assert_equals(loaded, theirs)
  np.testing.assert_array_equal(loaded.mean, np.float32([0.5, 0.4, 0.3]))
  np.testing.assert_array_equal(loaded.std, np.float32([0.2, 0.3, 0.4]))


def test_an_open_clip_file_without_config_is_the_vit_h_14(open_model):
  folder, _, state = open_model
  (folder / "open_clip_config.json").unlink()
  safetensors.torch.save_file(state, folder / "open_clip_model.safetensors")
  with pytest.raises(InputError, match=r"lacks 480 tensors.*shapes"):
    load_clip(folder)
  config = open_clip.config_of(open_clip.VIT_H_14)
  assert config["projection_dim"] == 1024
  assert config["vision_config"]["num_attention_heads"] == 16
  assert config["vision_config"]["intermediate_size"] == 5120
  assert config["text_config"]["hidden_act"] == "gelu"


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"vision_cfg": {"timm_model_name": "vit"}}, "timm_model_name"),
    ({"text_cfg": {"hf_model_name": "roberta"}}, "hf_model_name"),
    ({"multimodal_cfg": {"width": 3}}, "multimodal_cfg"),
    ({"vision_cfg": 3}, "vision_cfg"),
  ],
)
def test_an_open_clip_of_another_kind_is_refused(change, said):
  with pytest.raises(InputError, match=said):
    open_clip.config_of({**open_clip.VIT_H_14, **change})


def test_quick_gelu_is_read_from_open_clips_config():
  config = open_clip.config_of({**open_clip.VIT_H_14, "quick_gelu": True})
  assert config["vision_config"]["hidden_act"] == "quick_gelu"


def test_a_model_that_is_not_there_says_how_to_get_it(tmp_path):
  with pytest.raises(InputError, match="hf download openai/clip-vit-large-patch14"):
    load_clip("nobody/nothing")
  with pytest.raises(InputError, match=r"is not a CLIP: expected config\.json"):
    load_clip(tmp_path)


def test_a_missing_tensor_is_named(model, tmp_path):
  folder, theirs = model
  state = theirs.state_dict()
  del state["vision_model.post_layernorm.bias"]
  safetensors.torch.save_file(state, tmp_path / "model.safetensors")
  (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
  with pytest.raises(InputError, match=r"vision tower.*lacks 1 .*post_layernorm.bias"):
    load_clip(tmp_path, towers=["vision"])


def test_a_tensor_of_neither_tower_is_named(open_model):
  folder, _, state = open_model
  state["visual.attn_pool.query"] = torch.zeros(3)
  safetensors.torch.save_file(state, folder / "open_clip_model.safetensors")
  with pytest.raises(
    InputError, match=r"not belong in a CLIP.*visual\.attn_pool\.query"
  ):
    load_clip(folder, towers=["vision"])


def test_the_config_of_another_model_is_refused(model, tmp_path):
  folder, _ = model
  (tmp_path / "model.safetensors").write_bytes(
    (folder / "model.safetensors").read_bytes()
  )
  write_json(tmp_path / "config.json", {"model_type": "bert"})
  with pytest.raises(InputError, match="lacks vision_config"):
    load_clip(tmp_path)


def test_a_prompt_too_long_keeps_its_end_token(model):
  folder, _ = model
  loaded = load_clip(folder)
  ids = tokenize(loaded, TEXTS)
  assert ids.shape == (4, 77)
  assert ids.dtype == np.int32
  assert ids[3, -1] == loaded.tokenizer.eos_token_id
