"""CLIPScore equals OpenCLIP's on random weights: embeddings, tokens and preparation."""

import importlib
import shutil
import sys

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from transformers import CLIPTokenizer

from safetydpo_jax.data import cleaning
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.clip.files import load_tokenizer, tokenize
from safetydpo_jax.metrics import clipscore
from safetydpo_jax.runtime.sharding import make_mesh
from tests.support.checkpoints import save_tokenizer
from tests.support.clips import (
  open_clip_config,
  save_tiny_clip,
  to_open_clip,
  write_json,
)
from tests.support.parity import NETWORK, tensor

GELU = {"hidden_act": "gelu"}
PROMPTS = ["A Red thing", "the  thin\ton", "in and on and in"]


def load(folder, **options):
  mesh = make_mesh(devices=jax.devices()[:2])
  return clipscore.load(folder, mesh=mesh, per_device=2, **options)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  folder = tmp_path_factory.mktemp("clip") / "model"
  return folder, save_tiny_clip(folder, vision=GELU, text=GELU)


def import_or_skip(module):
  """OpenCLIP needs torchvision, which needs the build of PyTorch it was made for."""
  try:
    return importlib.import_module(module)
  except (ImportError, RuntimeError, OSError) as error:
    pytest.skip(f"{module} cannot be imported: {error}")


def pictures():
  rng = np.random.default_rng(0)
  for size in [(90, 41), (33, 103), (32, 32)]:
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
    yield small.resize(size, Image.Resampling.BICUBIC)


def test_scores_equal_pytorchs_clip(tiny):
  folder, theirs = tiny
  model = load(folder)
  batch = np.stack([clipscore.prepare(picture, model) for picture in pictures()])
  ids = tokenize(model.clip, [cleaning.clean(p) for p in PROMPTS])
  mean, std = model.clip.mean[None, None, None], model.clip.std[None, None, None]
  with torch.no_grad():
    result = theirs(
      input_ids=torch.tensor(ids).long(),
      pixel_values=tensor((np.float32(batch) / 255 - mean) / std),
    )
  expected = 100 * (result.image_embeds * result.text_embeds).sum(-1)
  assert expected.std() > 1
  images = clipscore.features(model, batch)
  texts = clipscore.text_features(model, PROMPTS)
  assert images.dtype == texts.dtype == np.float32
  np.testing.assert_allclose(
    clipscore.scores(images, texts), expected, rtol=0, atol=NETWORK
  )


def test_scores_equal_open_clips_own(tmp_path):
  open_clip = import_or_skip("open_clip")
  folder = tmp_path / "model"
  tiny = save_tiny_clip(folder, vision=GELU, text=GELU)
  state = to_open_clip(tiny.state_dict())
  config = open_clip_config(tiny)
  (folder / "config.json").unlink()
  (folder / "model.safetensors").unlink()
  write_json(folder / "open_clip_config.json", config)
  safetensors.torch.save_file(state, folder / "open_clip_model.safetensors")
  theirs = open_clip.CLIP(**config["model_cfg"]).eval()
  theirs.load_state_dict(state)
  transform = open_clip.image_transform(
    32, is_train=False, **config["preprocess_cfg"], interpolation="bicubic"
  )
  model = load(folder)
  ids = tokenize(model.clip, [cleaning.clean(p) for p in PROMPTS])
  with torch.no_grad():
    pixels = torch.stack([transform(picture) for picture in pictures()])
    images = theirs.encode_image(pixels, normalize=True)
    texts = theirs.encode_text(torch.tensor(ids).long(), normalize=True)
  batch = np.stack([clipscore.prepare(picture, model) for picture in pictures()])
  got = clipscore.scores(
    clipscore.features(model, batch), clipscore.text_features(model, PROMPTS)
  )
  expected = 100 * (images * texts).sum(-1)
  assert expected.std() > 1
  np.testing.assert_allclose(got, expected, rtol=0, atol=NETWORK)


ODD_TEXTS = [
  "it’s “quoted” — café",
  "Tom &amp; Jerry &amp;lt;3",
  "  two\n lines\t and   spaces ",
  "ÜBER Straße 2×2 ½",
  "emoji 🙂 and 漢字",
  "don't they'll 12345 !!??",
  "schÃ¶n",
  "",
  "word " * 100,
  "<script>alert(1)</script>",
]


def test_tokens_equal_open_clips_own(tmp_path):
  tokenizer = import_or_skip("open_clip.tokenizer").SimpleTokenizer()
  names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
  vocabulary = {names.get(word, word): i for word, i in tokenizer.encoder.items()}
  write_json(tmp_path / "vocab.json", vocabulary)
  ranks = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.get)
  lines = ["#version: 0.2", *(" ".join(pair) for pair in ranks), ""]
  (tmp_path / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
  ours = load_tokenizer(tmp_path)
  for text in ODD_TEXTS:
    expected = tokenizer([text])[0].numpy()
    end = int(np.argmax(expected)) + 1
    got = ours(cleaning.clean(text), truncation=True, max_length=77)["input_ids"]
    assert got == expected[:end].tolist(), text


@pytest.mark.parametrize("form", ["vocab.json", "tokenizer.json"])
def test_an_exclamation_mark_is_a_word_where_the_tokenizer_pads_with_it(
  tiny, tmp_path, form
):
  """As in Stable Diffusion 2 and XL: id 0 within a word, 256 at the end of one."""
  save_tokenizer(tmp_path / "pads", pad_token="!")
  if form == "tokenizer.json":
    theirs = CLIPTokenizer.from_pretrained(tmp_path / "pads")
    shutil.rmtree(tmp_path / "pads")
    theirs.save_pretrained(tmp_path / "pads")
    assert (tmp_path / "pads" / form).exists()
    assert theirs("the !!!")["input_ids"][2:-1] == [0, 0, 0], "what would be wrong"
  model = load(tiny[0], tokenizer=tmp_path / "pads")
  ids = tokenize(model.clip, ["the ! !!! the!"])
  the = ids[0, 1]
  assert ids[0, 1:8].tolist() == [the, 256, 0, 0, 256, the, 256]
  plain = load(tiny[0])
  texts = ["the ! !!! the!", "!", "the red one"]
  np.testing.assert_array_equal(ids, tokenize(plain.clip, texts[:1]))
  np.testing.assert_array_equal(
    clipscore.text_features(model, texts), clipscore.text_features(plain, texts)
  )


def test_a_score_is_a_hundred_cosines_and_may_be_negative():
  images = np.array([[2.0, 0], [1, 1], [0, 3]])
  texts = np.array([[5.0, 0], [1, 0], [0, -1]])
  expected = [100, 50 * 2**0.5, -100]
  np.testing.assert_allclose(clipscore.scores(images, texts), expected)
  with pytest.raises(ValueError, match="prompts"):
    clipscore.scores(images[:2], texts)


def test_about_tells_the_weights(tiny):
  about = load(tiny[0]).about
  assert about["name"] == "CLIPScore"
  assert about["clipped"] is False
  assert about["clip"][0]["file"] == "model.safetensors"


def test_a_missing_ftfy_is_one_line(tiny, monkeypatch):
  monkeypatch.setitem(sys.modules, "ftfy", None)
  with pytest.raises(InputError, match=r"ftfy.*safetydpo-jax\[evaluate\]"):
    load(tiny[0])
