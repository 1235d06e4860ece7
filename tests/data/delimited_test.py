"""Text tables as people save them: encodings, delimiters, quotes, or a clear no."""

import csv
import io

import pytest

from safetydpo_jax.data import delimited
from safetydpo_jax.errors import InputError

ROWS = [["a cat, “sitting”", "1"], ["a dog\nand a bone", "2"], ['the "red" one', "3"]]
TEXT = "prompt,seed\n" + "".join(
  '"{}",{}\n'.format(text.replace('"', '""'), seed) for text, seed in ROWS
)


@pytest.fixture
def read(tmp_path):
  def read(content, name="p.csv"):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return delimited.read(file, "prompts CSV", lambda column: column == "prompt")

  return read


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_mark_at_the_beginning_says_the_encoding(read, encoding):
  table = read(TEXT.encode(encoding))
  assert (table.columns, table.rows, table.notes) == (["prompt", "seed"], ROWS, ())


@pytest.mark.parametrize(
  "content", [TEXT.encode("cp1252"), TEXT.encode("utf-16-le"), b"prompt\n\xff\n"]
)
def test_another_encoding_is_refused_with_what_to_do(read, content):
  with pytest.raises(InputError, match=r"p\.csv as a prompts CSV.*save it as UTF-8"):
    read(content)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_rows_end_as_on_any_system(read, end):
  assert read(end.join(["prompt,seed", "a,1", "b,2"])).rows == [["a", "1"], ["b", "2"]]


@pytest.mark.parametrize(
  ("delimiter", "name", "note"),
  [
    (",", "p.csv", ()),
    ("\t", "p.tsv", ()),
    (";", "p.csv", ("semicolons",)),
    ("\t", "p.csv", ("tabs",)),
    (",", "p.tsv", ("commas",)),
  ],
)
def test_the_delimiter_is_the_one_that_finds_the_column(
  read, tmp_path, delimiter, name, note
):
  content = io.StringIO()
  csv.writer(content, delimiter=delimiter).writerows([["prompt", "seed"], *ROWS])
  table = read(content.getvalue(), name)
  assert (table.columns, table.rows) == (["prompt", "seed"], ROWS)
  said = [f"{tmp_path / name}: fields are separated by {text}" for text in note]
  assert list(table.notes) == said


def test_a_header_with_two_delimiters_is_not_guessed(read):
  assert read("prompt;image,seed\na;b,c\n").columns == ["prompt;image", "seed"]
  assert read("prompt\na; b\n").rows == [["a; b"]]


def test_a_space_after_the_comma_belongs_to_the_comma(read):
  table = read('prompt, "seed", x\n" a, b", 1,"y"\n')
  assert table.columns == ["prompt", "seed", "x"]
  assert table.rows == [[" a, b", "1", "y"]]
  assert read("prompt,seed \n a, 1\n").rows == [[" a", " 1"]], "the header has none"


def test_cells_are_text_whatever_they_look_like(read):
  words = ["Null", "NA", "nan", "None", "1.0", "TRUE", "=1+1", "#N/A"]
  assert read("\n".join(["prompt", *words])).rows == [[word] for word in words]


LONG = "x" * 131_073
WRONG = {
  "never closed": ('prompt,seed\na,1\n"b,2\nc,3\n', "row 2 .line 3.*never closed"),
  "closed later": ('prompt,seed\n"a,1\nb,2\n"c",3\n', "row 1 .line 2.*closing quote"),
  "after lines": ('prompt\n"a\nb"\n\n"c\n', "row 2 .line 5.*never closed"),
  "in the header": ('"prompt,seed\na,1\n', "the header cannot be read"),
  "a long cell": (f"prompt\na\n{LONG}\n", "row 2 .*131,072 characters"),
  "a return": ("prompt\na\nb\rc\n", "row 2 .line 3.*carriage return"),
  "too many": ("prompt,seed\na,1\nb, c,2\n", "row 2 has 3 fields and the header 2;"),
}


@pytest.mark.parametrize(("content", "message"), WRONG.values(), ids=WRONG)
def test_a_row_that_cannot_be_read_is_named(read, content, message):
  with pytest.raises(InputError, match=message):
    read(content)


def test_a_return_within_quotes_is_kept(read):
  assert read('prompt,seed\n"a\rb",1\n').rows == [["a\rb", "1"]]
