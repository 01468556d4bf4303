#!/usr/bin/env bash
# The demo over ranks that torchrun starts, one for each GPU of this machine:
#
#   launch/torchrun.sh 8 --checkpoint /models/DeepSeek-R1-NVFP4 --layer 3 --tokens 1024
#
# In an environment that has megamoe_ep, as .venv after launch/demo.
#
# For a program of your own, put it in place of "-m megamoe_ep.cli demo"; in it,
# Group.from_environment() finds the ranks, as does Group.of(torch.distributed.group.WORLD).
set -euo pipefail

ranks=${1:-}
if ! [[ $ranks =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/torchrun.sh RANKS [ARGUMENTS OF megamoe-ep demo]" >&2
  exit 2
fi
shift

exec torchrun --standalone --nproc-per-node "$ranks" -m megamoe_ep.cli demo "$@"
