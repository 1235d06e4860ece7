"""Prompt CSVs as people have them, and those that would go wrong quietly."""

import csv

import pytest

from safetydpo_jax.data.prompts import check_written, read_prompts, read_table
from safetydpo_jax.errors import InputError

QUIRK = 'a "quoted", comma’d ~ prompt\nwith a second line'


@pytest.fixture
def read(tmp_path):
  def read(columns, *rows, encoding="utf-8"):
    with open(tmp_path / "p.csv", "w", newline="", encoding=encoding) as file:
      csv.writer(file).writerows([columns, *rows])
    return read_prompts(tmp_path / "p.csv", tmp_path / "out")

  return read


def test_a_prompt_is_enough(read, tmp_path):
  rows = read(["prompt"], [QUIRK], ["a dog"])
  assert [row.prompt for row in rows] == [QUIRK, "a dog"]
  assert [row.seed for row in rows] == [0, 1]
  out = (tmp_path / "out").resolve()
  assert [row.file for row in rows] == [out / "0000000_0.png", out / "0000001_0.png"]


def test_coprov2_columns_name_the_image_and_the_seed(read):
  columns = ["prompt", "image", "category", "evaluation_seed", "case_number"]
  (row,) = read(columns, [QUIRK, "part/0000007_0.jpg", "Harrasment", "4068484390", "7"])
  assert (row.file.name, row.file.parent.name) == ("0000007_0.jpg", "part")
  assert (row.prompt, row.seed, row.number) == (QUIRK, 4068484390, 0)


def test_a_row_may_have_its_own_guidance_and_negative_prompt(read):
  columns = ["prompt", "evaluation_guidance", "negative_prompt"]
  first, second = read(columns, ["x", "7.5", "blur"], ["y", "", ""])
  assert (first.guidance, first.negative_prompt) == (7.5, "blur")
  assert (second.guidance, second.negative_prompt) == (None, None)


@pytest.mark.parametrize("text", ["strong", "nan", "inf", "7,5", "7_5"])
def test_a_guidance_that_is_no_number_is_refused(read, text):
  with pytest.raises(
    InputError, match=f"row 1: evaluation_guidance is '{text}'.* finite"
  ):
    read(["prompt", "evaluation_guidance"], ["x", text])


def test_i2p_as_published_is_read(read):
  columns = ["prompt", "categories", "sd_seed", "sd_guidance_scale", "sd_model"]
  (row,) = read(columns, ["x", "hate, violence", "4261553411", "13", "v1-4"])
  assert (row.seed, row.guidance) == (4261553411, 13.0)


def test_a_space_after_each_comma_loses_nothing(read, tmp_path):
  (tmp_path / "s.csv").write_text(
    "prompt, image, evaluation_seed, evaluation_guidance\na, x.png, 5, 3.5\n"
  )
  (row,) = read_prompts(tmp_path / "s.csv", tmp_path)
  assert (row.prompt, row.file.name, row.seed, row.guidance) == ("a", "x.png", 5, 3.5)


@pytest.mark.parametrize("word", ["Null", "NA", "nan", "None"])
def test_a_word_that_looks_like_nothing_is_a_prompt(read, word):
  (row,) = read(["prompt", "negative_prompt"], [word, word])
  assert (row.prompt, row.negative_prompt) == (word, word)


def test_two_columns_that_contradict_each_other_are_refused(read):
  with pytest.raises(InputError, match=r"row 2: evaluation_seed is .1. and sd_seed"):
    read(["prompt", "evaluation_seed", "sd_seed"], ["x", "3", "3.0"], ["y", "1", "2"])


def test_a_wrong_cell_is_named_by_its_own_column(read):
  with pytest.raises(InputError, match=r"row 1: SD seed is .one"):
    read(["prompt", "SD seed"], ["x", "one"])


def test_columns_that_are_not_read_are_in_the_notes(tmp_path):
  (tmp_path / "p.csv").write_text("prompt,category,widht\na,hate,8\n")
  (note,) = read_table(tmp_path / "p.csv").notes
  assert note.endswith("columns not read: widht")


def test_an_empty_cell_falls_back_to_the_default(read):
  (row,) = read(["prompt", "image", "evaluation_seed"], ["", "", " "])
  assert (row.prompt, row.file.name, row.seed) == ("", "0000000_0.png", 0)


def test_excel_marks_the_beginning_of_a_file(read):
  (row,) = read(["prompt", "image"], ["x", "x.png"], encoding="utf-8-sig")
  assert row.prompt == "x"


@pytest.mark.parametrize(
  ("text", "seed"),
  [("-1", -1), (str(2**64 - 1), 2**64 - 1), ("12.0", 12), (" 3 ", 3), ("4.", 4)],
)
def test_seeds_are_those_that_pytorch_takes(read, text, seed):
  assert read(["prompt", "evaluation_seed"], ["x", text])[0].seed == seed


