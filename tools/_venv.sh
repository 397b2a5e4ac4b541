# Sourced by the programs beside it: moves to the repository root and makes sure that .venv holds
# what setup.cfg asks for. PYTHON names the interpreter that makes .venv (default: python3), EXTRAS
# the extras of setup.cfg that go into it (default: dev,serving).

cd "$(dirname "${BASH_SOURCE[0]}")/.."
export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-2}"

_fail() {
    echo "error: $1" >&2
    exit 1
}

_make_venv() {
    local python="${PYTHON:-python3}" extras="${EXTRAS:-dev,serving}" stamp=.venv/.installed wanted
    wanted="$PWD $extras $(cat setup.cfg pyproject.toml)"

    if [[ -x .venv/bin/python && -f $stamp && "$(<"$stamp")" == "$wanted" ]]; then
        return
    fi
    if [[ ! -x .venv/bin/python ]]; then
        command -v "$python" >/dev/null ||
            _fail "no '$python' found: install Python 3.11 or newer, or name one with PYTHON=/path/to/python3"
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            _fail "$("$python" --version) is too old: Python 3.11 or newer is needed; name one with PYTHON=/path/to/python3"
        echo "Making .venv with $("$python" --version) ..."
        "$python" -m venv .venv ||
            _fail "could not make .venv (on Debian and Ubuntu: apt install python3-venv)"
    fi
    echo "Installing bertgen_tf and its dependencies into .venv (several minutes the first time) ..."
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$extras]" ||
        _fail "the installation failed; fix the cause above and run this again"
    printf '%s\n' "$wanted" >"$stamp"
}

_make_venv
