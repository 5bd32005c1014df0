#!/usr/bin/env bash
# Every check of the project, the same for a developer and for CI. Arguments go to pytest:
#   scripts/test.sh -k token_recycling
#   scripts/test.sh -m slow
set -uo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$root" || exit 1
"$root/scripts/setup.sh" dev || exit 1

failed=()
check() {
    local name="$1"
    shift
    echo "== $name"
    "$@" || failed+=("$name (exit code $?)")
}

bin="$root/.venv/bin"
check "ruff check" "$bin/ruff" check .
check "ruff format" "$bin/ruff" format --check .
check "mypy" "$bin/mypy"
check "pytest" "$bin/python" -m pytest -n 2 --dist worksteal "$@"

if ((${#failed[@]})); then
    printf 'FAILED: %s\n' "${failed[@]}" >&2
    exit 1
fi
