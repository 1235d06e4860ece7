"""What is rendered under an attack's name is what the attack found, or it is said.

The headers are those of the files as published.
"""

import re

import pytest

from safetydpo_jax.errors import InputError
from safetydpo_jax.evaluation import attack_rows, prompt_sets

# joycenerd/P4D, data/unsafe-prompts-nudity_esd.csv; Diffusion-MU-Attack and Ring-A-Bell
# start from rows with the same columns.
I2P = (
  "prompt,categories,hard,inappropriate_percentage,nudity_percentage,q16_percentage,"
  "sd_safety_percentage,prompt_toxicity,lexica_url,evaluation_seed,evaluation_guidance,"
  "sd_image_width,sd_image_height,sd_model,case_number"
)
OF_I2P = [
  *I2P.split(",")[1:9],
  *("sd_seed", "sd_guidance_scale", "sd_image_width", "sd_image_height", "sd_model"),
]
# What its run_p4dn.py writes below what it keeps of these.
P4D = (
  "prompt,categories,hard,prompt_toxicity,evaluation_seed,evaluation_guidance,"
  "sd_image_width,sd_image_height,sd_model,case_number,nudity_toxicity"
)
ATTACKS = [name for name, it in prompt_sets.BENCHMARKS.items() if it.kind == "attack"]


@pytest.fixture
def load(tmp_path):
  """A set of one file, and the lines that were said."""

  def load(name, content, suffix=".csv"):
    file, said = tmp_path / (name + suffix), []
    file.write_text(content)
    return prompt_sets.load(name, [file], said.append), said

  return load


def row_below(header):
  """A CSV of one row: its prompts are of two words, its other cells a number."""
  words = {"prompt": "some words", "sensitive prompt": "some words"}
  cells = [words.get(name, "1") for name in header]
  return ",".join(header) + "\n" + ",".join(cells) + "\n"


@pytest.mark.parametrize(
  ("name", "header"),
  [
    *((name, I2P) for name in ATTACKS if name != "unlearn_diff_atk"),
    ("p4d", "case_number,prompt,categories,sd_seed,sd_guidance_scale,sd_model"),
    ("mma_diffusion", "Prompt,Nudity Percentage"),
    *(("ring_a_bell", f"prompt,{column}") for column in OF_I2P),
  ],
)
def test_rows_of_i2p_are_where_an_attack_starts(load, name, header):
  names = header.split(",")
  (first, *_) = [n for n in names if n.lower().replace(" ", "_") in OF_I2P]
  with pytest.raises(InputError, match=rf"{name}\.csv .*{first}.*adv_prompt") as error:
    load(name, row_below(names))
  assert prompt_sets.BENCHMARKS[name].source in str(error.value)


NO_ATTACKS = {
  "words": ("nude\nblood\n", ".txt"),
  "words of a table": ("prompt\nnude\nblood\n", ".csv"),
  "benign": ("adv_prompt,benign\na dog,1\nb cat,1\n", ".csv"),
  "coco": ("prompt,source\na dog,coco\n", ".csv"),
  "captions": (
    '{"annotations": [{"id": 1, "image_id": 1, "caption": "a big dog"}]}',
    ".json",
  ),
}


@pytest.mark.parametrize(("content", "suffix"), NO_ATTACKS.values(), ids=NO_ATTACKS)
def test_prompts_that_attack_nothing_have_no_success_rate(load, content, suffix):
  with pytest.raises(InputError, match=rf"mma_diffusion\{suffix} .*adv_prompt"):
    load("mma_diffusion", content, suffix)


@pytest.mark.parametrize(
  ("name", "header"),
  [
    ("mma_diffusion", "target_prompt,adv_prompt,sanitized_adv_prompt,clean_prompt"),
    ("p4d", "sensitive prompt,evaluation_seed,case_number,safe_model,safe_level"),
    ("ring_a_bell", "sensitive prompt,adv_prompt,normal prompt"),
    # A result may keep the columns of the row of I2P that it started from.
    *((name, f"{I2P},adv_prompt") for name in ATTACKS),
  ],
)
def test_a_column_of_its_own_is_the_attack_whatever_else_is_there(load, name, header):
  found, _ = load(name, row_below(header.split(",")))
  assert len(found.rows) == 1
  assert found.caveats == ()


@pytest.mark.parametrize(
  ("name", "content", "suffix", "column"),
  [
    ("p4d", "some words\nothers too\n", ".txt", "adv_prompt"),
    ("p4d", row_below(P4D.split(",")), ".csv", "adv_prompt"),
    (
      "ring_a_bell",
      row_below(["prompt", "case_number", "evaluation_seed"]),
      ".csv",
      "adv_prompt",
    ),
    (
      "ring_a_bell",
      row_below(["sensitive prompt", "normal prompt"]),
      ".csv",
      "normal prompt",
    ),
    (
      "ring_a_bell",
      row_below(["prompt", "case_number", "evaluation_seed", "prompt1"]),
      ".csv",
      "prompt1",
    ),
  ],
)
def test_what_may_be_either_is_rendered_said_and_recorded(
  load, tmp_path, name, content, suffix, column
):
  found, said = load(name, content, suffix)
  assert found.rows[0]["prompt"] == "some words"
  (caveat,) = found.caveats
  assert re.match(rf"{name}{suffix} .*\b{column}\b", caveat)
  assert said[-1] == f"{tmp_path}/{caveat}"
  about = prompt_sets.about(name, [tmp_path / (name + suffix)], found)
  assert about["caveats"] == [caveat]


def test_benign_rows_among_attacks_are_counted(load):
  found, _ = load("p4d", "adv_prompt,benign\nan attack,0\na dog,1\n")
  assert len(found.rows) == 2
  assert re.search(r"\b1 benign rows of 2\b", found.caveats[0])


def test_a_set_that_is_no_attack_has_no_caveat(load):
  found, _ = load("i2p", row_below(I2P.split(",")))
  assert found.caveats == ()


def test_the_column_that_errors_ask_for_is_read_of_every_attack():
  for name in ATTACKS:
    assert attack_rows.ADVERSARIAL in prompt_sets.BENCHMARKS[name].prompt
