#!/usr/bin/env bash
# Creates .venv with the pinned dependencies; does nothing when it is up to date.
# Usage: ./bootstrap.sh [EXTRAS], such as dev or dev,mpi. PYTHON=/path/to/python3.12 chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")"
extras="${1:-dev}"

usable() {
  # pyenv leaves launchers on PATH for versions that are not selected, so a candidate has to prove itself.
  "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

candidates() {
  if [ -n "${PYTHON:-}" ]; then echo "$PYTHON"; return; fi
  local version
  for version in 3.12 3.13 3.14; do command -v "python$version" || true; done
  command -v python3 || true
  if command -v pyenv >/dev/null 2>&1; then ls -d "$(pyenv root)"/versions/3.1[2-9]*/bin/python3 2>/dev/null || true; fi
  if command -v uv >/dev/null 2>&1; then uv python find --no-python-downloads '>=3.12' 2>/dev/null || true; fi
}

stamp="$(printf '%s\n' "$extras" | cat - setup.py requirements.lock | cksum)"
if [ -x .venv/bin/python ] && [ "$(cat .venv/stamp 2>/dev/null)" = "$stamp" ]; then exit 0; fi

python=""
while read -r candidate; do
  if usable "$candidate"; then python="$candidate"; break; fi
done < <(candidates)
if [ -z "$python" ]; then
  echo "error: no Python 3.12 or newer with venv found on PATH, in pyenv or in uv; install one, or set PYTHON=/path/to/python3.12" >&2
  exit 1
fi

echo "creating .venv with $("$python" --version) (a few minutes, about 8 GB with torch's CUDA libraries)"
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock pip setuptools wheel
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --constraint requirements.lock --editable ".[$extras]"
printf '%s\n' "$stamp" > .venv/stamp
