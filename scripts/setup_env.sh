# Sourced by the other scripts: makes a virtual environment with the package and its tested versions once, and reuses it.
# Usage: . scripts/setup_env.sh [EXTRAS]     EXTRAS as pip takes them, e.g. "[test,export]"
# Sets `python` to the environment's interpreter. RESNEXT_VENV names another folder for the environment, PYTHON another
# interpreter to make it with.

set_up_environment() {
    local extras="$1" root venv wanted stamp
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)" || return
    venv="${RESNEXT_VENV:-$root/.venv}"
    python="$venv/bin/python"
    # The installed packages depend on these files alone; the package itself is installed as a link to its source.
    wanted="$(cat "$root/setup.cfg" "$root/constraints.txt" | sha256sum | cut -d' ' -f1) $root"
    stamp="$venv/.installed$extras"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        return 0
    fi
    echo "setting up $venv (torch is a large download)" >&2
    # An environment without pip is one whose creation failed half-way.
    "$python" -m pip --version >/dev/null 2>&1 || "${PYTHON:-python3}" -m venv "$venv" || return
    # Only a complete installation gets the stamp; otherwise the next call installs again.
    if ! "$python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$root/constraints.txt" --editable "$root$extras"; then
        echo "error: $venv: the installation failed (see above); run this again when the cause is removed" >&2
        return 1
    fi
    echo "$wanted" >"$stamp"
}

set_up_environment "${1:-}"
