#!/usr/bin/env bash
# Generates the TypeScript stubs of protos/ into a folder. Needs `make setup` and `make node`.
set -euo pipefail
out=$(realpath -m "$1")
cd "$(dirname "$0")/.."
template=$(printf '{"version":"v2","clean":true,"plugins":[{"local":"client/node_modules/.bin/protoc-gen-es","out":"%s","opt":["target=ts","import_extension=js"]}]}' "$out")
"${BUF:-.venv/bin/buf}" generate . --template "$template" --path protos/chromarpc/v1 --path protos/google/rpc
