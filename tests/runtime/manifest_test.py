"""Manifests: whole or absent, and wrong ones named."""

import json
import os

import pytest

from safetydpo_jax.errors import InputError
from safetydpo_jax.runtime import manifest


def test_what_is_written_is_read(tmp_path):
  content = {"prompt": 'zwölf ~ "quotes"', "numbers": [1, 2.5, None]}
  manifest.write_json(tmp_path / "x.json", content)
  assert manifest.read_json(tmp_path / "x.json", "thing") == content
  assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_a_write_that_fails_leaves_the_old_one(tmp_path):
  manifest.write_json(tmp_path / "x.json", {"a": 1})
  with pytest.raises(TypeError):
    manifest.write_json(tmp_path / "x.json", {"a": 1, "b": object()})
  assert manifest.read_json(tmp_path / "x.json", "thing") == {"a": 1}
  assert len(list(tmp_path.iterdir())) == 1


def test_a_write_cut_short_leaves_the_old_one(tmp_path, monkeypatch):
  """The new one is under another name until it is whole."""

  def stop(*_):
    raise KeyboardInterrupt

  manifest.write_json(tmp_path / "x.json", {"a": 1})
  monkeypatch.setattr(os, "replace", stop)
  with pytest.raises(KeyboardInterrupt):
    manifest.write_json(tmp_path / "x.json", {"a": 2})
  assert manifest.read_json(tmp_path / "x.json", "thing") == {"a": 1}


def test_a_manifest_is_json_for_every_reader(tmp_path):
  """NaN and Infinity are Python's additions; other readers stop there."""
  with pytest.raises(ValueError, match="not JSON compliant"):
    manifest.write_json(tmp_path / "x.json", {"loss": float("nan")})
  assert not list(tmp_path.iterdir())


def test_versions_are_those_that_decide_the_digits():
  expected = {"safetydpo-jax", "jax", "flax", "optax", "orbax-checkpoint"}
  versions = manifest.versions()
  assert versions.keys() == expected
  assert all(version[0].isdigit() for version in versions.values())


def test_a_folder_that_cannot_be_written_is_named():
  with pytest.raises(InputError, match=r"cannot write /proc/x\.json: .*choose"):
    manifest.write_json("/proc/x.json", {})


def test_a_missing_manifest_says_what_the_folder_is_not(tmp_path):
  with pytest.raises(InputError, match=f"{tmp_path} .* a pair cache: .* x.json"):
    manifest.read_json(tmp_path / "x.json", "pair cache")


@pytest.mark.parametrize(
  "content", [b"", b'{"a": 1', b"\xff\xfe", b"[" * 100_000, b"9" * 5000]
)
def test_a_damaged_manifest_is_named(content, tmp_path):
  (tmp_path / "x.json").write_bytes(content)
  with pytest.raises(InputError, match=r"read .*x\.json, .* pair cache: "):
    manifest.read_json(tmp_path / "x.json", "pair cache")


@pytest.mark.parametrize(
  ("before", "now", "words"),
  [
    (1, "a", "with x 1, now it is 'a'"),
    (None, 0, "with x unset, now it is 0"),
    (0, None, "with x 0, now it is unset"),
  ],
)
def test_a_changed_setting_is_said_in_words(before, now, words):
  assert manifest.change("x", before, now) == words


def test_a_manifest_can_be_read_by_people(tmp_path):
  manifest.write_json(tmp_path / "x.json", {"a": [1], "b": {}})
  text = (tmp_path / "x.json").read_text()
  assert text.count("\n") > 3
  assert text.endswith("}\n")
  assert json.loads(text) == {"a": [1], "b": {}}
