"""A model's name leads to its directory, and downloads take no more than needed."""

import fnmatch
import shutil

import numpy as np
import pytest

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.hub import (
  PRESETS,
  VAES,
  download_patterns,
  locate,
)
from safetydpo_jax.formats.base_model.pipeline import COMPONENTS, load_pipeline
from tests.support.checkpoints import save_tiny_checkpoint


def test_toy_is_the_model_that_ships():
  pipeline = load_pipeline("toy", components=("unet",))
  assert (pipeline.resolution, pipeline.vae_scale) == (32, 4)
  assert pipeline.tokenize(["a small red circle"])[0].shape == (1, 24)


def test_a_path_that_exists_wins_over_a_preset(tiny_checkpoint, tmp_path, monkeypatch):
  shutil.copytree(tiny_checkpoint, tmp_path / "sd15")
  monkeypatch.chdir(tmp_path)
  assert load_pipeline("sd15", components=()).resolution == 16


# A hub repository with everything people store there.
REPOSITORY = [
  "model_index.json",
  "LICENSE.md",
  "README.md",
  "feature_extractor/preprocessor_config.json",
  "scheduler/scheduler_config.json",
  "tokenizer/vocab.json",
  "tokenizer_2/merges.txt",
  "text_encoder/config.json",
  "text_encoder/model.safetensors",
  "text_encoder/model.fp16.safetensors",
  "text_encoder/flax_model.msgpack",
  "text_encoder/pytorch_model.bin",
  "unet/config.json",
  "unet/diffusion_pytorch_model.safetensors",
  "unet/diffusion_pytorch_model.fp16.safetensors",
  "unet/diffusion_pytorch_model.non_ema.safetensors",
  "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
  "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
  "unet/diffusion_pytorch_model.safetensors.index.json",
  "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
  "unet/diffusion_pytorch_model.bin",
  "unet/model.onnx",
  "vae/config.json",
  "vae/diffusion_pytorch_model.safetensors",
  "vae/diffusion_flax_model.msgpack",
  "v1-5-pruned.ckpt",
  "v1-5-pruned.safetensors",
  "safety_checker/model.safetensors",
]


@pytest.fixture
def hub(tiny_checkpoint, tmp_path, monkeypatch):
  """A hub with SDXL (a tiny look-alike) and another VAE; → what was asked of it."""
  vae = tmp_path / "hub" / "vae"
  other = save_tiny_checkpoint(tmp_path / "hub" / "other", seed=5)
  shutil.copytree(other / "vae", vae)
  repositories = {PRESETS["sdxl"]: tiny_checkpoint, VAES["sdxl"]: vae}
  asked = {}

  def snapshot_download(repository, *, revision, allow_patterns, **_):
    asked[repository] = allow_patterns
    return str(repositories[repository])

  monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
  return asked


def test_sdxl_of_the_hub_comes_with_the_vae_that_the_launcher_takes(
  hub, tiny_checkpoint, tmp_path
):
  pipeline = load_pipeline("sdxl", components=("vae",))
  own = load_pipeline(tiny_checkpoint, components=("vae",))
  assert not np.allclose(kernel(pipeline), kernel(own))
  assert [file.parent for file in pipeline.vae_files] == [tmp_path / "hub" / "vae"]
  assert not [p for p in hub[PRESETS["sdxl"]] if p.startswith("vae/")]
  assert "diffusion_pytorch_model.safetensors" in hub[VAES["sdxl"]]


def test_without_weights_no_more_than_the_vaes_config_is_fetched(hub):
  assert load_pipeline("sdxl", components=()).vae_files == ()
  assert hub[VAES["sdxl"]] == ["config.json"]


@pytest.mark.parametrize("place", ["other", "other/vae", VAES["sdxl"]])
def test_another_vae_is_a_folder_a_diffusers_directory_or_a_hub_id(
  hub, tiny_checkpoint, tmp_path, place
):
  given = tmp_path / "hub" / place
  vae_from = str(given) if given.exists() else place
  pipeline = load_pipeline(tiny_checkpoint, components=("vae",), vae_from=vae_from)
  expected = load_pipeline(tmp_path / "hub" / "other", components=("vae",))
  np.testing.assert_array_equal(kernel(pipeline), kernel(expected))


