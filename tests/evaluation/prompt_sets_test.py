"""Rows of prompt sets mean what they mean in every CSV."""

import re

import pytest

from safetydpo_jax.data.prompts import read_table
from safetydpo_jax.errors import InputError
from safetydpo_jax.evaluation import cases, prompt_sets, set_files, set_folder
from tests.support import documents
from tests.support.prompt_sets import SAFE, UNSAFE, write_sets

PUBLISHED = (
  "prompt,categories,sd_seed,sd_guidance_scale,sd_image_width,negative_prompt\n"
  "a,hate,4261553411,13,512,blur\nb,self-harm,7.0,7,512,\nc,,,,512,\n"
)


@pytest.fixture
def load(tmp_path):
  """A set's rows and the lines that were said, of a file's content."""

  def load(name, content, suffix=".csv"):
    file, said = tmp_path / (name + suffix), []
    file.write_text(content)
    return prompt_sets.load(name, [file], said.append).rows, said

  return load


def test_a_row_means_the_same_in_a_set_and_to_generate_and_evaluate(load, tmp_path):
  """Also after it was written as the set's own CSV."""
  rows, said = load("i2p", PUBLISHED)
  assert said == [f"{tmp_path / 'i2p.csv'}: columns not read: sd_image_width"]
  prompt_sets.write(tmp_path / "ours.csv", rows)
  ours, theirs = (read_table(tmp_path / name) for name in ("ours.csv", "i2p.csv"))
  assert ours.rows == theirs.rows
  assert [row.guidance for row in ours.rows] == [13.0, 7.0, None]
  assert [row.seed for row in ours.rows] == [4261553411, 7, 2]
  assert ours.rows[0].negative_prompt == "blur"
  assert cases.make_cases(ours) == cases.make_cases(theirs)


def test_a_set_without_such_columns_has_the_csv_that_it_always_had(load, tmp_path):
  rows, _ = load("i2p", PUBLISHED)
  prompt_sets.write(tmp_path / "ours.csv", load("i2p", "prompt,sd_seed\na,5\n")[0])
  assert (tmp_path / "ours.csv").read_text() == (
    "prompt,image,category,evaluation_seed,benign\na,0000000_0.png,,5,0\n"
  )
  assert prompt_sets.with_guidance(rows) == 2
  assert prompt_sets.with_guidance(prompt_sets.without_guidance(rows)) == 0


def test_a_mark_and_a_source_count_in_every_route(load, tmp_path):
  rows, _ = load("ud", "prompt,source,benign\na,coco,\nb,lexica,1\n")
  assert [row["benign"] for row in rows] == [0, 1], "the column has the word"
  rows, _ = load("ud", "prompt,source\na,coco\nb,lexica\n")
  assert [(row["category"], row["benign"]) for row in rows] == [
    ("coco", 1),
    ("lexica", 0),
  ]
  found = cases.make_cases(read_table(tmp_path / "ud.csv"))
  assert [(case.categories, case.benign) for case in found] == [
    (("coco",), True),
    (("lexica",), False),
  ]


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("prompt,sd_seed\na,one\n", r"i2p\.csv row 1: .*seed .*'one'"),
    ("prompt,sd_seed\na,4.26E+09\n", r"row 1: .*seed .*4\.26E\+09"),
    ("prompt,guidance\na,high\n", "row 1: .*guidance .*'high'"),
  ],
)
def test_a_seed_or_guidance_that_is_no_number_is_not_passed_over(
  load, content, message
):
  with pytest.raises(InputError, match=message):
    load("i2p", content)


def test_the_documented_table_of_files_is_what_is_read():
  text = (documents.SITE / "evaluating.md").read_text()
  rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \| (.+) \|$", text, re.MULTILINE)
  known = prompt_sets.BENCHMARKS
  assert [name for name, *_ in rows] == list(known)
  for name, title, prompt, source in rows:
    assert tuple(documents.inline(prompt)) == known[name].prompt
    assert title.startswith(known[name].title)
    assert re.split("[ ,]", known[name].source)[0] in source
    assert known[name].rows is None or f"{known[name].rows:,}" in title
  for ending in set_files.READERS:
    assert f"`{ending}`" in text


def load_set(folder, name):
  """The rows of the set `name` in a folder of sets."""
  return prompt_sets.load(name, set_folder.locate(folder)[name]).rows


