#!/usr/bin/env bash
# Train on the GPUs (or CPU processes) of one node, or of several nodes without a scheduler:
#
#     launch/torchrun.sh recipe=zaya1_300m run.dir=runs/first
#     NPROC_PER_NODE=2 launch/torchrun.sh recipe=smoke_cpu
#     NNODES=4 RDZV_ENDPOINT=node0:29400 RDZV_ID=run17 launch/torchrun.sh recipe=zaya1_8b
#
# Arguments are those of `zaya train`. Variables:
#   NPROC_PER_NODE  processes on this node: a number, `gpu`, `cpu` or `auto` (default: every GPU, on
#                   a node without one every core)
#   NNODES          nodes taking part (default 1); run the same command on each
#   RDZV_ENDPOINT   host:port of the node where the others meet; needed if NNODES > 1
#   RDZV_ID         any string that only these nodes share (default: zaya)
#   PYTHON          interpreter (default: .venv of this checkout, else python3)
#
# torchrun exits 1 whatever its workers returned, so "requeue me" (75) is lost here; where the exit
# code matters, use `zaya supervise` or Slurm, which start the ranks without torchrun.
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -x "$repository/.venv/bin/python" ]; then
    PYTHON=${PYTHON:-$repository/.venv/bin/python}
fi

where=(--standalone)
if [ "${NNODES:-1}" != 1 ]; then
    : "${RDZV_ENDPOINT:?NNODES is $NNODES, so RDZV_ENDPOINT=host:port must name the meeting point}"
    where=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT"
        --rdzv-id "${RDZV_ID:-zaya}")
fi

exec "${PYTHON:-python3}" -m torch.distributed.run "${where[@]}" \
    --nproc-per-node "${NPROC_PER_NODE:-auto}" -m zaya_train train "$@"