def kernel(pipeline):
  return pipeline.params["vae"]["encoder"]["conv_in"]["kernel"]


def test_a_vae_that_is_none_is_one_clear_line(tiny_checkpoint, tmp_path):
  with pytest.raises(InputError, match=r"VAE .* has no config\.json"):
    load_pipeline(tiny_checkpoint, vae_from=tmp_path)
  with pytest.raises(InputError, match=r"VAE 'no/such' .* cannot be downloaded"):
    load_pipeline(tiny_checkpoint, vae_from="no/such")
  with pytest.raises(InputError, match=r"no VAE a/b\.safetensors: .*no such file"):
    load_pipeline(tiny_checkpoint, vae_from="a/b.safetensors")


NOWHERE = {
  "a misspelt preset": ("sd51", "OWNER/NAME .*sd21base.*did you mean sd21"),
  "no preset": ("gpt2", "expected a folder.*sdxl$"),
  "a file": ("models/foo.safetensors", "no such file; check"),
  "a file, chosen": ("foo.safetensors:epsilon", "no file foo.safetensors; check"),
  "a folder": ("./models/foo", "no such folder; check"),
  "folders": ("models/sd/foo", "no such folder; check"),
}


@pytest.mark.parametrize(("name", "message"), NOWHERE.values(), ids=NOWHERE)
def test_what_is_no_name_on_the_hub_is_not_looked_for_there(name, message, monkeypatch):
  monkeypatch.setattr("huggingface_hub.snapshot_download", None)
  with pytest.raises(InputError, match=f"there is no model {name}: .*{message}"):
    load_pipeline(name)


def test_what_follows_a_file_s_colon_is_what_its_unet_predicts(
  tiny_checkpoint, tmp_path
):
  (tmp_path / "x.safetensors").touch()
  with pytest.raises(InputError, match=r"expected .*x\.safetensors:epsilon or .*:v_pr"):
    load_pipeline(tmp_path / "x.safetensors:foo")
  with pytest.raises(InputError, match=r"expected .*x\.safetensors, without :epsilon"):
    load_pipeline(
      tiny_checkpoint, vae_from=tmp_path / "x.safetensors:epsilon", components=()
    )


def test_a_folder_of_the_owner_s_name_is_told_of(tmp_path, monkeypatch):
  """`models/foo` is looked for on the hub, though a path may have been meant."""
  (tmp_path / "models").mkdir()
  monkeypatch.chdir(tmp_path)
  with pytest.raises(InputError, match=r"\(the folder models has no foo\), and"):
    load_pipeline("models/foo")


def test_one_variant_of_the_components_is_downloaded_and_no_more():
  def fetched(components, variant):
    patterns = download_patterns(dict.fromkeys(("unet", *components), variant))
    return {f for f in REPOSITORY if any(fnmatch.fnmatch(f, p) for p in patterns)}

  small = {f for f in REPOSITORY if f.endswith(("config.json", ".txt", "vocab.json"))}
  small |= {"model_index.json", "LICENSE.md"}
  unet = {f for f in REPOSITORY if "unet/diffusion" in f and f[-4:] != ".bin"}
  half = {f for f in unet if "fp16" in f}
  plain = {f for f in unet - half if "non_ema" not in f}
  assert fetched((), None) == small | plain
  assert fetched(("unet",), "fp16") == small | half
  everything = fetched(COMPONENTS, None)
  assert everything - small - plain == {
    "text_encoder/model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
  }


def test_a_file_s_name_may_end_like_a_choice(write, tmp_path):
  file = write()
  odd = tmp_path / "odd:epsilon"
  odd.mkdir()
  assert locate(str(odd), (), None, None) == odd
  assert locate(f"{file}:epsilon", (), None, None) == file
