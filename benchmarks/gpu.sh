#!/usr/bin/env bash
# All that is to be measured on one GPU, in at most 8 minutes: one JSON, from which `python -m
# benchmarks.gpu_page` makes a part of docs/gpu.md. Without CUDA, or with --cpu, small sizes, and what needs a GPU is recorded as such.
# Usage: benchmarks/gpu.sh [--output FILE] [--cpu] [--only STEP ...] [--minutes 8]. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
command -v "$python" >/dev/null || python=python3
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" CUDA_DEVICE_MAX_CONNECTIONS=1
exec "$python" -m benchmarks.gpu_run "$@"
