# shellcheck shell=sh
# Environment of cluster=mi300x, made by `zaya env mi300x --sh` from
# configs/cluster/mi300x.yaml. Source it:
#
#     . launch/env/mi300x.sh

# Kernel arguments are written straight to device memory, less latency per launch. [AMD, Instinct
# MI300X workload optimization (ROCm documentation)]
export HIP_FORCE_DEV_KERNARG="${HIP_FORCE_DEV_KERNARG:-1}"

# More channels, hence more compute units moving data, per RCCL collective than by default. Sums may
# be taken in another order, so bits may differ. [AMD, Instinct MI300X workload optimization (ROCm
# documentation)]
export NCCL_MIN_NCHANNELS="${NCCL_MIN_NCHANNELS:-112}"

# Matrix products through hipBLASLt rather than rocBLAS, so bits may differ. [AMD, Instinct MI300X
# workload optimization (ROCm documentation)]
export TORCH_BLAS_PREFER_HIPBLASLT="${TORCH_BLAS_PREFER_HIPBLASLT:-1}"

# Collectives get a high-priority stream, so that they overlap with compute instead of queueing.
# [AMD, Instinct MI300X workload optimization (ROCm documentation)]
export TORCH_NCCL_HIGH_PRIORITY="${TORCH_NCCL_HIGH_PRIORITY:-1}"

# Two hardware queues, compute and communication; with more the two streams contend. [AMD, Instinct
# MI300X workload optimization (ROCm documentation)]
export GPU_MAX_HW_QUEUES="${GPU_MAX_HW_QUEUES:-2}"

# Torch's default, all cores per rank, makes eight ranks of a node fight; `runtime.threads` decides
# for CPU runs. [ours]
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Pinned, torch 2.13's own default. Its flight recorder keeps the last collectives of each rank, to
# be dumped when one hangs; 0, an earlier default, turns it off. [torch 2.13, FlightRecorder.hpp,
# where TORCH_NCCL_TRACE_BUFFER_SIZE is the older name]
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"

# The watchdog writes the flight recorder when a collective times out, so that a hang leaves
# evidence. [PyTorch, flight recorder tutorial]
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"

# The kernel's automatic NUMA balancing moves pages under the GPU's feet.
if [ "$(cat /proc/sys/kernel/numa_balancing 2>/dev/null || echo 0)" != 0 ]; then
    echo "mi300x.sh: NUMA balancing is on; as root: sysctl kernel.numa_balancing=0" >&2
fi
