# Headgate's images: `docker build .` for CPUs, `docker build --target cuda .` for NVIDIA GPUs.
# The steps are deploy/install.sh; `make test-fresh` runs the same steps without Docker.

FROM debian:12-slim AS base
COPY . /opt/headgate
# Everywhere the launcher looks: the port TGI's image has, the hub cache TGI's users mount, the model
# converted at build time.
ENV PORT=80 \
    HUGGINGFACE_HUB_CACHE=/data \
    HEADGATE_CACHE=/opt/headgate/cache \
    PYTHONDONTWRITEBYTECODE=1
EXPOSE 80
ENTRYPOINT ["/opt/headgate/deploy/entrypoint.sh"]

FROM base AS cuda
# The NVIDIA container runtime mounts the driver; everything else of CUDA comes with PyTorch.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN /opt/headgate/deploy/install.sh cuda

FROM base AS cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN TORCH_INDEX=$TORCH_INDEX /opt/headgate/deploy/install.sh cpu
