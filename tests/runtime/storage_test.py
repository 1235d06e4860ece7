"""Places: paths and URLs alike; what is written is there whole or not at all."""

from pathlib import Path

import pytest

from safetydpo_jax.errors import InputError
from safetydpo_jax.runtime import storage
from tests.support import buckets


@pytest.fixture(params=["disk", "store"])
def folder(request, tmp_path):
  if request.param == "disk":
    return storage.as_path(tmp_path)
  buckets.use_bucket()
  return storage.as_path("gs://bucket/folder")


def test_a_file_is_there_when_it_is_complete(folder):
  file = folder / "x.bin"
  with storage.writing(file) as local:
    local.write_bytes(b"half")
    assert not file.exists()
    local.write_bytes(b"whole")
  assert file.read_bytes() == b"whole"
  with storage.writing(file) as local:
    local.write_bytes(b"again")
  assert file.read_bytes() == b"again"


def test_a_failure_half_way_leaves_what_was_there(folder):
  file = folder / "x.bin"
  with storage.writing(file) as local:
    local.write_bytes(b"before")

  def fail_half_way():
    with storage.writing(file) as local:
      local.write_bytes(b"half")
      raise RuntimeError

  with pytest.raises(RuntimeError):
    fail_half_way()
  assert file.read_bytes() == b"before"


def test_json_comes_back(folder):
  storage.write_json(folder / "x.json", {"a": [1, "é"]})
  assert storage.read_json(folder / "x.json", "thing") == {"a": [1, "é"]}


def test_json_that_is_not_there_or_broken_is_one_clear_line(folder):
  with pytest.raises(InputError, match=r"a thing: .* x\.json"):
    storage.read_json(folder / "x.json", "thing")
  with storage.writing(folder / "x.json") as local:
    local.write_text("{")
  with pytest.raises(InputError, match=r"read .*x\.json, .* a thing: "):
    storage.read_json(folder / "x.json", "thing")


def test_files_of_a_store_are_copied_and_local_ones_are_not(folder, tmp_path):
  files = [folder / name for name in ("a", "b")]
  for file in files:
    with storage.writing(file) as local:
      local.write_text(file.name)
  local = storage.local_files(files)
  assert [Path(name).read_text() for name in local] == ["a", "b"]
  assert (local == [str(file) for file in files]) == (not storage.is_remote(folder))


def test_a_place_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / "x").mkdir()
  with (
    pytest.raises(InputError, match=r"cannot write .*/x: "),
    storage.writing(tmp_path / "x") as local,
  ):
    local.write_text("")


WRONG = {
  "scheme": ("ftp://host/x", "ftp://host/x: expected a path, or a gs://, s3:// or az"),
  "package": ("s3://bucket/x", "s3://bucket/x cannot be opened: .*s3fs"),
}


@pytest.mark.parametrize(("url", "message"), WRONG.values(), ids=WRONG)
def test_a_url_that_nothing_opens_is_named(url, message):
  with pytest.raises(InputError, match=message):
    storage.as_path(url)


def test_a_file_url_is_a_path(tmp_path):
  assert storage.as_path(f"file://{tmp_path}/a b") == tmp_path / "a b"
