#!/usr/bin/env bash
# The environment, the quickstart and the tests of lingua_topk; `./setup.sh help` says how.
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null && pwd -P)"
venv="$root/.venv"
python="$venv/bin/python"
constraints=".pins/constraints.txt"

# How the suite runs: two worker processes, one thread each; `./setup.sh test -n 0` has no workers.
# A file's tests stay together, and so have its models trained once; the files stay in their order,
# at whose end are short ones.
test_flags=(-n 2 --dist loadfile --no-loadscope-reorder)
test_threads=1

usage() {
  cat <<'TEXT'
Usage: ./setup.sh [command]

  (none)                      make or update .venv; quick when nothing changed
  quickstart [key=value ...]  set up if needed, then train and compare a TopK model and its twin
  test [pytest arguments]     set up if needed, then run the test suite
  lingua DIR                  set up with all that Meta Lingua imports, and link apps/topk and
                              lingua_topk into the checkout of facebookresearch/lingua in DIR
  help                        show this text

Environment variables
  PYTHON                   the interpreter that .venv is made with, 3.10 to 3.12
                           (default: the first that fits of python3, python3.12, 3.11 and 3.10)
  LINGUA_TOPK_TORCH_INDEX  the package index that torch is taken from when it is first installed
                           (default: pip's own, where torch for Linux brings gigabytes of CUDA;
                           https://download.pytorch.org/whl/cpu has the small build without)
TEXT
}

say() { printf 'setup: %s\n' "$*"; }

die() {
  printf 'setup: %s\n' "$*" >&2
  exit 2
}

# The minor version of an interpreter, "3.11"; nothing for one that does not run.
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }

supported() { [[ "$1" =~ ^3\.1[012]$ ]]; }

choose_python() {
  local candidate version
  if [[ -n "${PYTHON:-}" ]]; then
    version="$(version_of "$PYTHON")"
    supported "$version" ||
      die "PYTHON=$PYTHON is ${version:-no Python that runs}: it must be Python 3.10, 3.11 or 3.12"
    printf '%s' "$PYTHON"
    return
  fi
  for candidate in python3 python3.12 python3.11 python3.10; do
    if supported "$(version_of "$candidate")"; then
      printf '%s' "$candidate"
      return
    fi
  done
  die "no Python 3.10, 3.11 or 3.12 found: install one, or set PYTHON to where it is"
}

# A .venv that runs where it was made is kept, unless PYTHON asks for another version.
make_venv() {
  local base version present
  present="$(version_of "$python")"
  if ! supported "$present" || ! grep -qsF -- "$venv" "$venv/bin/activate"; then present=""; fi
  if [[ -z "${PYTHON:-}" && -n "$present" ]]; then return; fi
  base="$(choose_python)"
  version="$(version_of "$base")"
  if [[ "$version" == "$present" ]]; then return; fi
  [[ ! -L "$venv" ]] || die ".venv is a link, and setup.sh would empty its target: remove the link"
  say "making .venv with Python $version${present:+ in place of Python $present}"
  "$base" -m venv --clear "$venv" || die "'$base -m venv' failed; its own words are above"
}

# What pip says goes to .venv/pip.log; when it fails, the end of that is shown.
pip_install() {
  local log="$venv/pip.log"
  if ! "$python" -m pip install --disable-pip-version-check --no-input --progress-bar off \
    --constraint "$constraints" "$@" >"$log" 2>&1; then
    grep -avE '^(WARNING|Collecting|Requirement already| +(Downloading|Using cached))' -- "$log" |
      tail -n 20 >&2 || true
    die "pip failed; mend what it says above (all of it: .venv/pip.log), then run ./setup.sh again"
  fi
}

# pip itself is pinned too; a .venv that was interrupted early may have none.
install_pip() {
  "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null ||
    die ".venv has no pip and cannot get it: delete .venv, then run ./setup.sh again"
  pip_install pip setuptools
}

