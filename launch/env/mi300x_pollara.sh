# shellcheck shell=sh
# Environment of cluster=mi300x_pollara, made by `zaya env mi300x_pollara --sh` from
# configs/cluster/mi300x_pollara.yaml. Source it:
#
#     . launch/env/mi300x_pollara.sh

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

# The eight Pollara ports carry collectives, the storage network's adapters do not. [names of the
# ionic driver's devices; `ibv_devices` lists those of a node]
export NCCL_IB_HCA="${NCCL_IB_HCA:-ionic_0,ionic_1,ionic_2,ionic_3,ionic_4,ionic_5,ionic_6,ionic_7}"

# The routable RoCE v2 address of a Pollara port; on other adapters it is often index 3, and with a
# wrong one connections time out. [AMD-AGI/Primus a1c77a5e0065, 03_enable_ainic.sh]
export NCCL_IB_GID_INDEX="${NCCL_IB_GID_INDEX:-1}"

# Traffic class of data, by which the switches choose its queue. [AMD-AGI/Primus a1c77a5e0065,
# 03_enable_ainic.sh; must match the site's switches]
export NCCL_IB_TC="${NCCL_IB_TC:-104}"

# Traffic class of RCCL's small control messages, so that data does not delay them.
# [runner/helpers/envs/enable_ainic.sh, AMD-AGI/Primus 85c51c0da12f, as the other value beside 184;
# must match the site's switches]
export NCCL_IB_FIFO_TC="${NCCL_IB_FIFO_TC:-192}"

# Small control messages travel inside the work request. [AMD-AGI/Primus a1c77a5e0065,
# 03_enable_ainic.sh]
export NCCL_IB_USE_INLINE="${NCCL_IB_USE_INLINE:-1}"

# Completions of receives may be left out by the NIC plug-in, as AMD sets it for these NICs.
# [AMD-AGI/Primus a1c77a5e0065, 03_enable_ainic.sh]
export NET_OPTIONAL_RECV_COMPLETION="${NET_OPTIONAL_RECV_COMPLETION:-1}"

# No read-back after each receive, as AMD sets it for these NICs. [AMD-AGI/Primus a1c77a5e0065,
# 03_enable_ainic.sh]
export NCCL_GDR_FLUSH_DISABLE="${NCCL_GDR_FLUSH_DISABLE:-1}"

# Goes with the variable above, as AMD sets it for these NICs. [AMD-AGI/Primus a1c77a5e0065,
# 03_enable_ainic.sh]
export RCCL_GDR_FLUSH_GPU_MEM_NO_RELAXED_ORDERING="${RCCL_GDR_FLUSH_GPU_MEM_NO_RELAXED_ORDERING:-0}"

# GPU memory is registered with the NIC through peer memory and not through DMA-BUF, as AMD sets it.
# [AMD-AGI/Primus a1c77a5e0065, 03_enable_ainic.sh]
export NCCL_DMABUF_ENABLE="${NCCL_DMABUF_ENABLE:-0}"

# RCCL may place its threads near the NIC wherever the scheduler bound the rank. [AMD-AGI/Primus
# a1c77a5e0065, 03_enable_ainic.sh]
export NCCL_IGNORE_CPU_AFFINITY="${NCCL_IGNORE_CPU_AFFINITY:-1}"

# The kernel's automatic NUMA balancing moves pages under the GPU's feet.
if [ "$(cat /proc/sys/kernel/numa_balancing 2>/dev/null || echo 0)" != 0 ]; then
    echo "mi300x_pollara.sh: NUMA balancing is on; as root: sysctl kernel.numa_balancing=0" >&2
fi
