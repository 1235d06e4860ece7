"""Rows of prompt sets mean what they mean in every CSV; attacks are attacks."""

import pytest

from safetydpo_jax.data.prompts import read_table
from safetydpo_jax.errors import InputError
from safetydpo_jax.evaluation import cases, prompt_sets
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
    rows, _ = prompt_sets.load(name, [file], said.append)
    return rows, said

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
    ("prompt,sd_seed\na,one\n", r"i2p\.csv row 1: its seed is 'one'"),
    ("prompt,sd_seed\na,4.26E+09\n", "row 1: its seed is .4.26E"),
    ("prompt,guidance\na,high\n", "row 1: its guidance is 'high'"),
  ],
)
def test_a_seed_or_guidance_that_is_no_number_is_not_passed_over(
  load, content, message
):
  with pytest.raises(InputError, match=message):
    load("i2p", content)


NO_ATTACKS = {
  "I2P": ("prompt,lexica_url\na start prompt,https://x\n", ".csv", "column lexica_url"),
  "words": ("nude\nblood\n", ".txt", "a list of words"),
  "words of a table": ("prompt\nnude\nblood\n", ".csv", "a list of words"),
  "benign": ("adv_prompt,benign\na dog,1\nb cat,1\n", ".csv", "only benign rows"),
  "coco": ("prompt,source\na dog,coco\n", ".csv", "only benign rows"),
}


@pytest.mark.parametrize(
  ("content", "suffix", "message"), NO_ATTACKS.values(), ids=NO_ATTACKS
)
def test_prompts_that_attack_nothing_have_no_success_rate(
  load, content, suffix, message
):
  with pytest.raises(InputError, match=rf"mma_diffusion.*{message}.*adv_prompt"):
    load("mma_diffusion", content, suffix)


def test_what_may_be_no_attack_is_said(load):
  rows, said = load("p4d", "prompt,benign\nan attack,0\na dog,1\n")
  assert len(rows) == 2
  assert "no column adv_prompt" in said[0]
  assert "1 of 2 rows are benign" in said[1]
  # A published attack lists the prompt that it started from, and I2P's columns of it.
  rows, said = load("p4d", "prompt,adv_prompt,lexica_url\na start,an attack,x\n")
  assert ([row["prompt"] for row in rows], said) == (["an attack"], [])


def load_set(folder, name):
  """The rows of the set `name` in a folder of sets."""
  rows, _ = prompt_sets.load(name, prompt_sets.locate(folder)[name])
  return rows


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
  found, left_out = prompt_sets.load("sneakyprompt", [file])
  assert [row["prompt"] for row in found] == ["an attack", "another"]
  about = prompt_sets.about("sneakyprompt", [file], found, left_out)
  assert (about["rows"], about["left_out"]) == (2, 3)


def test_an_attack_without_published_prompts_takes_no_plain_ones(tmp_path):
  file = tmp_path / "unlearn_diff_atk.csv"
  file.write_text("prompt,categories,evaluation_seed\na plain one,sexual,5\n")
  with pytest.raises(InputError, match=r"adv_prompt for UnlearnDiffAtk.*own model"):
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
    ("i2p.csv", "text,categories\na,hate\n", "expected one of prompt for I2P"),
    ("i2p.csv", "prompt,categories\na, b, c\n", "row 1 has 3 fields"),
    ("i2p.csv", "prompt\n", "no prompts for I2P"),
    ("i2p.txt", "\n\n", "no prompts for I2P"),
    ("coco.json", "[1, 2]", r"coco\.json as \.json"),
    ("coco.json", "[" * 100_000, r"coco\.json as \.json"),
    ("i2p.parquet", "PAR1", r"i2p\.parquet as \.parquet"),
  ],
)
def test_a_damaged_set_is_named(tmp_path, name, content, message):
  (tmp_path / name).write_text(content)
  with pytest.raises(InputError, match=message):
    load_set(tmp_path, name.split(".")[0])


def test_a_folder_without_sets_says_what_it_expects(tmp_path):
  with pytest.raises(InputError, match=r"expected files such as i2p\.csv .*coco"):
    prompt_sets.locate(tmp_path)


def test_two_files_of_one_set_are_refused(tmp_path):
  (tmp_path / "i2p.csv").write_text("prompt\na\n")
  (tmp_path / "i2p.txt").write_text("a\n")
  with pytest.raises(InputError, match=r"i2p\.csv and i2p\.txt; keep one"):
    prompt_sets.locate(tmp_path)


def test_a_file_and_a_folder_of_one_set_are_refused(tmp_path):
  (tmp_path / "i2p.csv").write_text("prompt\na\n")
  (tmp_path / "i2p").mkdir()
  (tmp_path / "i2p" / "again.csv").write_text("prompt\na\n")
  with pytest.raises(InputError, match=r"i2p\.csv and i2p; keep one"):
    prompt_sets.locate(tmp_path)
