# zaya-train on AMD GPUs. From the root of the checkout:
#
#   docker build -f docker/rocm.Dockerfile -t zaya-train:rocm .
#   docker run --rm -it --device /dev/kfd --device /dev/dri --device /dev/infiniband --network host \
#       --group-add video --group-add render --ipc host --ulimit memlock=-1 \
#       --security-opt seccomp=unconfined zaya-train:rocm
#
# With Transformer Engine and FlashAttention besides (optional back ends, compiled: an hour or so):
#
#   docker build -f docker/rocm.Dockerfile --build-arg EXTRAS=te -t zaya-train:rocm-te .
#
# For Slurm: apptainer build zaya-train.sif docker-daemon://zaya-train:rocm (docs/cluster.md).
#
# Pins and their reasons: docker/pins.md. The set-up is that of the checkout: `make setup` sees
# /opt/rocm and takes torch from the ROCm index.
ARG ROCM_IMAGE=rocm/dev-ubuntu-24.04:7.2.4
ARG ROCM_BUILD_IMAGE=rocm/dev-ubuntu-24.04:7.2.4-complete
ARG EXTRAS=none

# What both variants install; they differ in the image below it.
FROM ${ROCM_IMAGE} AS image-none
FROM ${ROCM_BUILD_IMAGE} AS image-te

# hadolint ignore=DL3006 # one of the two stages above, whose tags are pinned
FROM image-${EXTRAS} AS train
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# Python 3.12 and a C compiler are Ubuntu's; ibverbs lets RCCL use RDMA between nodes.
# hadolint ignore=DL3008 # Ubuntu removes old versions from its archive; the image's tag is the pin
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        build-essential git ibverbs-providers libibverbs1 make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/zaya-train
COPY . .
RUN make setup && .venv/bin/python -m pip cache purge
ENV PATH=/opt/zaya-train/.venv/bin:${PATH}

FROM train AS ready-none

FROM train AS ready-te
ARG TE_WHEELS=https://repo.radeon.com/rocm/manylinux/rocm-rel-7.2
ARG TE_VERSION=2.4.0
ARG FLASH_ATTN_VERSION=2.8.3
# The core comes as a wheel, the bindings compile against the torch installed above.
RUN .venv/bin/python -m pip install --no-cache-dir --no-build-isolation \
        "${TE_WHEELS}/transformer_engine_rocm-${TE_VERSION}-py3-none-manylinux_2_28_x86_64.whl" \
        "${TE_WHEELS}/transformer_engine-${TE_VERSION}-py3-none-any.whl" \
        "${TE_WHEELS}/transformer_engine_torch-${TE_VERSION}.tar.gz" \
    && GPU_ARCHS="gfx942;gfx950" .venv/bin/python -m pip install --no-cache-dir \
        --no-build-isolation "flash-attn==${FLASH_ATTN_VERSION}"

# hadolint ignore=DL3006 # one of the two stages above
FROM ready-${EXTRAS}
# The variables of launch/env/mi300x.sh, in any shell of the container, where they are not set yet.
# Under Slurm apptainer and pyxis do not run this: the job script has set those of its own cluster.
ENTRYPOINT ["/bin/sh", "-c", ". /opt/zaya-train/launch/env/mi300x.sh && exec \"$@\"", "zaya"]
CMD ["bash"]
