#!/usr/bin/env bash
# Lays out the Google protos that ours import where buf and protoc find them: build/googleapis.
set -euo pipefail
python=${PYTHON:-.venv/bin/python}
source=$("$python" -c 'import google.api, pathlib; print(pathlib.Path(next(iter(google.api.__path__))).parent)')
for file in api/annotations api/http api/httpbody rpc/code rpc/error_details rpc/status; do
  mkdir -p "build/googleapis/google/$(dirname "$file")"
  cp "$source/$file.proto" "build/googleapis/google/$file.proto"
done
