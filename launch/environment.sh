# Sourced by launch/demo and launch/test: a virtual environment with this package in it, activated.
# bash 4 or later. The environment is the active one or, where none is, .venv of this repository.

torch_version=2.13.0

has_gpu() {
  command -v nvidia-smi > /dev/null && nvidia-smi -L > /dev/null 2>&1
}

# find_python: prints a Python of at least 3.11.
find_python() {
  local candidate
  for candidate in python3 python3.12 python3.13 python3.11 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "Python 3.11 or later is needed, and none is on PATH." >&2
  return 1
}

# enter_environment EXTRAS [PACKAGE...]: installs this package with EXTRAS (as "test,dev"; may be
# empty) and the PACKAGEs, unless that was done before with the same files.
enter_environment() {
  local extras=$1
  shift
  if has_gpu; then
    extras=${extras:+$extras,}cuda
  fi
  if [[ -z ${VIRTUAL_ENV:-} ]]; then
    if [[ ! -x .venv/bin/python ]]; then
      local python options=()
      python=$(find_python)
      # A torch that reaches the GPUs here is taken as it is.
      if has_gpu && "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
        2> /dev/null; then
        options+=(--system-site-packages)
      fi
      "$python" -m venv "${options[@]}" .venv
    fi
    # shellcheck disable=SC1091
    source .venv/bin/activate
  fi

  local stamp=$VIRTUAL_ENV/megamoe_ep.installed key
  # csrc too: with an nvcc and a GPU it is built here.
  key="$(find pyproject.toml CMakeLists.txt launch/environment.sh csrc -type f -exec sha256sum {} + |
    sort | sha256sum) [$extras] $* $PWD"
  if [[ -f $stamp && $(< "$stamp") == "$key" ]]; then
    return
  fi
  if ! python -m pip show --quiet torch 2> /dev/null; then
    local options=()
    if ! has_gpu; then
      # PyPI's torch for Linux brings gigabytes of CUDA. Out of reach of this index pip goes on
      # without it, after a warning. What torch needs is left to the line below.
      options+=(--extra-index-url https://download.pytorch.org/whl/cpu --retries 1 --no-deps)
    fi
    python -m pip install --quiet "${options[@]}" "torch==$torch_version"
  fi
  python -m pip install --quiet --editable ".${extras:+[$extras]}" "$@"
  echo "$key" > "$stamp"
}
