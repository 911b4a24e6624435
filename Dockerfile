# Targets: serve (gateway, replicas, training, evaluation; CPU), serve-cuda (the same for NVIDIA GPUs), ui, sbom.
#
#   docker build --target serve --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu -t lorafleet:0.1.0-cpu .
#   docker build --target serve-cuda -t lorafleet:0.1.0 .
#   docker build --target ui -t lorafleet-ui:0.1.0 .
#   docker build --target sbom --output out .
#
# No weights are in the images but the embedded base's, emojixl (36 MB). All run as a user without rights, on a root
# filesystem that may be read-only, with /tmp and /var/lib/lorafleet to write to.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

# ---- base: what every target runs on
FROM ${PYTHON_IMAGE} AS base
# KubeRay's probes need bash and wget. Its commands may run in a login shell, which sets PATH anew.
# hadolint ignore=DL3008 # Debian keeps no old versions: a pinned one is gone at its next security update
RUN apt-get update \
    && apt-get install -y --no-install-recommends bash ca-certificates wget \
    && rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log /var/cache/ldconfig/aux-cache \
    && echo "PATH=/opt/lorafleet/bin:\$PATH" >/etc/profile.d/lorafleet.sh \
    && groupadd --gid 1000 lorafleet \
    && useradd --uid 1000 --gid 1000 --no-log-init --create-home --home-dir /var/lib/lorafleet lorafleet
ENV PATH=/opt/lorafleet/bin:$PATH \
    LORAFLEET_HOME=/var/lib/lorafleet \
    HF_HOME=/var/lib/lorafleet/huggingface \
    MPLCONFIGDIR=/tmp/matplotlib \
    TMPDIR=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0
WORKDIR /var/lib/lorafleet

# ---- build: an environment that is copied from here; the layers are thrown away
FROM base AS build
WORKDIR /src
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/lorafleet
COPY pyproject.toml constraints.txt scripts/requirements.py ./

FROM build AS build-serve
# torch alone may need an index of its own, such as https://download.pytorch.org/whl/cpu; empty: pip's own.
ARG TORCH_INDEX_URL=""
# xformers may be added for GPUs: "serve train eval s3 redis otel gpu".
ARG EXTRAS="serve train eval s3 redis otel"
RUN pip install --constraint constraints.txt \
        ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch
# hadolint ignore=SC2086 # EXTRAS is several words
RUN python requirements.py $EXTRAS >requirements.txt \
    && pip install --constraint constraints.txt --requirement requirements.txt
COPY . .
RUN pip install --no-deps . && pip check && pip uninstall --yes pip

FROM build AS build-ui
RUN python requirements.py ui >requirements.txt \
    && pip install --constraint constraints.txt --requirement requirements.txt
COPY . .
RUN pip install --no-deps . && pip check && pip uninstall --yes pip

# ---- sbom: what is in serve, as CycloneDX; `--output out` writes out/lorafleet.cdx.json
FROM build-serve AS build-sbom
ARG CYCLONEDX_VERSION=7.5.0
RUN python -m venv /opt/cyclonedx \
    && /opt/cyclonedx/bin/pip install "cyclonedx-bom==${CYCLONEDX_VERSION}" \
    && /opt/cyclonedx/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
        --output-file /lorafleet.cdx.json /opt/lorafleet/bin/python

FROM scratch AS sbom
COPY --from=build-sbom /lorafleet.cdx.json /

# ---- ui: the web page and the client; no torch, no Ray
FROM base AS ui
COPY --from=build-ui /opt/lorafleet /opt/lorafleet
ENV GRADIO_ANALYTICS_ENABLED=False
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Lorafleet UI" \
      org.opencontainers.image.description="The web page of Lorafleet; speaks HTTP to the service" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
USER 1000:1000
EXPOSE 7860
ENTRYPOINT ["lorafleet"]
CMD ["ui"]

# ---- serve: gateway, replicas, training, evaluation
FROM base AS serve
COPY --from=build-serve /opt/lorafleet /opt/lorafleet
ENV OMP_WAIT_POLICY=PASSIVE
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Lorafleet" \
      org.opencontainers.image.description="Trains, serves and evaluates a fleet of LoRA adapters over one SDXL base model" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
USER 1000:1000
EXPOSE 8000
ENTRYPOINT ["lorafleet"]
CMD ["serve", "--host", "0.0.0.0"]

# ---- serve-cuda: the one difference is a C compiler, with which Triton builds its kernels' launchers at run time
FROM serve AS serve-cuda
USER 0
# hadolint ignore=DL3008 # as above
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log /var/cache/ldconfig/aux-cache
USER 1000:1000
