#!/usr/bin/env bash
# Make .venv in the checkout and install specdec into it: scripts/setup.sh [dev]
# A second run returns at once, unless what decides the installation has changed.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="$root/.venv"
stamp="$venv/.specdec-stamp"
extra="${1:-}"
if [[ -n "$extra" && "$extra" != dev ]]; then
    echo "setup.sh: unknown argument '$extra'; expected nothing or 'dev'" >&2
    exit 2
fi

# The folder is part of the key: a virtual environment does not survive being moved. Extras only ever add up.
key="$(cd "$root" && cat pyproject.toml setup.py scripts/constraints.txt scripts/setup.sh | cksum) $root"
if [[ -x "$venv/bin/python" && -f "$stamp" ]]; then
    installed="$(cat "$stamp")"
    if [[ "$installed" == "$key dev" || "$installed" == "$key $extra" ]]; then exit 0; fi
    if [[ "$installed" == *" dev" ]]; then extra=dev; fi
fi

find_python() {
    # The python3 the user has chosen (a pyenv, conda or system default) comes before any other.
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "setup.sh: no Python >= 3.10 with venv and ensurepip found (looked for python3, python3.13 ... python3.10)." >&2
    echo "On Debian and Ubuntu: apt install python3 python3-venv" >&2
    return 1
}

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1 || [[ "$(head -n 1 "$venv/.root" 2>/dev/null)" != "$root" ]]; then
    python="$(find_python)"
    echo "making $venv with $("$python" --version)" >&2
    "$python" -m venv --clear "$venv"
    echo "$root" >"$venv/.root"
fi

echo "installing specdec${extra:+ with the extra '$extra'} into $venv (minutes the first time)" >&2
rm -f "$stamp"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint "$root/scripts/constraints.txt" --editable "$root${extra:+[$extra]}"
echo "$key $extra" >"$stamp"
