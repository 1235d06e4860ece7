"""Layouts: the same pairs whatever the files look like."""

import collections
import csv
import json
import shutil

import pytest

from safetydpo_jax.data.categories import normalise
from safetydpo_jax.data.sources import layouts, text_tables
from safetydpo_jax.data.sources.layouts import read_pairs
from safetydpo_jax.data.sources.pairs import fingerprint, merge, read_image
from safetydpo_jax.errors import InputError
from tests.support import lookalike
from tests.support.lookalike import LAYOUTS, QUIRK

PAIRS = 6


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
  """{layout: path} of the same pairs."""
  folder = tmp_path_factory.mktemp("data")
  return {name: write(folder / name, pairs=PAIRS) for name, write in LAYOUTS.items()}


@pytest.fixture(params=LAYOUTS)
def dataset(datasets, request):
  return datasets[request.param]


def content(pairs):
  """Everything about the pairs that is no place on this disk."""
  return [
    (p.about(), p.names, read_image(p.preferred), read_image(p.dispreferred))
    for p in pairs
  ]


def test_every_layout_gives_the_same_pairs(dataset, datasets):
  pairs, _ = read_pairs(dataset)
  expected, _ = read_pairs(datasets["folder"])
  assert content(pairs) == content(expected)
  assert fingerprint(pairs) == fingerprint(expected)


def test_the_preferred_image_is_the_safe_one(dataset):
  for pair in read_pairs(dataset)[0]:
    preferred, dispreferred = pair.names
    assert preferred == f"s{dispreferred[1:]}"
    assert pair.id == f"{preferred}>{dispreferred}"


def test_captions_stand_in_their_slots_word_for_word(dataset):
  pairs, _ = read_pairs(dataset)
  assert all(pair.captions[0].count("cross") == 1 for pair in pairs)
  assert all(pair.captions[1].count("cross") == 0 for pair in pairs)
  assert all(caption.endswith(QUIRK) for caption in pairs[0].captions)


def test_every_row_is_accounted_for(dataset):
  _, counts = read_pairs(dataset)
  assert counts.rows == counts.captions + counts.ties + counts.repeated
  assert (counts.pairs, counts.captions, counts.uncategorised) == (6, 12, 0)


def test_a_pair_in_two_categories_keeps_both_and_names_are_ours(dataset):
  categories = [pair.categories for pair in read_pairs(dataset)[0]]
  assert categories[1:3] == [("sexual",), ("hate", "violence")]
  assert categories[5] == ("harassment",)


def test_fingerprints_tell_images_captions_and_categories_apart(datasets, tmp_path):
  prints = {fingerprint(read_pairs(datasets["csv"])[0])}
  copy = tmp_path / "copy"
  for change in (
    lambda: (copy / "images" / "u_idx_0000004_0.jpg").write_bytes(b"another"),
    lambda: replace(copy, "disc 3", "disk 3"),
    lambda: replace(copy, "Violence", "Shocking"),
  ):
    shutil.copytree(datasets["csv"], copy)
    change()
    prints.add(fingerprint(read_pairs(copy)[0]))
    shutil.rmtree(copy)
  assert len(prints) == 4


def replace(folder, old, new):
  file = folder / "train.csv"
  text = file.read_text()
  assert old in text
  file.write_text(text.replace(old, new))


def lose(folder):
  (folder / "u_idx_0000004_0.jpg").unlink()


@pytest.mark.parametrize("name", ["folder", "csv"])
def test_a_missing_image_is_an_error_or_skips_its_pair(tmp_path, name):
  dataset = LAYOUTS[name](tmp_path / name, pairs=PAIRS, damage=lose)
  message = r"(line|row) \d+: image .*u_idx_0000004_0\.jpg does not exist"
  with pytest.raises(InputError, match=message):
    read_pairs(dataset)
  pairs, counts = read_pairs(dataset, skipped=(skipped := []))
  assert [p.names[0][6:13] for p in pairs] == [f"{n:07d}" for n in (0, 1, 2, 3, 5)]
  assert counts.skipped == len(skipped) == 1
  assert "u_idx_0000004_0.jpg does not exist" in skipped[0]


def test_a_dataset_of_nothing_but_missing_images_holds_no_pairs(datasets, tmp_path):
  shutil.copy(datasets["csv"] / "train.csv", tmp_path)
  with pytest.raises(
    InputError, match=r"holds no pairs: 16 rows, .*; .*does not exist"
  ):
    read_pairs(tmp_path, skipped=[])


