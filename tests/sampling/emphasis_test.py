"""A prompt's weights are those of AUTOMATIC1111's web UI, and its other syntax is not
passed over."""

import time

import pytest

from safetydpo_jax.errors import InputError
from safetydpo_jax.sampling import emphasis
from tests.support import webui_twin

# The examples of the web UI's own documentation.
PUBLISHED = {
  "normal text": [("normal text", 1.0)],
  "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
  "(unbalanced": [("unbalanced", 1.1)],
  r"\(literal\]": [("(literal]", 1.0)],
  "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
  "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
    ("a ", 1.0),
    ("house", 1.5730000000000004),
    (" ", 1.1),
    ("on", 1.0),
    (" a ", 1.1),
    ("hill", 0.55),
    (", sun, ", 1.1),
    ("sky", 1.4641000000000006),
    (".", 1.1),
  ],
  "": [("", 1.0)],
  "red BREAK\n blue": [("red", 1.0), ("BREAK", -1.0), ("blue", 1.0)],
  "red BREAK  BREAK": [
    ("red", 1.0),
    ("BREAK", -1.0),
    ("", 1.0),
    ("BREAK", -1.0),
    ("", 1.0),
  ],
  "(red BREAK blue)": [("red", 1.1), ("BREAK", -1.1), ("blue", 1.1)],
  "a:b) ]": [("a:b) ]", 1.0)],
}


@pytest.mark.parametrize("prompt", PUBLISHED)
def test_published_examples(prompt):
  assert emphasis.parse(prompt) == PUBLISHED[prompt]


def test_any_prompt_is_read_as_by_the_twin():
  """To the last digit, and up to pieces without text."""
  prompts = webui_twin.random_prompts(2000)
  for prompt in prompts:
    found = []
    for piece, weight in emphasis.parse(prompt):
      if (piece, weight) == emphasis.BREAK:
        found.append((webui_twin.BREAK, 1.0))
      elif (
        piece and found and found[-1][1] == weight and webui_twin.BREAK not in found[-1]
      ):
        found[-1] = (found[-1][0] + piece, weight)
      elif piece:
        found.append((piece, weight))
    assert found == webui_twin.parse(prompt), prompt
  assert sum("BREAK" in prompt for prompt in prompts) > 100


@pytest.mark.parametrize(
  ("prompt", "message"),
  [
    ("a [cat:dog:0.5]", "from:to:when"),
    ("a [[[cat]]: 3 ]", "from:to:when"),
    ("a [cat|dog|]", r"\[a\|b\]"),
    ("a cat AND a dog", "AND"),
    ("a cat <lora:cat:0.7>", "--lora"),
    ("a cat # and a dog", "comment"),
    ("(" * 101 + "cat", "more than 100 brackets"),
    ("[cat" * 101, "more than 100 brackets"),
    ("a (cat:1000001)", "'1000001' is not a weight; expected a number up to 1,000,000"),
    ("a (cat:-1000001)", "is not a weight"),
    ("a (cat:1.2.3)", r"'1\.2\.3' is not a weight"),
    ("a (cat:" + "9" * 400 + ")", "is not a weight"),
    ("a ((cat:99999):99999)", r"'9999800001\.0' is not a weight"),
  ],
)
def test_what_is_not_read_is_refused(prompt, message):
  with pytest.raises(InputError, match=message):
    emphasis.check(prompt)


@pytest.mark.parametrize(
  "prompt", [r"a \[cat:dog:0.5\]", "[cat] | [dog]", "a [cat: dog]", "SAND, 3:2]", "<3"]
)
def test_what_only_looks_like_it_is_text(prompt):
  emphasis.check(prompt)


def test_a_negative_prompt_is_not_composed():
  emphasis.check("a cat AND a dog", negative=True)
  with pytest.raises(InputError, match="from:to:when"):
    emphasis.check("[cat:3]", negative=True)


@pytest.mark.parametrize(
  "prompt", ["a" + " " * 10**5, "BREAK" + " " * 10**5 + "a BREAK", ":" + "1" * 10**5]
)
def test_a_long_prompt_is_read_in_a_moment(prompt):
  start = time.perf_counter()
  emphasis.check(prompt)
  assert time.perf_counter() - start < 5, "it takes as long as the square of its length"
