# Redis and Prometheus as Debian packages, where their own images cannot be pulled. Run as those are: the same programs,
# arguments, users and folders. Grafana is in no Debian archive and has no stand-in.
FROM python:3.11-slim AS packages
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends prometheus redis-server wget

FROM packages AS redis

FROM packages AS prometheus
RUN install -d -o nobody /prometheus
USER nobody
ENTRYPOINT ["/usr/bin/prometheus"]
