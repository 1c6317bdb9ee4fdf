#!/usr/bin/env bash
# Train on the GPUs (or CPU processes) of one node, or of several nodes without a scheduler:
#
#     launch/torchrun.sh recipe=zaya1_300m run.dir=runs/first
#     NPROC_PER_NODE=2 launch/torchrun.sh recipe=smoke_cpu
#     NNODES=4 RDZV_ENDPOINT=node0:29400 RDZV_ID=run17 launch/torchrun.sh recipe=zaya1_8b
#     launch/torchrun.sh preflight --directory /shared/runs
#
# Arguments are those of `zaya train`; a first word `train` or `preflight` chooses the command. The
# exit code is that of the ranks (torchrun's own is 1 whatever they returned): 0 done, 75 stopped at a
# checkpoint, to be started again; docs/cluster.md has the others. USR1 and TERM make the ranks of
# this node, and through them all ranks, save and stop. Variables:
#   NPROC_PER_NODE  processes on this node: a number, `gpu`, `cpu` or `auto` (default: every GPU, on
#                   a node without one every core)
#   NNODES          nodes taking part (default 1); run the same command on each
#   RDZV_ENDPOINT   host:port of the node where the others meet; needed if NNODES > 1
#   RDZV_ID         any string that only these nodes share (default: zaya)
#   CLUSTER         table of the ranks' environment, a file of launch/env (default: mi300x where there
#                   is ROCm, else none)
#   PYTHON          interpreter (default: .venv of this checkout, else python3)
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -x "$repository/.venv/bin/python" ]; then
    PYTHON=${PYTHON:-$repository/.venv/bin/python}
fi

if [ -d /opt/rocm ]; then CLUSTER=${CLUSTER:-mi300x}; fi
if [ -n "${CLUSTER:-}" ]; then
    # The same variables as in a job of `zaya submit cluster=...`.
    # shellcheck source=launch/env/mi300x.sh disable=SC1091
    . "$repository/launch/env/$CLUSTER.sh"
fi

where=(--standalone)
if [ "${NNODES:-1}" != 1 ]; then
    : "${RDZV_ENDPOINT:?NNODES is $NNODES, so RDZV_ENDPOINT=host:port must name the meeting point}"
    where=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT"
        --rdzv-id "${RDZV_ID:-zaya}")
fi

case ${1:-} in train | preflight) ;; *) set -- train "$@" ;; esac

# Every rank leaves its process id and its exit code here.
state=$(mktemp -d)
trap 'rm -rf "$state"' EXIT

# The variables in single quotes are for the shell of each rank. It hands signals on, because torchrun
# knows this shell as the rank; what reaches a rank before it listens ends it, which loses nothing. (Not
# $$, which torchrun makes $ of.)
# shellcheck disable=SC2016
rank='
    trap "kill -USR1 \$child 2>/dev/null" USR1 TERM
    "$@" &
    child=$!
    echo "$BASHPID" >"$state/pid-$RANK"
    while kill -0 "$child" 2>/dev/null; do wait "$child"; done
    wait "$child"
    code=$?
    echo "$code" >"$state/code-$RANK"
    exit "$code"
'
export state

"${PYTHON:-python3}" -m torch.distributed.run "${where[@]}" \
    --nproc-per-node "${NPROC_PER_NODE:-auto}" --no-python \
    bash -c "$rank" rank "${PYTHON:-python3}" -m zaya_train "$@" &
launcher=$!
# torchrun itself would end its ranks on a signal, after 30 s by force: it never hears of it.
# shellcheck disable=SC2329 # by the trap below
hand_on() {
    local file
    for file in "$state"/pid-*; do
        [ ! -e "$file" ] || kill -USR1 "$(cat "$file")" 2>/dev/null || true
    done
}
trap hand_on USR1 TERM
status=0
while kill -0 "$launcher" 2>/dev/null; do wait "$launcher" || true; done
wait "$launcher" || status=$?

# As srun does: the highest exit code of the ranks. Where a rank left none, torchrun's own counts too.
codes=0
for file in "$state"/code-*; do
    [ -e "$file" ] || continue
    code=$(cat "$file")
    codes=$((code > codes ? code : codes))
done
[ "$codes" -eq 0 ] || status=$codes
exit "$status"
