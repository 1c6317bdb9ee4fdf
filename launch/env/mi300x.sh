# shellcheck shell=sh
# Environment for nodes with MI300X and its siblings; source it before torchrun or srun:
#
#     . launch/env/mi300x.sh
#
# Every variable states its reason. None of them changes numerics. A value already set wins, so a
# site can override any of them. Values are those of AMD's guide "Instinct MI300X workload
# optimization" (ROCm documentation) unless another source is named; not yet measured by us.

# Kernel arguments are written straight to device memory: less latency per launch.
export HIP_FORCE_DEV_KERNARG="${HIP_FORCE_DEV_KERNARG:-1}"

# More channels, hence more compute units moving data, per RCCL collective than by default.
export NCCL_MIN_NCHANNELS="${NCCL_MIN_NCHANNELS:-112}"

# Matrix products through hipBLASLt rather than rocBLAS.
export TORCH_BLAS_PREFER_HIPBLASLT="${TORCH_BLAS_PREFER_HIPBLASLT:-1}"

# Collectives get a high-priority stream, so that they overlap with compute instead of queueing.
export TORCH_NCCL_HIGH_PRIORITY="${TORCH_NCCL_HIGH_PRIORITY:-1}"

# Two hardware queues, compute and communication; with more the two streams contend.
export GPU_MAX_HW_QUEUES="${GPU_MAX_HW_QUEUES:-2}"

# One thread per rank for the few CPU kernels of a GPU run; torch's default, all cores per rank,
# makes eight ranks fight. `runtime.threads` decides for CPU runs.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Left alone on purpose:
#   HSA_NO_SCRATCH_RECLAIM        works round RCCL memory reclaim with MEC firmware below 177 only;
#                                 set it where `rocm-smi --showfw` shows older firmware
#   NCCL_LAUNCH_ORDER_IMPLICIT    recommended against FSDP deadlocks with two communicators
#                                 (ROCm/rccl#2191), but segfaults in another build (ROCm/aorta#512)
#   TRITON_HIP_USE_ASYNC_COPY     on gfx942 it splits 16-byte loads into 4-byte ones and doubles LDS
#   NCCL_ALGO                     pinning it is for bit-for-bit comparisons, not for speed

# The kernel's automatic NUMA balancing moves pages under the GPU's feet.
if [ "$(cat /proc/sys/kernel/numa_balancing 2>/dev/null || echo 0)" != 0 ]; then
    echo "mi300x.sh: NUMA balancing is on; as root: sysctl kernel.numa_balancing=0" >&2
fi
