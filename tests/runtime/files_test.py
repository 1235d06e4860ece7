"""Files are there whole or not at all, whatever interrupts a write."""

import csv

import pytest

from safetydpo_jax.errors import InputError
from safetydpo_jax.runtime import files


def names(folder):
  return sorted(file.name for file in folder.iterdir())


def test_what_is_written_appears_when_it_is_complete(tmp_path):
  file = tmp_path / "new" / "x.png"
  with files.writing(file) as temporary:
    temporary.write_bytes(b"half")
    assert temporary.suffix == ".png"  # writers of pictures know the format by it
    assert not file.exists()
  assert file.read_bytes() == b"half"
  assert names(file.parent) == ["x.png"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_write_that_breaks_off_leaves_what_was_there(tmp_path, error):
  files.write_text(tmp_path / "x", "before")

  def break_off():
    with files.writing(tmp_path / "x") as temporary:
      temporary.write_text("half")
      raise error

  with pytest.raises(error):
    break_off()
  assert (tmp_path / "x").read_text() == "before"
  assert names(tmp_path) == ["x"]


def test_what_a_killed_process_left_is_overwritten_if_the_tag_is_fixed(tmp_path):
  (tmp_path / ".unfinished.x").write_bytes(b"left")
  with files.writing(tmp_path / "x", tag="unfinished") as temporary:
    temporary.write_bytes(b"whole")
  assert names(tmp_path) == ["x"]


def test_a_file_that_cannot_be_written_is_named():
  with pytest.raises(InputError, match=r"cannot write /proc/x\.txt: "):
    files.write_text("/proc/x.txt", "")
  with pytest.raises(InputError, match=r"cannot write /proc/x\.csv: "):
    files.write_csv("/proc/x.csv", ["a"], [])


def test_a_csv_is_read_back(tmp_path):
  rows = [{"a": "x, y", "b": 'say "é"'}, {"a": "two\nlines", "b": ""}]
  files.write_csv(tmp_path / "x.csv", ("a", "b"), [rows[0], {"a": rows[1]["a"]}])
  with open(tmp_path / "x.csv", newline="", encoding="utf-8") as lines:
    assert list(csv.DictReader(lines)) == rows


def test_a_git_lfs_pointer_is_told_from_a_file(tmp_path):
  text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n"
  contents = {"pointer": text, "file": "version 2", "empty": ""}
  for name, content in contents.items():
    (tmp_path / name).write_text(content)
  names = [*contents, "nothing", "."]
  found = {name for name in names if files.is_lfs_pointer(tmp_path / name)}
  assert found == {"pointer"}


def broken():
  yield {"a": "1"}
  raise OSError(5, "Input/output error")


def test_a_failure_to_read_is_not_taken_for_one_to_write(tmp_path):
  with pytest.raises(OSError, match="Input/output") as caught:
    files.write_csv(tmp_path / "x.csv", ["a"], broken())
  assert not isinstance(caught.value, InputError)

  def read_inside():
    with files.writing(tmp_path / "x"):
      raise OSError(5, "Input/output error")

  with pytest.raises(OSError, match="Input/output"):
    read_inside()
  assert names(tmp_path) == []


def test_a_copy_names_both_files(tmp_path):
  (tmp_path / "x").write_text("x")
  files.copy(tmp_path / "x", tmp_path / "new/y")
  assert (tmp_path / "new/y").read_text() == "x"
  for source, target in (("no", "z"), ("x", "x/z")):
    with pytest.raises(InputError, match=rf"copy .*/{source} to .*/{target}: \w"):
      files.copy(tmp_path / source, tmp_path / target)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
  files.make_folder(tmp_path / "a/b")
  (tmp_path / "x").write_text("x")
  with pytest.raises(InputError, match="/x/y: Not a directory"):
    files.make_folder(tmp_path / "x/y")
