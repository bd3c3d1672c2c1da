#!/usr/bin/env bash
# Generates the Python stubs of protos/ into a folder (default: client/). Needs the [dev] extra.
set -euo pipefail
out=${1:-client}
python=${PYTHON:-.venv/bin/python}
bin=$(dirname "$python")
PYTHON=$python tools/proto_dependencies.sh
for package in chromarpc/v1 chromarpc/compat/v1; do
  mkdir -p "$out/$package"
  find "$out/$package" -name '*_pb2*.py*' -delete
  "$python" -m grpc_tools.protoc -I protos -I build/googleapis \
    --plugin=protoc-gen-mypy="$bin/protoc-gen-mypy" \
    --python_out="$out" --mypy_out="quiet:$out" protos/$package/*.proto
  "$python" -m grpc_tools.protoc -I protos -I build/googleapis \
    --plugin=protoc-gen-mypy_grpc="$bin/protoc-gen-mypy_grpc" \
    --grpc_python_out="$out" --mypy_grpc_out="quiet:$out" protos/$package/*_service.proto
done
