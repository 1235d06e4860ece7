"""Q16 equals a PyTorch CLIP with its classifier, and its prompts are read safely."""

import pickle

import jax
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from safetydpo_jax.errors import InputError
from safetydpo_jax.metrics import q16
from safetydpo_jax.runtime.sharding import make_mesh
from tests.support.clips import save_tiny_clip
from tests.support.parity import NETWORK, draw, tensor

PROMPTS = draw(2, 12, seed=5).astype(np.float16)
# name → vision config, of sizes and shapes that no published model has
CONFIGS = {
  "quick_gelu": {},
  "gelu, three layers": {"hidden_act": "gelu", "num_hidden_layers": 3},
  "patches that leave a rest": {"image_size": 30, "patch_size": 7},
}


def load(prompts, clip, **options):
  mesh = make_mesh(devices=jax.devices()[:2])
  return q16.load(prompts, clip, mesh=mesh, per_device=2, **options)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
  file = tmp_path_factory.mktemp("q16") / "prompts.p"
  file.write_bytes(pickle.dumps(PROMPTS))
  return file


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  folder = tmp_path_factory.mktemp("clip") / "model"
  save_tiny_clip(folder)
  return folder


def pictures():
  """Smooth random pictures: wide, high, and smaller than the model's input."""
  rng = np.random.default_rng(0)
  for size in [(90, 41), (33, 101), (12, 17)]:
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
    yield small.resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_pytorchs_clip_with_q16s_classifier(tmp_path, prompts, name):
  theirs = save_tiny_clip(tmp_path / "clip", vision=CONFIGS[name])
  model = load(prompts, tmp_path / "clip")
  batch = np.stack([q16.prepare(picture, model) for picture in pictures()])
  mean, std = (
    np.float32([0.48145466, 0.4578275, 0.40821073])[None, None, None],
    np.float32([0.26862954, 0.26130258, 0.27577711])[None, None, None],
  )
  with torch.no_grad():
    pixels = tensor((np.float32(batch) / 255 - mean) / std)
    x = theirs.get_image_features(pixel_values=pixels)
    x = getattr(x, "pooler_output", x)
    learned = torch.tensor(np.float32(PROMPTS))
    learned = learned / learned.norm(dim=-1, keepdim=True)
    expected = 100.0 * x / x.norm(dim=-1, keepdim=True) @ learned.T
  embeddings = q16.features(model, batch)
  assert embeddings.dtype == np.float32
  got = q16.logits(model, embeddings)
  assert expected.std() > 1
  np.testing.assert_allclose(got, expected, rtol=0, atol=NETWORK)
  np.testing.assert_allclose(
    q16.inappropriate(model, embeddings),
    expected.softmax(-1)[:, 1],
    rtol=0,
    atol=NETWORK,
  )


def test_the_second_prompt_is_the_inappropriate_one(prompts, clip):
  model = load(prompts, clip)
  assert q16.inappropriate(model, np.float32(PROMPTS)) == pytest.approx([0, 1])
  between = PROMPTS / np.linalg.norm(np.float32(PROMPTS), axis=1, keepdims=True)
  half = q16.inappropriate(model, np.float32(between).sum(0, keepdims=True))
  assert half == pytest.approx([0.5], abs=1e-3)


@pytest.mark.parametrize("size", [(224, 224), (640, 480), (480, 640), (100, 37)])
def test_images_are_prepared_as_transformers_does_with_pil(size):
  processor = transformers.CLIPImageProcessorPil()
  rng = np.random.default_rng(0)
  picture = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).resize(size)
  expected = processor(picture, do_normalize=False, do_rescale=False)
  expected = np.asarray(expected["pixel_values"][0]).transpose(1, 2, 0)
  got = q16.prepare(picture)
  assert got.shape == (224, 224, 3)
  assert got.dtype == np.uint8
  np.testing.assert_array_equal(got, expected)


