"""FID of folders: between them and to real images of any format, shared by hosts."""

import jax
import numpy as np
import pytest
from safetensors.torch import save_file

from safetydpo_jax.errors import InputError
from safetydpo_jax.evaluation import quality
from safetydpo_jax.metrics import fid
from tests.support.galleries import evaluate, everything
from tests.support.inception_twin import Twin, randomise
from tests.support.runs import leave_one_device


@pytest.mark.slow  # Inception is compiled for one device and for eight
def test_one_device_gives_the_fid_of_eight(drawn, tmp_path, monkeypatch):
  file = tmp_path / "weights.safetensors"
  save_file(randomise(Twin()).state_dict(), file)
  more = {"metrics": "fid", "inception": str(file), "batch_size": 1}
  more["fid_statistics"] = drawn.reference
  eight, _ = evaluate(drawn, tmp_path / "a", **more)
  leave_one_device(monkeypatch)
  one, _ = evaluate(drawn, tmp_path / "b", **more)
  assert everything(one) == everything(eight)
  assert {row["of"] for row in one["fid"]} == {"images", "reference"}


def test_fid_is_between_folders_and_to_real_images(drawn, tmp_path, monkeypatch):
  """With a network that gives eight means of the pixels for features."""

  def extract(batch):
    return batch[..., 0].reshape(len(batch), 8, -1)[:, :, :999].mean(-1)

  def load(weights, per_device):
    return fid.Fid({"name": "FID"}, lambda batch: extract(batch[:, :296]))

  monkeypatch.setattr(fid, "load", load)
  monkeypatch.setattr(fid.Statistics.__init__, "__defaults__", (8,))
  real = drawn.reference
  figures, _ = evaluate(drawn, tmp_path / "a", metrics="fid", fid_statistics=real)
  rows = {(row["of"], row["against"]): row["fid"] for row in figures["fid"]}
  assert rows["reference", "statistics"] == pytest.approx(0, abs=1e-4)
  assert rows["images", "statistics"] == rows["images", "reference"] > 0
  assert "below 2048" in figures["fid"][0]["caution"]
  assert figures["rates"] == []
  about = figures["fid_statistics"]
  assert (about["folder"], about["images"]) == (str(real), len(drawn.rows))
  file = tmp_path / "a" / "fid_statistics.npz"
  again, _ = evaluate(drawn, tmp_path / "b", metrics="fid", fid_statistics=file)
  assert again["fid"] == figures["fid"]
  assert len(again["fid_statistics"]["sha256"]) == 64


def test_real_images_are_shared_by_the_hosts_and_the_first_writes(
  drawn, tmp_path, monkeypatch
):
  monkeypatch.setattr(fid.Statistics.__init__, "__defaults__", (8,))
  model = fid.Fid({}, lambda batch: batch.reshape(len(batch), -1)[:, :8])
  whole, about = quality.real_statistics(drawn.reference, model, 5, tmp_path / "one")
  told = {}
  monkeypatch.setattr(jax, "process_count", lambda: 2)

  def host(number, others):
    calls = told[number] = []

    def exchange(content):
      calls.append(content)
      there = others[len(calls) - 1 : len(calls)]
      return [content, *there] if number == 0 else [*there, content]

    monkeypatch.setattr(quality, "exchange", exchange)
    monkeypatch.setattr(jax, "process_index", lambda: number)
    return quality.real_statistics(
      drawn.reference, model, 5, tmp_path / f"host {number}"
    )

  host(1, [])
  both, same = host(0, told[1])
  assert same == about
  assert both.count == whole.count == len(drawn.rows)
  np.testing.assert_allclose(both.sigma, whole.sigma, atol=1e-9)
  assert (tmp_path / "host 0" / quality.STATISTICS).is_file()
  assert not (tmp_path / "host 1").exists()


def test_fid_without_anything_to_compare_with_is_refused(drawn, tmp_path):
  with pytest.raises(InputError, match=r"--metrics fid needs .*--fid_statistics"):
    evaluate(drawn, tmp_path, metrics="fid", reference=False)


@pytest.mark.parametrize("name", ["a.gif", "b.TIF", "c.tiff", "deep/d.JPG", "e.avif"])
def test_images_of_every_format_count(name, tmp_path):
  (tmp_path / "README.txt").touch()
  with pytest.raises(InputError, match="contains no images"):
    quality.check_real_images(tmp_path)
  (tmp_path / name).parent.mkdir(exist_ok=True)
  (tmp_path / name).touch()
  quality.check_real_images(tmp_path)
