# One image for all roles: the command says which (cachefs master, cachefs worker, cachefs-csi node, ...).
#
#   docker build -t cachefs .
#
# No fuse3: root mounts without fusermount3, and only root mounts in a container.
ARG BASE=docker.io/library/python:3.12-slim-bookworm

FROM ${BASE} AS build
WORKDIR /src
COPY pyproject.toml README.md ./
COPY cachefs ./cachefs
COPY csi ./csi
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .
RUN python -m venv /opt/cachefs
RUN /opt/cachefs/bin/pip install --no-cache-dir "$(echo /wheels/cachefs-*.whl)[csi]"

FROM ${BASE}
RUN groupadd --gid 65532 cachefs && useradd --uid 65532 --gid 65532 --no-create-home --shell /usr/sbin/nologin cachefs
COPY --from=build /opt/cachefs /opt/cachefs
ENV PATH=/opt/cachefs/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# Workers on disks of the node, mounts and the CSI node plugin are run as root: see charts/cachefs.
USER 65532:65532
# Of whatever listens where CACHEFS_HTTP says; without it there is nobody to ask. Kubernetes has probes of its own.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s \
    CMD ["python", "-c", "import os, urllib.request as u; a = os.environ.get('CACHEFS_HTTP', ''); a and u.urlopen('http://127.0.0.1:' + a.rpartition(':')[2] + '/healthz', timeout=5)"]
# No init process: ours handle SIGTERM, and wait for the processes they start.
ENTRYPOINT ["cachefs"]
CMD ["--help"]
