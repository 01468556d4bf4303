#!/usr/bin/env bash
# The demo over ranks that mpirun of Open MPI starts, one for each GPU of this machine:
#
#   launch/mpirun.sh 8 --checkpoint /models/DeepSeek-R1-NVFP4 --layer 3 --tokens 1024
#
# In an environment that has megamoe_ep, as .venv after launch/demo.
#
# For a program of your own, put it in place of "-m megamoe_ep.cli demo"; in it,
# Group.from_environment() finds the ranks, as does Group.of(MPI.COMM_WORLD) of mpi4py.
set -euo pipefail

ranks=${1:-}
if ! [[ $ranks =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/mpirun.sh RANKS [ARGUMENTS OF megamoe-ep demo]" >&2
  exit 2
fi
shift

# Ranks may outnumber the cores that Open MPI counts, and then must not be pinned to one each.
flags=(--oversubscribe --bind-to none)
if [[ $(id -u) == 0 ]]; then
  flags+=(--allow-run-as-root) # in containers
fi

exec mpirun "${flags[@]}" -n "$ranks" python -m megamoe_ep.cli demo "$@"
