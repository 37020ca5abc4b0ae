# The gateway: the base dependencies alone, no torch. Build from the repository's root.
FROM python:3.11-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/staffetta
WORKDIR /src
COPY . .
RUN /opt/staffetta/bin/pip install -c constraints.txt .

FROM python:3.11-slim-bookworm
RUN useradd --system --uid 10001 --no-create-home staffetta
COPY --from=build /opt/staffetta /opt/staffetta
ENV PATH=/opt/staffetta/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER staffetta
EXPOSE 8000 50051
ENTRYPOINT ["staffetta"]
CMD ["gateway", "--http", "0.0.0.0:8000", "--grpc", "0.0.0.0:50051"]
HEALTHCHECK --interval=5s --timeout=5s --retries=3 --start-period=60s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