install_torch() {
  # One that works stays; the next step sees to its version.
  if "$python" -c 'import torch' 2>/dev/null; then return; fi
  say "installing torch, the largest part"
  if [[ -n "${LINGUA_TOPK_TORCH_INDEX:-}" ]]; then
    # What torch itself needs comes with the rest, from pip's own index.
    pip_install --index-url "$LINGUA_TOPK_TORCH_INDEX" --no-deps torch
    return
  fi
  if [[ "$(uname -s)" == Linux ]] && ! command -v nvidia-smi >/dev/null; then
    say "no NVIDIA GPU seen; './setup.sh help' tells how to get torch without CUDA"
  fi
  pip_install torch
}

# Changes when an installation is out of date.
fingerprint() { { version_of "$python" && cat setup.sh pyproject.toml "$constraints"; } | cksum; }

# So that `python -m lingua.stool` works from here as it does in a checkout. Last on the path:
# a package called lingua that is installed, or a checkout that one works in, comes first; and
# our apps before the host's.
offer_host() {
  "$python" -c 'import sys, sysconfig
with open(sysconfig.get_path("purelib") + "/lingua_topk_host.pth", "w") as file:
    file.write("\n".join(sys.argv[1:]) + "\n")' "$root" "$root/lingua_topk/_host"
}

# ensure EXTRA: .venv holds the project with that extra of pyproject.toml, at the pinned versions.
# The stamp is written last, so an interrupted installation is taken up again.
ensure() {
  local extra="$1" stamp="$venv/.installed-$1"
  make_venv
  cd -- "$root"
  if [[ "$(cat -- "$stamp" 2>/dev/null)" == "$(fingerprint)" ]]; then return; fi
  rm -f -- "$stamp"
  install_pip
  install_torch
  say "installing lingua_topk and the other packages"
  # Editable: importable from every folder, and a change in the code takes effect at once.
  # Without build isolation: the pinned setuptools builds, and nothing more is fetched for it.
  pip_install --no-build-isolation --editable ".[$extra]"
  offer_host
  "$python" -c 'import lingua_topk' ||
    die "lingua_topk does not import; Python's own words are above; to start afresh, delete .venv"
  fingerprint >"$stamp"
  say ".venv is ready"
}

# link_into DIR: our folders become a part of a checkout; nothing that is there gives way.
# lingua_topk too, although it is installed: what stool copies is then all that a job runs.
link_into() {
  local checkout="$1" mark part link
  for mark in lingua/transformer.py apps/main/train.py; do
    [[ -f "$checkout/$mark" ]] ||
      die "'$checkout' is no checkout of facebookresearch/lingua: it has no $mark"
  done
  [[ "$checkout" != "$root"/* ]] || die "'$checkout' lies in this project: give a checkout of Lingua"
  for part in apps/topk lingua_topk; do
    link="$checkout/$part"
    if [[ -L "$link" && "$(readlink -- "$link")" == "$root/$part" ]]; then continue; fi
    [[ ! -e "$link" && ! -L "$link" ]] || die "$link is there already$(
      [[ ! -L "$link" ]] || printf ' (it links to %s)' "$(readlink -- "$link")"
    ): move it, then run this again"
    ln -s -- "$root/$part" "$link"
  done
}

main() {
  local command="${1:-}" checkout
  case "$command" in
    "")
      ensure dev
      say "up to date; next: ./setup.sh quickstart, or ./setup.sh test"
      ;;
    quickstart)
      ensure dev
      exec "$python" -m apps.topk.quickstart "${@:2}"
      ;;
    test)
      ensure dev
      export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$test_threads}"
      exec "$python" -m pytest "${test_flags[@]}" "${@:2}"
      ;;
    lingua)
      [[ $# -eq 2 && -d "${2:-}" ]] ||
        die "give the folder of a checkout of facebookresearch/lingua: ./setup.sh lingua DIR"
      checkout="$(cd -- "$2" && pwd -P)"
      link_into "$checkout"
      ensure lingua
      say "apps/topk and lingua_topk are linked into $checkout; from there: torchrun -m apps.topk.train config=..."
      say "or from here: LINGUA_HOME=$checkout torchrun -m apps.topk.train config=..."
      ;;
    help | -h | --help)
      usage
      ;;
    *)
      die "unknown command '$command'; './setup.sh help' lists the commands"
      ;;
  esac
}

main "$@"
