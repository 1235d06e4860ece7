"""The FID network and its preparation equal pytorch-fid's."""

import chex
import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from safetydpo_jax.errors import InputError
from safetydpo_jax.metrics import fid, inception, provenance
from safetydpo_jax.runtime.sharding import make_mesh
from tests.support.inception_twin import Twin, randomise
from tests.support.parity import NETWORK, tensor


@pytest.fixture(scope="module")
def twin():
  return randomise(Twin())


@pytest.fixture(scope="module")
def weights(twin, tmp_path_factory):
  """In the form of pytorch-fid's published file, which is older than PyTorch 1.6."""
  file = tmp_path_factory.mktemp("inception") / "weights.pth"
  torch.save(twin.state_dict(), file, _use_new_zipfile_serialization=False)
  return file


@pytest.fixture(scope="module")
def model(weights):
  mesh = make_mesh(devices=jax.devices()[:2])
  return fid.load(weights, mesh=mesh, per_device=1)


def pictures(count):
  """Smooth random pictures of odd sizes."""
  rng = np.random.default_rng(0)
  for width, height in [(40, 53), (299, 299), (330, 301)][:count]:
    small = Image.fromarray(rng.integers(0, 256, (7, 9, 3), np.uint8))
    yield small.resize((width, height), Image.Resampling.BICUBIC)


def test_images_are_stretched_as_pytorch_does():
  for picture in pictures(3):
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    expected = torch.nn.functional.interpolate(
      pixels, size=(299, 299), mode="bilinear", align_corners=False
    )[0].permute(1, 2, 0)
    got = fid.prepare(picture)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


def test_features_equal_the_pytorch_network(twin, model):
  batch = np.stack([fid.prepare(picture) for picture in pictures(3)])
  with torch.no_grad():
    expected = twin(tensor(batch))
  assert expected.std() > 0.1
  got = fid.features(model, batch)
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, expected, rtol=0, atol=NETWORK)


def test_features_equal_pytorch_fids_own_network(twin, model, monkeypatch):
  try:
    from pytorch_fid import inception as theirs
  except (ImportError, RuntimeError, OSError) as error:
    pytest.skip(f"pytorch-fid or its torchvision cannot be imported: {error}")
  state = twin.state_dict()
  monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: state)
  network = theirs.InceptionV3().eval()
  batch = np.stack([fid.prepare(picture) for picture in pictures(2)])
  with torch.no_grad():
    expected = network(tensor(batch))[0][:, :, 0, 0]
  np.testing.assert_allclose(fid.features(model, batch), expected, rtol=0, atol=NETWORK)


def test_safetensors_hold_the_same_weights(twin, weights, tmp_path):
  state = {k: v for k, v in twin.state_dict().items() if not k.startswith("fc.")}
  safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
  chex.assert_trees_all_equal(
    inception.read_weights(tmp_path / "weights.safetensors"),
    inception.read_weights(weights),
  )


def test_about_records_the_weights_and_not_the_folder(model, weights):
  about = model.about["inception"]
  assert about["file"] == "weights.pth"
  assert len(about["sha256"]) == 64
  assert about["published"] is None
  assert str(weights.parent) not in str(model.about)


def test_a_damaged_published_file_is_refused_by_its_hash(weights, tmp_path):
  file = tmp_path / fid.WEIGHTS
  file.write_bytes(weights.read_bytes())
  with pytest.raises(InputError, match="is damaged: its SHA-256 is"):
    fid.load(file)
  blob = tmp_path / ("0" * 64)
  blob.write_bytes(b"something else")
  link = tmp_path / "model.safetensors"
  link.symlink_to(blob)
  with pytest.raises(InputError, match="is damaged"):
    provenance.describe(link)


def test_missing_weights_say_where_they_are(tmp_path, monkeypatch):
  monkeypatch.setenv("TORCH_HOME", str(tmp_path))
  with pytest.raises(InputError, match=r"hub/checkpoints/pt_inception.*github\.com"):
    fid.load()


def test_weights_of_another_network_are_refused(twin, tmp_path):
  state = dict(twin.state_dict())
  state["Mixed_7c.branch_pool.bn.running_var"] = -torch.ones(192)
  torch.save(state, tmp_path / "a.pth")
  with pytest.raises(InputError, match="negative variance"):
    fid.load(tmp_path / "a.pth")
  del state["Mixed_7c.branch_pool.bn.running_var"]
  torch.save(state, tmp_path / "b.pth")
  with pytest.raises(InputError, match="lacks 1 tensor"):
    fid.load(tmp_path / "b.pth")


def test_images_that_were_not_prepared_are_refused(model):
  with pytest.raises(InputError, match="make them with prepare"):
    fid.features(model, np.zeros((1, 299, 299, 3), np.uint8))
