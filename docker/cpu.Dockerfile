# zaya-train without a GPU: tests, data preparation, the smoke run. From the root of the checkout:
#
#   docker build -f docker/cpu.Dockerfile -t zaya-train:cpu .
#   docker run --rm zaya-train:cpu make smoke
#
# Pins and their reasons: docker/pins.md.
ARG CPU_IMAGE=python:3.11-slim-bookworm
FROM ${CPU_IMAGE}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# git: a test reads the list of tracked files. Chromium with a font, iproute2, Slurm, munge and
# strace: tests start them.
# hadolint ignore=DL3008 # Debian removes old versions from its archive; the image's tag is the pin
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential chromium chromium-driver \
        fonts-dejavu-core git iproute2 make munge slurm-wlm strace \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/zaya-train
COPY . .
# Without an index of its own pip would fetch the CUDA build of torch.
RUN make setup TORCH_INDEX="$(sed -n 's/^CPU_TORCH_INDEX=//p' docker/pins.env)" \
    && .venv/bin/python -m pip cache purge

ENV PATH=/opt/zaya-train/.venv/bin:${PATH}
CMD ["bash"]
