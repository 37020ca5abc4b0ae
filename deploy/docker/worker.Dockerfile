# A prefill or decode worker on CPU. Build from the repository's root.
#
# The public index's torch is a CUDA build of gigabytes; TORCH_INDEX_URL names an index of torch's CPU builds:
#   docker compose build --build-arg TORCH_INDEX_URL=…
FROM python:3.11-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
ARG TORCH_INDEX_URL=""
RUN apt-get update && apt-get install --yes --no-install-recommends cmake g++ make
RUN python -m venv /opt/staffetta
WORKDIR /src
COPY constraints.txt .
# First and alone: a later resolve keeps it, and a change of our code does not install it again.
RUN /opt/staffetta/bin/pip install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch==2.13.0
COPY . .
RUN /opt/staffetta/bin/python -m kernels.cpu.build
RUN /opt/staffetta/bin/pip install -c constraints.txt '.[worker]'

FROM python:3.11-slim-bookworm
# torch's OpenMP runtime.
RUN apt-get update && apt-get install --yes --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
# The directory of the shm sockets belongs to the user: a volume mounted there for the first time takes that over.
RUN useradd --system --uid 10001 --no-create-home staffetta \
  && install -d -o staffetta -m 0700 /run/staffetta
COPY --from=build /opt/staffetta /opt/staffetta
ENV PATH=/opt/staffetta/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# A container's loopback is its own; peers dial what --advertise and --transfer-advertise say.
ENV STAFFETTA_LISTEN=0.0.0.0:50052 STAFFETTA_TRANSFER_LISTEN=0.0.0.0:50053
USER staffetta
EXPOSE 50052 50053
ENTRYPOINT ["staffetta"]
# The role follows: prefill or decode.
CMD ["--help"]
HEALTHCHECK --interval=5s --timeout=5s --retries=3 --start-period=60s \
  CMD ["python", "-m", "staffetta.rpc.probe", "127.0.0.1:50052"]