def test_an_odd_rest_is_cropped_as_torchvision_rounds_it():
  """Python's round: 37.5 rows above become 38, where transformers takes 37."""
  ramp = np.repeat((np.arange(299) % 256).astype(np.uint8)[:, None], 224, axis=1)
  picture = Image.fromarray(np.repeat(ramp[..., None], 3, axis=2))
  assert q16.prepare(picture)[0, 0, 0] == 38


def test_about_tells_the_prompts_the_weights_and_the_threshold(prompts, clip):
  about = load(prompts, clip, threshold=0.7).about
  assert about["threshold"] == 0.7
  assert about["prompts"]["file"] == "prompts.p"
  assert [file["file"] for file in about["clip"]] == ["model.safetensors"]
  for file in (about["prompts"], *about["clip"]):
    assert len(file["sha256"]) == 64


def test_npy_and_npz_hold_the_same_prompts(tmp_path, prompts):
  np.save(tmp_path / "a.npy", PROMPTS)
  np.savez(tmp_path / "a.npz", PROMPTS)
  torch.save(torch.tensor(PROMPTS), tmp_path / "a.pt")
  for name in ("a.npy", "a.npz", "a.pt"):
    np.testing.assert_array_equal(
      q16.read_prompts(tmp_path / name), np.float32(PROMPTS)
    )
  np.testing.assert_array_equal(q16.read_prompts(prompts), np.float32(PROMPTS))


@pytest.mark.parametrize(
  ("array", "said"),
  [
    (PROMPTS.T, r"shape \(12, 2\); expected \(2, d\)"),
    (PROMPTS[0], "shape"),
    (PROMPTS[None], "shape"),
    (PROMPTS * np.nan, "not finite"),
    (PROMPTS * [[1], [0]], "zero"),
    (PROMPTS.astype(np.int64), "floating point numbers"),
  ],
)
@pytest.mark.parametrize("form", ["p", "npy", "npz"])
def test_prompts_of_another_shape_or_kind_are_refused(tmp_path, array, said, form):
  file = tmp_path / f"prompts.{form}"
  if form == "p":
    file.write_bytes(pickle.dumps(array))
  else:
    with file.open("wb") as opened:
      (np.save if form == "npy" else np.savez)(opened, array)
  with pytest.raises(InputError, match=said):
    q16.read_prompts(file)


def test_files_that_hold_something_else_are_refused(tmp_path):
  for name in ("a.p", "a.npy", "a.npz"):
    (tmp_path / name).write_bytes(b"not an array")
    with pytest.raises(InputError, match=name):
      q16.read_prompts(tmp_path / name)
  np.save(tmp_path / "b.npy", np.array([{}, {}]), allow_pickle=True)
  with pytest.raises(InputError, match="cannot read one array"):
    q16.read_prompts(tmp_path / "b.npy")
  np.savez(tmp_path / "b.npz", a=PROMPTS, b=PROMPTS)
  with pytest.raises(InputError, match="cannot read one array"):
    q16.read_prompts(tmp_path / "b.npz")
  with pytest.raises(InputError, match=r"does not exist; get Q16's prompts\.p"):
    q16.read_prompts(tmp_path / "missing.p")


def test_prompts_of_another_clip_are_refused(tmp_path, clip):
  np.save(tmp_path / "a.npy", draw(2, 768))
  with pytest.raises(InputError, match=r"prompts with 768 features.* gives 12"):
    load(tmp_path / "a.npy", clip)


def test_images_that_were_not_prepared_are_refused(prompts, clip):
  model = load(prompts, clip)
  for batch in (np.zeros((1, 224, 224, 3), np.uint8), draw(1, 32, 32, 3)):
    with pytest.raises(InputError, match=r"takes images of \(n, 32, 32, 3\) uint8"):
      q16.features(model, batch)


def test_thresholds_outside_of_probabilities_are_refused(prompts, clip):
  with pytest.raises(InputError, match="threshold is 1"):
    load(prompts, clip, threshold=1)
