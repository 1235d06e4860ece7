"""Which files are a component's weights, and what is said where there are none."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model import component_files
from safetydpo_jax.formats.base_model.pipeline import load_pipeline
from tests.support.edits import edited_copy

FILE = "diffusion_pytorch_model.safetensors"
POINTER = """version https://git-lfs.github.com/spec/v1
oid sha256:4665fc9ae4ac6ae8d2bd7b4b5d0d2d0cbd5b7f2a4bd3a5c1d7a8c9d0e1f2a3b4
size 3438167536
"""


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "", ".."])
def test_an_index_cannot_leave_its_folder(tmp_path, name):
  folder = tmp_path / "unet"
  folder.mkdir()
  save_file({"x": torch.zeros(1)}, tmp_path / "secret.safetensors")
  index = {"weight_map": {"x": name}}
  (folder / f"{FILE}.index.json").write_text(json.dumps(index))
  with pytest.raises(InputError, match="not a file in its folder"):
    component_files.weight_files(folder)


@pytest.mark.parametrize("content", [{}, [], {"weight_map": {}}, {"weight_map": [1]}])
def test_an_index_without_a_map_is_refused(tmp_path, content):
  (tmp_path / f"{FILE}.index.json").write_text(json.dumps(content))
  with pytest.raises(InputError, match="no 'weight_map'"):
    component_files.weight_files(tmp_path)


def test_a_pickle_is_never_opened(tmp_path):
  (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n")
  with pytest.raises(InputError, match=r"only diffusion_pytorch_model\.bin.*convert"):
    component_files.weight_files(tmp_path)


@pytest.mark.parametrize(
  ("names", "variant", "message"),
  [
    ([], None, r"no weights: expected diffusion_pytorch_model\.safetensors or model"),
    (["model.fp16.safetensors"], None, "ask for variant 'fp16', .*--variant fp16"),
    (["model-00001-of-00002.fp16.safetensors"], None, "--variant fp16"),
    (["model.safetensors"], "fp16", "choose a variant that exists"),
    (["unet.safetensors"], None, r"only unet\.safetensors; expected diffusion_p"),
    (["model-00001-of-00002.safetensors"], None, "or their index"),
    (["diffusion_flax_model.msgpack"], None, "Flax"),
    (["model.fp16.bin", "config.json"], "fp16", r"only model\.fp16\.bin"),
  ],
)
def test_without_weights_it_says_what_there_is(names, variant, message, tmp_path):
  for name in names:
    (tmp_path / name).touch()
  with pytest.raises(InputError, match=message):
    component_files.weight_files(tmp_path, variant)


@pytest.mark.parametrize(
  "file",
  [
    f"unet/{FILE}",
    "vae/config.json",
    "scheduler/scheduler_config.json",
    "model_index.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
  ],
)
def test_a_file_that_git_lfs_has_not_fetched_is_named(tiny_checkpoint, tmp_path, file):
  copy = edited_copy(tiny_checkpoint, tmp_path / "copy", "model_index.json")
  (copy / file).write_text(POINTER)
  with pytest.raises(InputError, match=rf"{file} is a Git LFS pointer.*git lfs pull"):
    load_pipeline(copy, components=())


def test_a_shard_may_be_a_pointer_too(tmp_path):
  names = [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
  save_file({"x": torch.from_numpy(np.zeros(1, np.float32))}, tmp_path / names[0])
  (tmp_path / names[1]).write_text(POINTER)
  index = {"weight_map": dict(zip("xy", names))}
  (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
  with pytest.raises(InputError, match=rf"{names[1]} is a Git LFS pointer"):
    component_files.weight_files(tmp_path)
