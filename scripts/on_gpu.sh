#!/usr/bin/env bash
# Tests and measures the library on a machine with a GPU, within 12 minutes; benchmarks/on_gpu.py describes the parts.
#
#     [OUT=folder] bash scripts/on_gpu.sh [--parts tests step epoch table] [--tiny]
#
# The script uses the installed torch. It installs wheels from .whl/ without network access. To download them for Python
# 3.12 on x86-64:
#
#     pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#         --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 -d .whl -r scripts/on_gpu_packages.txt
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 WANDB_MODE=offline NO_ALBUMENTATIONS_UPDATE=1 MPLBACKEND=Agg
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH}
python=$(command -v python3)

if compgen -G ".whl/*.whl" >/dev/null; then
    site=$(mktemp -d)
    if command -v uv >/dev/null; then
        uv pip install -q --python "$python" --no-index --no-deps --target "$site" .whl/*.whl
    else
        "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" .whl/*.whl
    fi
    export PYTHONPATH=$PYTHONPATH:$site
fi
if ! "$python" -c "import cbsa_lightning.training.cbsa, pytest" 2>/dev/null; then  # a registry may be reachable
    "$python" -m pip install -q -r scripts/on_gpu_packages.txt pytest pytest-xdist lightning
fi
exec "$python" benchmarks/on_gpu.py "$@"
