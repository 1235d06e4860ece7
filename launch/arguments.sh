# shellcheck shell=bash
# Sourced by the launchers, for what they have in common:
#
#   launch/X.sh [--dry_run] [OPTION VALUE …] [COMMAND] --config FILE --workdir DIR …
#
# COMMAND is one of safetydpo_jax (train if left out). What is neither --dry_run nor an
# option of the launcher goes to it as it is. A launcher defines
#   options   the names of its options, each also the name of a variable with a default
# and reads its arguments with `read_arguments "$@"`, which sets
#   words     the command and its arguments: python -m safetydpo_jax.train …
# Needs bash 4.4.

dry_run=
options=${options-}

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# The arguments as one line that a shell reads back as the same arguments.
quoted() {
  local line
  printf -v line '%q ' "$@"
  printf '%s' "${line% }"
}

# Prints a command and runs it; with --dry_run prints it.
step() {
  quoted "$@"
  printf '\n'
  [[ -n $dry_run ]] || "$@"
}

usage() {
  sed -n '2,/^$/s/^#\( \|$\)//p' "$0"
}

read_arguments() {
  local command='' name value
  local -a given=()
  while (($#)); do
    name=${1%%=*}
    name=${name#--}
    if [[ $1 == --dry_run ]]; then
      dry_run=1
    elif [[ $1 == --* && ($name == *-* || $name == dry*) ]]; then
      fail "$1 is no option; they are written with _, as --dry_run"
    elif [[ $1 == --help ]]; then
      usage
      exit 0
    elif [[ $1 == --* && " $options " == *" $name "* ]]; then
      if [[ $1 == *=* ]]; then
        value=${1#*=}
      else
        (($# > 1)) || fail "$1 needs a value"
        value=$2
        shift
      fi
      printf -v "$name" '%s' "$value"
    elif [[ -z $command && ${#given[@]} == 0 && $1 =~ ^[a-z_]+$ ]]; then
      [[ -f safetydpo_jax/$1.py ]] ||
        fail "there is no safetydpo_jax/$1.py here; run in the repository's root, with" \
          "train, encode, generate, merge …"
      command=$1
    else
      given+=("$1")
    fi
    shift
  done
  command=${command:-train}
  [[ -f safetydpo_jax/$command.py ]] || fail "run in the repository's root"
  words=(python -m "safetydpo_jax.$command" "${given[@]}")
  [[ ,${do-run}, == *,run,* ]] || return 0
  [[ ${#given[@]} -gt 0 ]] || fail "$command needs its arguments; see --help"
  [[ $command != train || " ${given[*]}" == *" --config"[=\ ]* ]] ||
    fail "train needs --config, for example configs/hate.py:sd15"
}

# Buckets are folders under /mnt/gcs where a program runs: what is written there in
# pieces and renamed (checkpoints, metrics) works as on a disk.
mount_point=/mnt/gcs
mounted() {
  words=("${words[@]//gs:\/\//$mount_point/}")
}