def test_i2p_keeps_its_seeds_and_its_several_categories(tmp_path):
  rows = load_set(write_sets(tmp_path / "sets"), "i2p")
  assert [row["prompt"] for row in rows] == UNSAFE[:6]
  assert [row["evaluation_seed"] for row in rows] == [7, 8, 9, 10, 11, 12]
  assert {row["category"] for row in rows} == {"hate, violence"}
  assert {row["benign"] for row in rows} == {0}
  assert rows[1]["image"] == "0000001_0.png"


def test_of_several_files_coco_is_benign(tmp_path):
  rows = load_set(write_sets(tmp_path / "sets"), "ud")
  assert [row["benign"] for row in rows] == [1] * 4 + [0] * 4
  assert [row["category"] for row in rows] == ["coco"] * 4 + ["lexica"] * 4


def test_an_attack_is_its_adversarial_prompt_and_not_its_target(tmp_path):
  rows = load_set(write_sets(tmp_path / "sets"), "mma_diffusion")
  assert [row["prompt"] for row in rows] == UNSAFE[:5]


def test_a_row_without_its_adversarial_prompt_is_no_attack(tmp_path):
  (tmp_path / "p4d.csv").write_text("prompt,adv_prompt\na target,an attack\nanother,\n")
  assert [row["prompt"] for row in load_set(tmp_path, "p4d")] == ["an attack"]


def test_p4d_as_it_circulates_is_read(tmp_path, capsys):
  (tmp_path / "p4d.csv").write_text(
    ",sensitive prompt,evaluation_seed,evaluation_guidance,case_number,safe_model,"
    "safe_level\n0,an attack,42,7.5,0,ESD,MAX\n"
  )
  (row,) = load_set(tmp_path, "p4d")
  assert (row["prompt"], row["evaluation_seed"]) == ("an attack", 42)
  assert row["evaluation_guidance"] == 7.5
  assert capsys.readouterr().out == ""


def test_an_attack_that_failed_is_left_out_and_counted(tmp_path):
  columns = "original_text,perturbed_text,num_queries,result_type"
  rows = ["a,an attack,4,Successful", "b,,60,Failed", "c,c,0,Skipped"]
  rows += ["d,its best try,60,Failed", "e,another,9,Successful_only_bypass"]
  file = tmp_path / "sneakyprompt.csv"
  file.write_text("\n".join([columns, *rows]))
  found = prompt_sets.load("sneakyprompt", [file])
  assert [row["prompt"] for row in found.rows] == ["an attack", "another"]
  about = prompt_sets.about("sneakyprompt", [file], found)
  assert (about["rows"], about["left_out"]) == (2, 3)


def test_an_attack_without_published_prompts_takes_no_plain_ones(tmp_path):
  file = tmp_path / "unlearn_diff_atk.csv"
  file.write_text("prompt,categories,evaluation_seed\na plain one,sexual,5\n")
  with pytest.raises(InputError, match=r"categories.*adv_prompt .*Diffusion-MU-Attack"):
    load_set(tmp_path, "unlearn_diff_atk")
  file.write_text("prompt,adv_prompt\na plain one,an attack\n")
  (row,) = load_set(tmp_path, "unlearn_diff_atk")
  assert row["prompt"] == "an attack"


def test_coco_has_one_caption_an_image_the_first(tmp_path):
  rows = load_set(write_sets(tmp_path / "sets"), "coco")
  assert [row["prompt"] for row in rows] == SAFE[:4][::-1]
  assert [row["evaluation_seed"] for row in rows] == [6, 7, 8, 9]
  assert {row["benign"] for row in rows} == {1}


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    (
      "i2p.csv",
      "text,categories\na,hate\n",
      r"i2p\.csv .*text, categories.* prompt .*I2P",
    ),
    ("i2p.csv", "prompt,categories\na, b, c\n", r"i2p\.csv row 1 .*3"),
    ("i2p.csv", "prompt\n", r"i2p\.csv .*I2P"),
    ("i2p.txt", "\n\n", r"i2p\.txt .*I2P"),
    ("coco.json", "[1, 2]", r"coco\.json as \.json"),
    ("coco.json", "[" * 100_000, r"coco\.json as \.json"),
    ("i2p.parquet", "PAR1", r"i2p\.parquet as \.parquet"),
  ],
)
def test_a_damaged_set_is_named(tmp_path, name, content, message):
  (tmp_path / name).write_text(content)
  with pytest.raises(InputError, match=message):
    load_set(tmp_path, name.split(".")[0])
