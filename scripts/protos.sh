#!/usr/bin/env bash
# Regenerates the stubs that stand beside the .proto files. Run by `make protos`.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
PATH=$(dirname "$python"):$PATH

find protos -name '*_pb2*' -delete
"$python" -m grpc_tools.protoc -I protos --python_out=protos --grpc_python_out=protos \
    --mypy_out=quiet:protos --mypy_grpc_out=quiet:protos $(find protos -name "*.proto" | sort)

# protoc names modules from the root of the .proto files; ours are importable below `protos`.
packages=$(cd protos && find . -mindepth 2 -name '*.proto' | cut -d/ -f2 | sort -u | paste -sd'|')
find protos -name '*_pb2*.py*' -exec sed -Ei \
    -e "s/^(from|import) (${packages})\./\1 protos.\2./" \
    -e "s/([^.a-zA-Z_])(${packages})\.v1\.([a-z]+_pb2)/\1protos.\2.v1.\3/g" {} +
