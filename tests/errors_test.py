"""Bad input is one line and exit code 1; our own defects keep their traceback."""

import pytest

from safetydpo_jax.errors import InputError, run_command


def run(error):
  def main():
    if error:
      raise error

  run_command(main)


def test_a_command_that_works_just_returns(capsys):
  run(None)
  assert capsys.readouterr() == ("", "")


def test_bad_input_is_one_line_on_stderr_and_exit_code_1(capsys):
  with pytest.raises(SystemExit) as stopped:
    run(InputError("a.csv:\n  no column\t`prompt`\n\nadd one"))
  assert stopped.value.code == 1
  assert capsys.readouterr() == ("", "error: a.csv: no column `prompt` add one\n")


def test_an_interrupt_exits_as_shells_expect(capsys):
  with pytest.raises(SystemExit) as stopped:
    run(KeyboardInterrupt())
  assert stopped.value.code == 130
  assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), OSError("x")])
def test_a_defect_of_ours_is_not_hidden(error):
  with pytest.raises(type(error)) as raised:
    run(error)
  assert raised.value is error


def test_what_the_system_refuses_is_one_line(tmp_path, capsys):
  with pytest.raises(SystemExit) as stopped:
    run_command(lambda: (tmp_path / ("x" * 300)).stat())
  assert stopped.value.code == 1
  assert "xxx cannot be used: File name too long; choose" in capsys.readouterr().err


def test_a_name_in_a_file_neither_steers_the_terminal_nor_fills_it(capsys):
  with pytest.raises(SystemExit):
    run(InputError(f"no place for \x1b[31m\u202e{'x' * 10**6}; fetch it again"))
  line = capsys.readouterr().err
  assert r"no place for \x1b[31m\u202exx" in line
  assert line.endswith("x; fetch it again\n")
  assert len(line) < 2100
