#!/usr/bin/env bash
# Generates the stubs that stand beside the .proto files (`make protos`).
# With --check it generates them elsewhere and fails where the committed ones differ (`make lint`).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
PATH=$(dirname "$python"):$PATH # protoc finds the mypy plug-ins there

generate() { # FOLDER
    "$python" -m grpc_tools.protoc -I protos "--python_out=$1" "--grpc_python_out=$1" \
        "--mypy_out=quiet:$1" "--mypy_grpc_out=quiet:$1" $(find protos -name '*.proto' | sort)
    # protoc names modules from the root of the .proto files; ours are importable below `protos`.
    local packages
    packages=$(cd protos && find . -mindepth 2 -name '*.proto' | cut -d/ -f2 | sort -u | paste -sd'|')
    find "$1" -name '*_pb2*.py*' -exec sed -Ei \
        -e "s/^(from|import) (${packages})\./\1 protos.\2./" \
        -e "s/([^.a-zA-Z_])(${packages})\.v1\.([a-z]+_pb2)/\1protos.\2.v1.\3/g" {} +
}

if [ "${1:-}" = --check ]; then
    fresh=$(mktemp -d)
    trap 'rm -rf "$fresh"' EXIT
    generate "$fresh"
    if ! diff -ru --exclude='*.proto' --exclude=__init__.py --exclude=__pycache__ protos "$fresh"; then
        echo 'error: the stubs in protos/ are not those of the .proto files; run `make protos` and commit them' >&2
        exit 1
    fi
else
    find protos -name '*_pb2*.py*' -delete
    generate protos
fi
