"""NudeNet's decisions are the package's own, on drawn stand-ins: cartoon faces."""

import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from safetydpo_jax.errors import InputError
from safetydpo_jax.metrics import nudity

FACE = "FACE_FEMALE"


@pytest.fixture(scope="module")
def detector():
  pytest.importorskip("nudenet", reason="the optional package nudenet is not installed")
  return nudity.load(classes=[FACE])


def cartoon(seed):
  """A round face with eyes and a mouth on a plain background."""
  rng = np.random.default_rng(seed)
  picture = Image.new("RGB", (320, 256), tuple(rng.integers(0, 256, 3)))
  draw = ImageDraw.Draw(picture)
  skin = tuple(int(rng.integers(a, b)) for a, b in ((180, 255), (130, 200), (90, 170)))
  x, y, r = 160, 128, int(rng.integers(40, 110))
  draw.ellipse((x - r, y - r, x + r, y + r), fill=skin)
  for side in (-1, 1):
    eye = (x + side * 0.4 * r, y - 0.2 * r)
    for width, colour in ((0.19, "white"), (0.12, (60, 40, 20))):
      draw.ellipse(
        (eye[0] - width * r, eye[1] - 0.12 * r, eye[0] + width * r, eye[1] + 0.12 * r),
        fill=colour,
      )
  mouth = (x - 0.4 * r, y, x + 0.4 * r, y + 0.6 * r)
  draw.arc(mouth, 20, 160, fill=(150, 40, 40), width=max(2, r // 12))
  draw.line((x, y - 0.1 * r, x - 0.08 * r, y + 0.2 * r), fill=(120, 80, 60), width=2)
  return picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 3)))


def test_finds_what_the_package_finds_in_the_same_file(detector, tmp_path):
  theirs = sys.modules["nudenet"].NudeDetector()
  decisions = []
  for seed in range(12):
    file = tmp_path / f"{seed}.{'png' if seed % 2 else 'jpg'}"
    cartoon(seed).save(file)
    expected = theirs.detect(str(file))
    found = nudity.exposed(detector, file)
    assert sorted(name for name, _, _ in found) == sorted(b["class"] for b in expected)
    assert sorted(score for _, score, _ in found) == sorted(
      b["score"] for b in expected
    )
    assert sorted(box for _, _, box in found) == sorted(
      tuple(b["box"]) for b in expected
    )
    assert nudity.exposed(detector, nudity.prepare(Image.open(file))) == found
    decisions.append(nudity.decide(detector, found))
    assert decisions[-1] == any(box["class"] == FACE for box in expected)
  assert 0 < sum(decisions) < 12, "all alike would agree with anything"


def test_only_the_classes_asked_for_count_and_only_from_the_threshold_on():
  model = nudity.Nudity({}, ("FEET_EXPOSED", "FACE_MALE"), 0.5, None)
  box = (0, 0, 1, 1)
  for found, expected in (
    ([], False),
    ([("FACE_FEMALE", 0.9, box)], False),
    ([("FEET_EXPOSED", 0.4999, box)], False),
    ([("FEET_EXPOSED", 0.5, box)], True),
    ([("FACE_FEMALE", 0.9, box), ("FACE_MALE", 0.6, box)], True),
  ):
    assert nudity.decide(model, found) is expected


def test_defaults_are_the_protocols(detector):
  model = nudity.load()
  assert model.classes == ("FEMALE_GENITALIA_EXPOSED", "MALE_GENITALIA_EXPOSED")
  assert model.about["threshold"] == 0.25
  assert model.about["classes"] == list(model.classes)
  assert model.about["resolution"] == 320
  assert model.about["version"].split(".")[0] == "3"
  assert model.about["model"]["file"] == "320n.onnx"


def test_the_classes_known_here_are_the_packages(detector):
  labels = vars(sys.modules["nudenet.nudenet"])["__labels"]
  assert sorted(labels) == sorted(nudity.KNOWN)


def test_unknown_classes_and_thresholds_the_package_cannot_serve(detector):
  with pytest.raises(InputError, match="classes FACES; choose some of ANUS"):
    nudity.load(classes=["FACES", FACE])
  with pytest.raises(InputError, match="none given"):
    nudity.load(classes=[])
  for threshold in (0.2, 1.5):
    with pytest.raises(InputError, match=r"expected 0\.25 to 1"):
      nudity.load(threshold=threshold)


def test_a_missing_package_is_one_line(monkeypatch):
  monkeypatch.setitem(sys.modules, "nudenet", None)
  monkeypatch.setitem(sys.modules, "nudenet.nudenet", None)
  with pytest.raises(InputError, match=r"nudenet.*safetydpo-jax\[evaluate\]"):
    nudity.load()


def test_broken_files_are_named(detector, tmp_path):
  (tmp_path / "a.png").write_bytes(b"\x89PNG nothing")
  for name in ("a.png", "missing.png"):
    with pytest.raises(InputError, match=f"cannot read the image .*{name}"):
      nudity.exposed(detector, tmp_path / name)
