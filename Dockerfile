# Headwater in an image: docker build --tag headwater .
#
# --build-arg EXTRAS=torch,files,tls,metrics says which extras are in it. A node is started by its command:
#   docker run headwater serve coordinator --bind 0.0.0.0:7000 --workers 2 --token-file /run/secrets/token
# Copy your script in with an image of your own (FROM headwater; COPY train.py .), or mount it.

FROM python:3.11-slim AS build
ARG EXTRAS=files,tls,metrics
WORKDIR /source
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY headwater headwater
RUN python -m venv /opt/headwater \
    && /opt/headwater/bin/pip install --no-cache-dir --constraint constraints.txt ".[${EXTRAS}]"

FROM python:3.11-slim
RUN useradd --create-home --uid 10001 headwater && install --directory --owner headwater /work /data
COPY --from=build /opt/headwater /opt/headwater
# Kernels are compiled once and kept; nodes log as they go; probes are answered where the check below asks.
ENV PATH=/opt/headwater/bin:$PATH \
    NUMBA_CACHE_DIR=/home/headwater/.cache/numba \
    PYTHONUNBUFFERED=1 \
    HEADWATER_HEALTH=0.0.0.0:8080
USER headwater
WORKDIR /work
VOLUME /data
EXPOSE 7000 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/live', timeout=4)"]
ENTRYPOINT ["headwater"]
CMD ["--help"]
