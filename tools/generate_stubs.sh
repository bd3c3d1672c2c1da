#!/usr/bin/env bash
# Generates the Python stubs of protos/ into a folder (default: client/). Needs the [dev] extra.
set -euo pipefail
out=${1:-client}
python=${PYTHON:-.venv/bin/python}
bin=$(dirname "$python")
find "$out/chromarpc/v1" -name '*_pb2*.py*' -delete 2>/dev/null || true
"$python" -m grpc_tools.protoc -I protos \
  --plugin=protoc-gen-mypy="$bin/protoc-gen-mypy" \
  --python_out="$out" --mypy_out="quiet:$out" protos/chromarpc/v1/*.proto
"$python" -m grpc_tools.protoc -I protos \
  --plugin=protoc-gen-mypy_grpc="$bin/protoc-gen-mypy_grpc" \
  --grpc_python_out="$out" --mypy_grpc_out="quiet:$out" protos/chromarpc/v1/*_service.proto
