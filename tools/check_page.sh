#!/usr/bin/env bash
# Proves that the TypeScript stubs and the built page are what their sources make.
set -euo pipefail
cd "$(dirname "$0")/.."
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
tools/generate_typescript.sh "$fresh/gen"
(cd client/web && PAGE_DIR="$fresh/page" npx --no-install vite build --logLevel warn)
for pair in gen:client/typescript/src/gen page:server/chromarpc_server/gateway/page; do
  if ! diff -r -q "$fresh/${pair%%:*}" "${pair#*:}"; then
    echo "${pair#*:} is not current: run \`make page\`" >&2
    exit 1
  fi
done
