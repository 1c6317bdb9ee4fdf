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
# checkpoint, to be started again; docs/cluster.md has the others. USR1, TERM and Ctrl-C make the ranks
# of this node, and through them all ranks, save and stop; a second Ctrl-C ends them at once. Variables:
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

# Every rank leaves its process group and its exit code here, torchrun its exit code.
state=$(mktemp -d)
export state
trap 'rm -rf "$state"' EXIT

# For the shell of each rank, which stays for the exit code. It runs the rank in the foreground, because
# a `wait` that a trapped signal interrupts as the process ends loses the code (bash 5.2). Signals go to
# its whole process group, torchrun's too, so the rank hears them itself; what reaches it before it
# listens ends it, which loses nothing. (Not $$, which torchrun makes $ of.)
# shellcheck disable=SC2016
rank='
    trap : USR1 TERM
    echo "$BASHPID" >"$state/group-$RANK"
    code=75
    if [ ! -e "$state/stop" ]; then
        code=0
        "$@" || code=$?
    fi
    echo "$code" >"$state/code-$RANK"
    exit "$code"
'

# shellcheck disable=SC2329 # by the traps below
hand_on() {
    local file
    # For ranks that are still to come.
    : >"$state/stop"
    for file in "$state"/group-*; do
        [ ! -s "$file" ] || kill "-$1" -- "-$(cat "$file")" 2>/dev/null || true
    done
}
# A rank takes the second INT as somebody's wish to be out at once.
# shellcheck disable=SC2329 # by the trap below
interrupted() { if [ -e "$state/stop" ]; then hand_on INT; else hand_on USR1; fi; }
trap 'hand_on USR1' USR1 TERM
trap interrupted INT

# torchrun itself would end its ranks on a signal, after 30 s by force: it never hears of it, also not
# of a Ctrl-C, which goes to the session.
{
    trap : USR1 TERM
    status=0
    setsid "${PYTHON:-python3}" -m torch.distributed.run "${where[@]}" \
        --nproc-per-node "${NPROC_PER_NODE:-auto}" --no-python \
        bash -c "$rank" rank "${PYTHON:-python3}" -m zaya_train "$@" || status=$?
    echo "$status" >"$state/torchrun"
} &
launcher=$!
while kill -0 "$launcher" 2>/dev/null; do wait "$launcher" || true; done

# torchrun ends all ranks when one fails, so the ranks' codes differ. The one that says most counts.
says() {
    case $1 in
        0) echo 0 ;;
        138 | 143) echo 1 ;; # told to stop before it listened
        75) echo 2 ;;
        2 | 3 | 4 | 5 | 6) echo 4 ;; # to start again would be of no use
        *) echo 3 ;;
    esac
}
result=0
for file in "$state"/code-*; do
    [ -s "$file" ] || continue
    code=$(cat "$file")
    [ "$(says "$code")" -le "$(says "$result")" ] || result=$code
done
[ "$result" -ne 0 ] || result=$(cat "$state/torchrun" 2>/dev/null || echo 1)
exit "$result"