def test_the_official_csv_has_the_published_counts(tmp_path):
  file = lookalike.write_published_csv(tmp_path / "train.csv")
  with open(file, newline="") as lines:
    assert sum(1 for _ in csv.DictReader(lines)) == 32086
  pairs = layouts.read_official(file)
  assert len(pairs) == 15690
  assert len({pair.captions for pair in pairs}) == 15690 - 3
  assert sum(len(pair.categories) > 1 for pair in pairs) == 321


def test_published_sizes_are_counted_by_fate_and_by_category(tmp_path):
  """31,380 rows without bytes as the hub has them, categories from 32,086 rows."""
  file = lookalike.write_published_csv(tmp_path / "train.csv")
  tags = collections.defaultdict(set)  # counted without what is tested
  with open(file, newline="") as lines:
    for row in csv.DictReader(lines):
      tags[row["image"]].add(row["category"])
  expected = collections.Counter(name for names in tags.values() for name in names)
  lookalike.write_published_hub(tmp_path / "data", file)
  pairs, counts = read_pairs(tmp_path)
  assert (counts.rows, counts.pairs, counts.captions) == (31380, 15690, 31380)
  assert (counts.ties, counts.repeated, counts.uncategorised) == (0, 0, 0)
  assert sum(len(pair.categories) > 1 for pair in pairs) == 321
  found = collections.Counter(name for pair in pairs for name in pair.categories)
  assert found == {normalise(name): n // 2 for name, n in expected.items()}
  assert found.total() == 15690 + 321 + 21
  merged, repeated = merge(names_alone(text_tables.read_csv(file)), None)
  assert (len(merged), repeated) == (15690, 32086 - 31380)


def names_alone(table):
  """A table whose images are not asked for."""
  names = {side for row in table.rows for side in (row.preferred, row.dispreferred)}
  return table._replace(images=dict.fromkeys(names))


@pytest.fixture
def hub(tmp_path):
  """A copy of the hub's files alone, and the CSV elsewhere."""
  folder = lookalike.write_hub_layout(tmp_path / "hub", pairs=PAIRS)
  return folder, (folder / "train.csv").rename(tmp_path / "official.csv")


def test_without_the_csv_the_hubs_pairs_have_no_categories(hub):
  pairs, counts = read_pairs(hub[0])
  assert counts.uncategorised == len(pairs) == PAIRS


def test_categories_come_from_a_csv_that_is_given(hub, datasets):
  pairs, counts = read_pairs(hub[0], categories_csv=hub[1])
  assert content(pairs) == content(read_pairs(datasets["folder"])[0])
  assert counts.uncategorised == 0


def test_categories_are_joined_by_prompts_then_by_names(hub):
  with open(hub[1], newline="") as lines:
    rows = list(csv.reader(lines))
  rows = rows[:5]  # pairs 0 and 1
  for row in rows[1:3]:
    row[1] = row[1].replace("0000000", "77")  # other names, same prompts
  for row in rows[3:5]:
    row[0] += " reworded"  # same names, other prompts
  with open(hub[1], "w", newline="") as lines:
    csv.writer(lines).writerows(rows)
  pairs, counts = read_pairs(hub[0], categories_csv=hub[1])
  assert [pair.categories for pair in pairs[:3]] == [("hate",), ("sexual",), ()]
  assert counts.uncategorised == PAIRS - 2


def test_a_pair_with_one_prompt_is_found_by_it(hub, tmp_path):
  rows = [
    {"jpg_0": f"{n}.jpg", "jpg_1": "x.jpg", "label_0": 1, "caption": caption}
    for n, caption in enumerate(read_pairs(hub[0])[0][1].captions)
  ]
  lines = "".join(json.dumps(row) + "\n" for row in rows)
  (tmp_path / "metadata.jsonl").write_text(lines)
  for name in ("0.jpg", "1.jpg", "x.jpg"):
    (tmp_path / name).touch()
  pairs, _ = read_pairs(tmp_path / "metadata.jsonl", categories_csv=hub[1])
  assert [pair.categories for pair in pairs] == [("sexual",)] * 2


ODD_WORDS = ["Null", "NA", "nan", "None", "NULL", "n/a", "-", "0", "true", ""]


@pytest.mark.parametrize("name", ["folder", "csv", "hub", "prepared"])
def test_a_prompt_that_reads_like_no_value_is_a_prompt(tmp_path, monkeypatch, name):
  def write_scenes(*arguments):
    scenes = original(*arguments)[: len(ODD_WORDS)]
    return [s._replace(unsafe_caption=w) for s, w in zip(scenes, ODD_WORDS)]

  original = lookalike._write_scenes
  monkeypatch.setattr(lookalike, "_write_scenes", write_scenes)
  dataset = LAYOUTS[name](tmp_path / name, pairs=len(ODD_WORDS))
  assert [pair.captions[0] for pair in read_pairs(dataset)[0]] == ODD_WORDS


def test_a_table_without_any_image_is_counted_if_images_are_not_needed(
  datasets, tmp_path
):
  _, expected = read_pairs(datasets["csv"])
  shutil.copy(datasets["csv"] / "train.csv", tmp_path)
  pairs, counts = read_pairs(tmp_path, need_images=False)
  assert counts == expected
  assert not pairs[0].preferred.exists()
  (tmp_path / "s_idx_0000001_0.jpg").touch()
  with pytest.raises(InputError, match="does not exist"):
    read_pairs(tmp_path, need_images=False)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n"


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_git_lfs_pointer_is_said_to_be_one(tmp_path, name):
  dataset = LAYOUTS[name](tmp_path / name, pairs=2)
  endings = (".jsonl", ".csv", ".parquet")
  files = [f for f in dataset.rglob("*") if f.suffix in endings or "record-" in f.name]
  files = [f for f in files if name in ("folder", "csv") or f.suffix != ".csv"]
  assert files
  for file in files:
    file.write_bytes(POINTER)
  with pytest.raises(InputError, match=r"[\w-]+\.\S+ is a Git LFS pointer.* pull"):
    read_pairs(dataset)


def test_the_csv_of_another_dataset_is_refused(hub, tmp_path):
  other = tmp_path / "other.csv"
  other.write_text(
    "prompt,image,category\nx,u_idx_99_0.jpg,Hate\ny,s_idx_99_0.jpg,Hate\n"
  )
  with pytest.raises(InputError, match=r"other\.csv has none of the dataset's 6 pairs"):
    read_pairs(hub[0], categories_csv=other)


def test_a_csv_of_test_prompts_in_the_folder_is_not_taken_for_it(hub):
  text = "prompt,image,category\nx,0000001_0.jpg,Hate\n"
  (hub[0] / "CoProv2_test.csv").write_text(text)
  assert read_pairs(hub[0])[1].uncategorised == PAIRS
  shutil.copy(hub[1], hub[0] / "CoProv2_train.csv")
  assert read_pairs(hub[0])[1].uncategorised == 0


FORMS = {
  "a space after commas": ((), ", ", "utf-8"),
  "semicolons": ((), ";", "utf-8-sig"),
  "UTF-16": ((), "\t", "utf-16"),
  "more columns": (("Evaluation Seed", "case_number"), ",", "utf-8"),
}


@pytest.mark.parametrize(("more", "delimiter", "encoding"), FORMS.values(), ids=FORMS)
def test_the_csv_may_look_as_others_save_it(
  more, delimiter, encoding, datasets, hub, tmp_path
):
  """As a dataset, and as the categories of one."""
  copy = shutil.copytree(datasets["csv"], tmp_path / "copy")
  with open(copy / "train.csv", newline="") as lines:
    rows = list(csv.reader(lines))
  rows = [[*(more if n == 0 else "7" * len(more)), *row] for n, row in enumerate(rows)]
  quoted = [
    ['"{}"'.format(cell.replace('"', '""')) for cell in row] for row in rows[1:]
  ]
  text = "\n".join(map(delimiter.join, [rows[0], *quoted]))
  (copy / "train.csv").write_text(text, encoding=encoding)
  assert content(read_pairs(copy)[0]) == content(read_pairs(datasets["csv"])[0])
  shutil.copy(copy / "train.csv", hub[0])
  assert read_pairs(hub[0])[1].uncategorised == 0


def test_files_and_folders_are_found(datasets, tmp_path):
  beside = lookalike.write_csv_layout(tmp_path / "beside", pairs=6, images="")
  odd = shutil.copytree(datasets["hub"], tmp_path / "odd [name] *")
  ids = [pair.id for pair in read_pairs(datasets["folder"])[0]]
  for path in (
    datasets["folder"] / "metadata.jsonl",
    datasets["csv"] / "train.csv",
    datasets["hub"] / "data",
    f"file://{datasets['csv']}",
    beside,
    odd,
  ):
    assert [pair.id for pair in read_pairs(path)[0]] == ids


def test_paths_that_are_no_dataset(datasets, tmp_path):
  (tmp_path / "empty").mkdir()
  for name in "ab":
    shutil.copy(datasets["csv"] / "train.csv", tmp_path / f"{name}.csv")
  for path, message in {
    tmp_path / "nowhere": "nowhere does not exist",
    tmp_path / "empty": "holds neither metadata.jsonl nor parquet",
    datasets["folder"] / "u_idx_0000000_0.jpg": "is neither a .csv file",
    tmp_path: r"several CSV files \(a.csv, b.csv\); give one",
    "ftp://host/data": "ftp://host/data: expected a path, or a gs://",
  }.items():
    with pytest.raises(InputError, match=message):
      read_pairs(path)
