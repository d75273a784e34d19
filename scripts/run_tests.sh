#!/usr/bin/env bash
# The test suite in an environment of its own, with coverage, on up to four cores.
# Usage: bash scripts/run_tests.sh [PYTEST ARGUMENTS]     e.g. -m slow, or -n 0 for one process
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup_env.sh "[test,export]"
# One thread: the tests' networks are tiny, and forked runs must not inherit a thread pool.
export OMP_NUM_THREADS=1
"$python" -m coverage erase
"$python" -m pytest --cov --cov-report=term --numprocesses auto --maxprocesses 4 "$@"
