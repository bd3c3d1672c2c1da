#!/usr/bin/env bash
# Generates the Python stubs of protos/ below a folder (default: this one). Needs the [dev] extra.
set -euo pipefail
out=${1:-.}
python=${PYTHON:-.venv/bin/python}
bin=$(dirname "$python")
for package in chromarpc/v1 chromarpc/compat/v1; do
  mkdir -p "$out/client/$package"
  find "$out/client/$package" -name '*_pb2*.py*' -delete
  "$python" -m grpc_tools.protoc -I protos \
    --plugin=protoc-gen-mypy="$bin/protoc-gen-mypy" \
    --python_out="$out/client" --mypy_out="quiet:$out/client" protos/$package/*.proto
  "$python" -m grpc_tools.protoc -I protos \
    --plugin=protoc-gen-mypy_grpc="$bin/protoc-gen-mypy_grpc" \
    --grpc_python_out="$out/client" --mypy_grpc_out="quiet:$out/client" protos/$package/*_service.proto
done
# Google's messages come from googleapis-common-protos. gRPC's reflection is in no package yet, and a folder named
# `grpc` would hide gRPC itself, so its one module goes to where it is used.
server=$out/server/chromarpc_server/transport/services
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m grpc_tools.protoc -I protos --plugin=protoc-gen-mypy="$bin/protoc-gen-mypy" \
  --python_out="$work" --mypy_out="quiet:$work" protos/grpc/reflection/v1/reflection.proto
mkdir -p "$server"
for kind in py pyi; do
  mv "$work/grpc/reflection/v1/reflection_pb2.$kind" "$server/reflection_v1_pb2.$kind"
done
