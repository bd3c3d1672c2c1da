#!/usr/bin/env bash
# Proves that the committed stubs are what protos/ generates.
set -euo pipefail
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
tools/generate_stubs.sh "$fresh"
for package in chromarpc/v1 chromarpc/compat/v1; do
  diff -r -q --exclude=__init__.py --exclude=__pycache__ "$fresh/client/$package" "client/$package" || stale=1
done
for file in "$fresh"/server/chromarpc_server/transport/services/*; do
  diff -q "$file" "server/chromarpc_server/transport/services/$(basename "$file")" || stale=1
done
if [ -n "${stale:-}" ]; then
  echo 'the committed stubs are not current: run `make protos`' >&2
  exit 1
fi
