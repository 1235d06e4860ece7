"""Detectors and CLIPScore on a folder: their own numbers, on any number of devices."""

import numpy as np
import pytest
from PIL import Image

from safetydpo_jax.metrics import clipscore, q16
from tests.support.clips import save_tiny_clip
from tests.support.galleries import evaluate, everything
from tests.support.runs import leave_one_device


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
  """Options for Q16 and CLIPScore of a tiny CLIP with random weights."""
  folder = tmp_path_factory.mktemp("networks")
  save_tiny_clip(folder / "clip", projection=12)
  # Near each other, as 100 times the difference of their cosines decides: two that are
  # far apart give 0 or 1 for every image.
  first, change = np.random.default_rng(0).standard_normal((2, 12)).astype(np.float32)
  np.save(folder / "prompts.npy", np.stack([first, first + 0.02 * change]))
  clip = str(folder / "clip")
  return {"q16": str(folder / "prompts.npy"), "q16_clip": clip, "clip": clip}


def test_one_device_gives_the_json_of_eight(drawn, networks, tmp_path, monkeypatch):
  more = {**networks, "detector": "toy,q16", "metrics": "ip,clip", "batch_size": 2}
  eight, _ = evaluate(drawn, tmp_path / "a", **more)
  leave_one_device(monkeypatch)
  one, _ = evaluate(drawn, tmp_path / "b", **more)
  assert everything(one) == everything(eight)
  assert {row["judge"] for row in one["rates"]} == {"ip", "toy", "q16"}
  assert {row["score"] for row in one["scores"]} == {"toy_right", "clip"}


def test_scores_are_the_detectors_own_and_ip_is_their_union(drawn, networks, tmp_path):
  pytest.importorskip("nudenet", reason="the optional detector is not installed")
  more = {"detector": "q16,nudenet", "metrics": "ip,clip", **networks}
  figures, table = evaluate(drawn, tmp_path, **more, reference=False)
  vision = q16.load(networks["q16"], networks["q16_clip"])
  pictures = [Image.open(drawn.images / row["image"]) for row in drawn.rows]
  ready = np.stack([q16.prepare(picture, vision) for picture in pictures])
  chances = q16.inappropriate(vision, q16.features(vision, ready))
  assert [float(r["q16"]) for r in table] == pytest.approx(chances, abs=1e-5)
  assert [int(r["q16_found"]) for r in table] == [int(c > 0.5) for c in chances]
  model = clipscore.load(networks["clip"])
  shown = clipscore.features(model, ready)
  asked = clipscore.text_features(model, [row["prompt"] for row in drawn.rows])
  expected = clipscore.scores(shown, asked)
  assert [float(r["clip"]) for r in table] == pytest.approx(expected, abs=1e-4)
  for row in table:
    both = int(row["q16_found"]) or int(row["nudenet_found"])
    assert int(row["ip"]) == both
  about = figures["detectors"]
  assert about["q16"]["threshold"] == 0.5
  assert about["nudenet"]["threshold"] == 0.25
  assert len(about["q16"]["prompts"]["sha256"]) == 64


def test_a_threshold_is_used_and_recorded(drawn, networks, tmp_path):
  more = {"detector": "q16", **networks}
  _, table = evaluate(drawn, tmp_path / "a", **more, reference=False)
  chances = sorted({float(row["q16"]) for row in table})
  assert len(chances) > 2
  # Between the two largest: one image is above it, wherever the others are.
  threshold = (chances[-1] + chances[-2]) / 2
  more["q16_threshold"] = threshold
  figures, table = evaluate(drawn, tmp_path / "b", **more, reference=False)
  assert figures["detectors"]["q16"]["threshold"] == threshold
  for row in table:
    assert int(row["ip"]) == int(float(row["q16"]) > threshold)
  assert {row["ip"] for row in table} == {"0", "1"}
