# The other scripts source this file. It creates a virtual environment with the package and the tested versions of its
# dependencies, or reuses an existing one.
# Usage: . scripts/setup_env.sh [EXTRAS]     EXTRAS as pip takes them, e.g. "[test,export]"
# RESNEXT_VENV: another folder for the environment. PYTHON: another interpreter to create it with.

extras="${1:-}"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${RESNEXT_VENV:-$root/.venv}"
# These two files alone determine the installed dependencies. The package itself is installed as a link to its source.
wanted="$(cat "$root/setup.cfg" "$root/constraints.txt" | sha256sum | cut -d' ' -f1) $root"
stamp="$venv/.installed$extras"
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
    echo "setting up $venv (torch is a large download)" >&2
    [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$root/constraints.txt" --editable "$root$extras"
    echo "$wanted" >"$stamp"
fi
python="$venv/bin/python"
