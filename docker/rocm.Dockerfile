# zaya-train on AMD GPUs. From the root of the checkout:
#
#   docker build -f docker/rocm.Dockerfile -t zaya-train:rocm .
#   docker run --rm -it --device /dev/kfd --device /dev/dri --group-add video --group-add render \
#       --ipc host --ulimit memlock=-1 --security-opt seccomp=unconfined zaya-train:rocm
#
# Pins and their reasons: docker/pins.md. The set-up is that of the checkout: `make setup` sees
# /opt/rocm and takes torch from the ROCm index.
ARG ROCM_IMAGE=rocm/dev-ubuntu-24.04:7.2.4
FROM ${ROCM_IMAGE}

# Python 3.12 and a C compiler are Ubuntu's; ibverbs lets RCCL use RDMA between nodes.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        build-essential git ibverbs-providers libibverbs1 make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/zaya-train
COPY . .
RUN make setup && .venv/bin/python -m pip cache purge

ENV PATH=/opt/zaya-train/.venv/bin:${PATH}
# The variables of launch/env/mi300x.sh, in any shell of the container.
ENTRYPOINT ["/bin/sh", "-c", ". /opt/zaya-train/launch/env/mi300x.sh && exec \"$@\"", "zaya"]
CMD ["bash"]
