#!/usr/bin/env bash
# Proves that the committed stubs are what protos/ generates.
set -euo pipefail
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
mkdir -p "$fresh/chromarpc/v1"
tools/generate_stubs.sh "$fresh"
if ! diff -r -q --exclude=__init__.py --exclude=__pycache__ "$fresh/chromarpc/v1" client/chromarpc/v1; then
  echo 'the committed stubs are not current: run `make protos`' >&2
  exit 1
fi
