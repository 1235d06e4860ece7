"""Files of a folder are sets by their names; what is there and is none is named."""

import pytest

from safetydpo_jax.errors import InputError
from safetydpo_jax.evaluation import set_folder
from safetydpo_jax.evaluation.suite import SUITES


def write(folder, *names):
  """Files with a prompt each; a name that ends with / is a folder."""
  for name in names:
    file = folder / name
    if name.endswith("/"):
      file.mkdir(parents=True)
    else:
      file.parent.mkdir(parents=True, exist_ok=True)
      file.write_text("a prompt\n")


@pytest.fixture
def locate(tmp_path):
  """The sets of a suite in a folder as {name: files' names}, and what was said."""

  def locate(suite="safety"):
    said = []
    found = set_folder.locate(tmp_path, SUITES[suite], said.append)
    return {
      name: [str(file.relative_to(tmp_path)) for file in files]
      for name, files in found.items()
    }, said

  return locate


def test_a_set_is_a_file_or_a_folder_of_its_name(locate, tmp_path):
  write(tmp_path, "ud/lexica.txt", "ud/coco.CSV", "coco.json", "i2p.PARQUET", "p4d.tsv")
  write(tmp_path, ".DS_Store", "ud/.gitattributes")
  assert locate() == (
    {
      "i2p": ["i2p.PARQUET"],
      "ud": ["ud/coco.CSV", "ud/lexica.txt"],
      "p4d": ["p4d.tsv"],
      "coco": ["coco.json"],
    },
    [],
  )
  assert locate("attacks") == ({"p4d": ["p4d.tsv"]}, [])


def test_what_is_passed_over_is_named(locate, tmp_path):
  write(tmp_path, "i2p.csv", "ud/a.txt", "coco/")
  unread = ["README.md", "i2p_benchmark.csv", "p4d.xlsx", "images/", "ud/b.xlsx"]
  write(tmp_path, *unread)
  found, (line,) = locate()
  assert found == {"i2p": ["i2p.csv"], "ud": ["ud/a.txt"]}
  names = line.removeprefix(f"{tmp_path}: not read: ").split("; ")[0].split(", ")
  assert sorted(names) == sorted([*(name.strip("/") for name in unread), "coco"])
  assert "unlearn_diff_atk" in line
  assert ".parquet" in line


@pytest.mark.parametrize(
  ("suite", "first"), [("safety", "i2p"), ("attacks", "ring_a_bell")]
)
def test_a_folder_without_sets_says_what_the_suite_expects(
  locate, tmp_path, suite, first
):
  with pytest.raises(InputError, match=rf"{first}\.csv .*unlearn_diff_atk") as error:
    locate(suite)
  assert ("coco" in str(error.value)) == (suite == "safety")
  write(tmp_path, "i2p_benchmark.csv")
  with pytest.raises(InputError, match=rf"{first}\.csv .*\bi2p_benchmark\.csv$"):
    locate(suite)


def test_files_of_another_suite_are_none_of_this_one(locate, tmp_path):
  write(tmp_path, "i2p.csv", "i2p.txt")
  with pytest.raises(InputError, match=r"ring_a_bell\.csv .*\bi2p\.csv, i2p\.txt$"):
    locate("attacks")


@pytest.mark.parametrize("first", ["i2p.txt", "i2p/again.csv"])
def test_a_set_that_is_there_twice_is_refused(locate, tmp_path, first):
  write(tmp_path, "i2p.csv", first)
  other = first.split("/")[0].replace(".", r"\.")
  with pytest.raises(InputError, match=rf"i2p\.csv and {other};"):
    locate()


def test_a_folder_that_is_not_there_and_a_file_are_not_empty_folders(tmp_path):
  with pytest.raises(InputError, match=r"nowhere does not exist"):
    set_folder.locate(tmp_path / "nowhere")
  write(tmp_path, "i2p.csv")
  with pytest.raises(InputError, match=r"i2p\.csv is not a folder"):
    set_folder.locate(tmp_path / "i2p.csv")
