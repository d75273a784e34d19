#!/usr/bin/env bash
# Runs the test suite in a separate environment, on up to four cores.
# Usage: bash scripts/run_tests.sh [PYTEST ARGUMENTS]
#   e.g. -m slow, or -n 0 for one process. With coverage, which takes a third more time: --cov --cov-report=term
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup_env.sh "[test,export]"
# One thread: the tests' networks are tiny, and forked runs must not inherit a thread pool.
export OMP_NUM_THREADS=1
"$python" -m pytest --numprocesses auto --maxprocesses 4 --dist loadgroup "$@"