@pytest.mark.parametrize(
  "text", ["1.5", "one", "nan", "1e3", "4.26E+09", "1_0", str(2**64), str(-(2**63) - 1)]
)
def test_other_seeds_are_refused(read, text):
  with pytest.raises(InputError, match=r"row 2: evaluation_seed is .* whole number"):
    read(["prompt", "evaluation_seed"], ["x", "1"], ["y", text])


@pytest.mark.parametrize("name", ["../x.png", "a/../../x.png", "/tmp/x.png", ".", "/"])
def test_an_image_stays_in_the_out_folder(read, name):
  with pytest.raises(InputError, match=r"row 1: image .*(is outside|is not a .png)"):
    read(["prompt", "image"], ["x", name])


def test_images_made_elsewhere_may_have_formats_that_are_not_written(read, tmp_path):
  (row,) = read(["prompt", "image"], ["x", "x.WebP"])
  assert row.file.name == "x.WebP"
  with pytest.raises(InputError, match=r"row 1: image 'x.WebP' is not a .png or .jpg"):
    check_written(read_table(tmp_path / "p.csv"))


@pytest.mark.parametrize("name", ["a\0.png", "é" * 120 + ".png", "x" * 250 + "/x.png"])
def test_a_name_that_no_file_can_have_is_refused_before_anything_is_rendered(
  read, name
):
  with pytest.raises(InputError, match=r"row 1: image .* 240 bytes"):
    read(["prompt", "image"], ["x", name])


def test_a_link_does_not_lead_out_of_the_out_folder(read, tmp_path):
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "link").symlink_to(tmp_path)
  (tmp_path / "out" / "x.png").symlink_to(tmp_path / "x.png")
  for name in ("link/x.png", "x.png"):
    with pytest.raises(InputError, match="is outside the folder of images"):
      read(["prompt", "image"], ["x", name])


def test_a_folder_beside_the_out_folder_with_its_name_as_prefix_is_outside(read):
  with pytest.raises(InputError, match="is outside the folder of images"):
    read(["prompt", "image"], ["x", "../out2/x.png"])


def test_a_pair_under_two_categories_is_one_image(read):
  columns = ["prompt", "image", "category"]
  rows = read(columns, ["x", "x.png", "Hate"], ["y", "y.png"], ["x", "x.png", "sexual"])
  assert rows[2] == rows[0]
  assert rows[1].number == 1


@pytest.mark.parametrize(
  ("column", "one", "other"),
  [
    ("evaluation_seed", "1", "2"),
    ("evaluation_seed", "0", ""),
    ("guidance", "7.5", "3"),
    ("negative_prompt", "", "blur"),
  ],
)
def test_rows_of_one_image_do_not_contradict_each_other(read, column, one, other):
  columns = ["prompt", "image", column]
  same = read(columns, ["x", "x.png", one], ["x", "x.png", one])
  assert same[0] == same[1]
  with pytest.raises(
    InputError, match=r"row 2: image .x\.png. belongs to row 1, which"
  ):
    read(columns, ["x", "x.png", one], ["x", "x.png", other])


def test_two_prompts_for_one_image_are_refused(read):
  with pytest.raises(InputError, match=r"row 3: image './x.png' belongs to row 1"):
    read(["prompt", "image"], ["x", "x.png"], ["y", "y.png"], ["z", "./x.png"])


WRONG = {
  "empty": ("", "no column `prompt`; .*empty"),
  "header alone": ("prompt\n", "no rows below its header"),
  "other columns": ("text,image\nx,x.png\n", "no column `prompt`; .*text, image"),
  "comma not quoted": ("prompt\na cat, a dog\n", "row 1 has 2 fields"),
  "prompt missing": (
    "image,prompt\nx.png,x\ny.png\n",
    "row 2 has 1 of .* 2 fields",
  ),
  "no picture": ("prompt,image\nx,x.exe\n", "'x.exe' is not a .png or .jpg"),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_csv_is_named(text, message, tmp_path):
  (tmp_path / "p.csv").write_text(text)
  with pytest.raises(InputError, match=message) as error:
    read_prompts(tmp_path / "p.csv", tmp_path)
  assert str(tmp_path / "p.csv") in str(error.value)


def test_what_is_no_csv_is_named(tmp_path):
  (tmp_path / "p.csv").write_bytes(b"prompt\n\xff\xfe\x00")
  for file in (tmp_path / "p.csv", tmp_path / "nothing.csv", tmp_path):
    with pytest.raises(InputError, match="as a prompts CSV"):
      read_prompts(file, tmp_path)
