#!/usr/bin/env bash
# Creates .venv with the locked dependencies, each checked against its hash; does nothing when it is up to date.
# Usage: ./bootstrap.sh [EXTRAS], such as dev or dev,fp8. PYTHON=/path/to/python3.12 chooses the interpreter.
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

# A .venv that has more than is asked for stays as it is.
locks="$(cat setup.py requirements*.lock | cksum)"
current() {
  [ -x .venv/bin/python ] && [ "$(sed -n 1p .venv/stamp 2>/dev/null)" = "$locks" ] || return 1
  local extra
  for extra in ${extras//,/ }; do sed 1d .venv/stamp | grep -qx "$extra" || return 1; done
}
for extra in ${extras//,/ }; do
  case "$extra" in dev | mpi | fp8) ;; *) echo "error: no extra '$extra'; there are dev, mpi and fp8" >&2; exit 2 ;; esac
done
if current; then exit 0; fi

python=""
while read -r candidate; do
  if usable "$candidate"; then python="$candidate"; break; fi
done < <(candidates)
if [ -z "$python" ]; then
  echo "error: no Python 3.12 or newer with venv found on PATH, in pyenv or in uv; install one, or set PYTHON=/path/to/python3.12" >&2
  exit 1
fi

echo "creating .venv with $("$python" --version) (a few minutes, about 6 GB with torch's CUDA libraries)"
[ -x .venv/bin/python ] || "$python" -m venv .venv
rm -f .venv/stamp
install() { .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps "$@"; }
# One lock serves dev and mpi. Wheels only: building a source distribution would run code that no hash covers.
install --require-hashes --only-binary :all: --requirement requirements.lock
install --no-build-isolation --editable .
case ",$extras," in
  *,fp8,*)
    # Transformer Engine's torch part exists as source only and is compiled against the torch installed above, with the
    # headers that came with that torch: a CUDA toolkit has none of NCCL. Left alone it would look for a wheel on the
    # network first, whose code no hash covers.
    export NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_PYTORCH_FORCE_BUILD=TRUE
    install --require-hashes --only-binary :all: --no-binary transformer-engine-torch --no-build-isolation \
      --requirement requirements-fp8.lock
    ;;
esac
printf "%s\n" "$locks" dev mpi > .venv/stamp
tr , "\n" <<<"$extras" >> .venv/stamp
