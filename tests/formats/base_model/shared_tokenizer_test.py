"""A single file's tokenizer: beside it, in the hub's cache, or from the hub."""

import shutil

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from safetydpo_jax import load_pipeline
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model import shared_tokenizer
from safetydpo_jax.formats.base_model.hub import PRESETS
from safetydpo_jax.formats.base_model.shared_tokenizer import REPOSITORY, find_folder
from tests.support import single_files
from tests.support.checkpoints import save_tokenizer


@pytest.fixture
def file(tmp_path):
  (tmp_path / "checkpoints").mkdir()
  return tmp_path / "checkpoints" / "m.safetensors"


def test_a_folder_beside_the_file_comes_first(file):
  folder = file.parent
  save_tokenizer(folder / "tokenizer")
  assert find_folder(file, "tokenizer") == folder / "tokenizer"
  # One vocabulary is enough for both encoders of SDXL; a second is taken.
  assert find_folder(file, "tokenizer_2") == folder / "tokenizer"
  save_tokenizer(folder / "tokenizer_2")
  assert find_folder(file, "tokenizer_2") == folder / "tokenizer_2"


def test_then_what_the_hub_s_cache_has(file, tmp_path, monkeypatch):
  save_tokenizer(tmp_path / "cached" / "tokenizer")
  found = {(PRESETS["sdxl"], "tokenizer/vocab.json"): "cached/tokenizer/vocab.json"}

  def cached(repository, name):
    place = found.get((repository, name))
    return place and str(tmp_path / place)

  monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
  assert find_folder(file, "tokenizer_2") == tmp_path / "cached" / "tokenizer"


def test_then_the_hub(file, tmp_path, monkeypatch):
  def download(repository, *, allow_patterns):
    assert (repository, "vocab.json" in allow_patterns) == (REPOSITORY, True)
    return str(tmp_path)

  monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
  monkeypatch.setattr("huggingface_hub.snapshot_download", download)
  assert find_folder(file, "tokenizer") == tmp_path


def test_without_any_only_what_tokenizes_stops(tmp_path, monkeypatch):
  base = single_files.save_sd1(tmp_path / "base")
  tensors = single_files.original_tensors(base, "sd1")
  (tmp_path / "x").mkdir()
  file = single_files.save(tmp_path / "x" / "m.safetensors", tensors)

  def offline(*_, **__):
    raise LocalEntryNotFoundError("no network") from OfflineModeIsEnabled("at all")

  monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
  monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
  pipeline = load_pipeline(file, components=())
  with pytest.raises(
    InputError, match=rf"{REPOSITORY} .* HF_HUB_OFFLINE .*x/tokenizer"
  ):
    pipeline.tokenize(["a"])
  shutil.copytree(base / "tokenizer", tmp_path / "x" / "tokenizer")
  assert pipeline.tokenize(["a"])[0].shape == (1, 77)
  assert pipeline.tokenizers[0].eos_token_id == 521
  assert len(pipeline.tokenizers[0]) == 522
  (tmp_path / "x" / "tokenizer" / "vocab.json").write_text("x")
  again = shared_tokenizer.SharedTokenizer(file, "tokenizer", "!")
  with pytest.raises(InputError, match="as a CLIP tokenizer"):
    again.load()
