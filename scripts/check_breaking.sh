#!/usr/bin/env bash
# Fail where protos/ breaks a contract that the main branch has promised.
# On main itself the promise is what was there before: upstream's main, or else the commit before.
set -euo pipefail
cd "$(dirname "$0")/.."
base=main
git rev-parse --quiet --verify main >/dev/null || base=origin/main
if [ "$(git rev-parse "$base")" = "$(git rev-parse HEAD)" ] && git diff --quiet HEAD -- protos; then
  if ! base=$(git rev-parse --quiet --verify HEAD~1); then
    echo "check_breaking: the history holds nothing to compare with" >&2
    exit 0
  fi
fi
if [ -z "$(git ls-tree -r --name-only "$base" -- protos)" ]; then
  echo "check_breaking: $base has no protos yet"
  exit 0
fi
old=$(mktemp -d)
trap 'rm -rf "$old"' EXIT
git archive "$base" protos buf.yaml | tar -x -C "$old"
.venv/bin/buf breaking --against "$old"
echo "check_breaking: nothing that $base promises is broken"
