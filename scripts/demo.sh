#!/usr/bin/env bash
# The same prompts once plainly and once speculatively on the embedded demo target. Arguments are Hydra overrides:
#   scripts/demo.sh drafter=prompt_lookup dtype=float32
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
"$root/scripts/setup.sh"
# Compiled passes are made at the first start, in half a minute, and kept; without a C++ compiler there are none.
compile=()
if command -v "${CXX:-g++}" >/dev/null; then compile=(target.compile=true); fi
exec "$root/.venv/bin/specdec" demo ${compile[@]+"${compile[@]}"} "$@"
