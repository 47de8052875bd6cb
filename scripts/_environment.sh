# Sourced by the scripts beside it: makes .venv and installs the project into it, once.
#
#   prepare_environment        the project as a user needs it
#   prepare_environment dev    with the tools that scripts/test runs as well
#
# A stamp in .venv records what was installed from which files; while it holds, nothing is installed again.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="$root/.venv"
stamp="$venv/meta-trainer.stamp"

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# The root is part of the fingerprint because an editable install holds the path of the checkout.
fingerprint() {
    { echo "$root"; cat "$root/pyproject.toml" "$root/constraints.txt"; } | cksum
}

is_installed() {
    local recorded
    [ -x "$venv/bin/meta-trainer" ] && [ -r "$stamp" ] || return 1
    recorded="$(cat "$stamp")"
    [ "$recorded" = "$(fingerprint) dev" ] || [ "$recorded" = "$(fingerprint) ${1:-user}" ]
}

make_venv() {
    local python="${PYTHON:-python3}" found
    found="$("$python" -c 'import platform; print(platform.python_version())')" \
        || fail "expected a working Python 3.11 or newer as '$python'. Install one, or name it: PYTHON=/path/to/python3.12 $0 ..."
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
        || fail "expected Python 3.11 or newer, '$python' is $found. Name another one: PYTHON=/path/to/python3.12 $0 ..."
    "$python" -m venv "$venv" \
        || fail "'$python -m venv' failed. Remove $venv if it is broken; on Debian and Ubuntu, install python3-venv first."
}

prepare_environment() {
    local extra="${1:-user}" target="$root" quiet=()
    is_installed "$extra" && return
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || make_venv
    [ "$extra" = user ] || target="$root[$extra]"
    [ -t 2 ] || quiet=(--quiet)
    echo "Installing meta-trainer into $venv (the first time takes minutes) ..." >&2
    rm -f "$stamp"
    PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -m pip install ${quiet[@]+"${quiet[@]}"} \
        --constraint "$root/constraints.txt" --editable "$target" >&2 \
        || fail "the installation failed, see pip's message above. Nothing else was changed; run the same command again."
    echo "$(fingerprint) $extra" >"$stamp"
}
