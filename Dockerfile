# Manylora on NVIDIA's Triton image: Ubuntu 24.04, Python 3.12, tritonserver with its Python backend.
#
#   docker build -t manylora .
#   docker run --gpus all --shm-size 1g --stop-timeout 40 -p 8000-8002:8000-8002 -v $PWD/models:/models:ro manylora
#
# --shm-size: requests and replies pass between tritonserver and the front ends in /dev/shm, of which Docker gives 64 MB.
# --stop-timeout: what is in flight at a stop may take 15 s to finish and the processes 15 s to end; Docker allows 10 s.
FROM nvcr.io/nvidia/tritonserver:26.08-py3

# Triton kernels are compiled when they are first used, their launchers and the CPU kernels with the system's C compiler.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*

# The Python backend embeds the system's Python and takes packages from the environment of the first python3 on PATH.
# An environment of its own leaves the system's packages, which apt manages, alone. It has no pip; the system's serves.
ENV VIRTUAL_ENV=/opt/manylora \
    PATH=/opt/manylora/bin:$PATH
RUN /usr/bin/python3 -m venv --without-pip "$VIRTUAL_ENV"

WORKDIR /opt/manylora/src
# Torch first, in a layer that a change of this project's code leaves alone.
COPY constraints.txt ./
RUN /usr/bin/python3 -m pip --python "$VIRTUAL_ENV/bin/python" install --no-cache-dir -c constraints.txt torch==2.13.0

COPY pyproject.toml README.md LICENSE ./
COPY backend backend
COPY kernels kernels
COPY client client
COPY model_repository model_repository
RUN /usr/bin/python3 -m pip --python "$VIRTUAL_ENV/bin/python" install --no-cache-dir -c constraints.txt '.[server]' \
    && mkdir -p /var/cache/manylora \
    && chown 1000:1000 /var/cache/manylora

# Nothing is fetched at run time: models and adapters are what is mounted.
ENV HF_HUB_OFFLINE=1 \
    TRITON_CACHE_DIR=/var/cache/manylora/triton \
    XDG_CACHE_HOME=/var/cache \
    PYTHONDONTWRITEBYTECODE=1
USER 1000:1000
WORKDIR /tmp
EXPOSE 8000 8001 8002
# Large models load for long. Asks the front ends themselves: Triton may go on calling a dead one ready.
HEALTHCHECK --interval=30s --timeout=30s --start-period=10m --retries=3 \
    CMD ["python3", "-m", "manylora.serve.healthcheck"]

# Or, with a config.pbtxt of your own: docker run ... --entrypoint tritonserver manylora --model-repository=/models/repository
ENTRYPOINT ["manylora", "serve", "--host", "0.0.0.0"]
CMD ["--base-model", "/models/base", "--adapter-root", "/models/adapters"]
