#!/usr/bin/env bash
# The test suite in an environment of its own, with coverage.
# Usage: bash scripts/run_tests.sh [PYTEST ARGUMENTS]     e.g. -m slow
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup_env.sh "[test]"
# One thread: the tests' networks are tiny, and forked runs must not inherit a thread pool.
export OMP_NUM_THREADS=1
"$python" -m coverage erase
"$python" -m pytest --cov --cov-report=term "$@"
