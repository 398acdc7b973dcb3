#!/usr/bin/env bash
# Makes .venv with the exact packages of constraints/cpu.txt and this checkout installed in place; with the argument
# "launch", "agents" or "docs" .venv-launch, .venv-agents or .venv-docs with those of constraints/launch.txt, agents.txt or
# docs.txt, which are not needed to train or clash with what is.
# Safe to run at any time: it does nothing when nothing changed, and repairs what is missing or broken.
# PYTHON=/path/to/python3.12 chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

WANTED=3.12
case "${1:-}" in
"") LOCK=constraints/cpu.txt NAME=.venv WHAT="6 GB; about a minute the first time" ;;
launch) LOCK=constraints/launch.txt NAME=.venv-launch WHAT="nemo-run and what it needs" ;;
agents) LOCK=constraints/agents.txt NAME=.venv-agents WHAT="ALFWorld and what WebShop needs; minutes the first time, which compiles" ;;
docs) LOCK=constraints/docs.txt NAME=.venv-docs WHAT="mkdocs-material, which builds the site" ;;
*) echo "setup: unknown argument $1; give none, launch, agents or docs" >&2; exit 2 ;;
esac
VENV=$PWD/$NAME
STAMP=$VENV/.setup-stamp

say() { echo "setup: $*"; }
fail() { echo "setup: $*" >&2; exit 2; }

# The interpreter may be a shim that exists but does not run, so every candidate is asked for its version.
is_wanted() { [ "$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = "$WANTED" ]; }

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        is_wanted "$PYTHON" || fail "PYTHON=$PYTHON is not Python $WANTED; unset it or give one that is"
        echo "$PYTHON"
        return
    fi
    local candidate
    for candidate in "python$WANTED" python3 python "${PYENV_ROOT:-$HOME/.pyenv}/versions/$WANTED"*/bin/python; do
        if is_wanted "$candidate"; then echo "$candidate"; return; fi
    done
    if command -v uv >/dev/null; then
        candidate=$(uv python find "$WANTED" 2>/dev/null || { uv python install -q "$WANTED" && uv python find "$WANTED"; } || true)
        if is_wanted "$candidate"; then echo "$candidate"; return; fi
    fi
    fail "no Python $WANTED found: install it, for example with 'pyenv install $WANTED', or set PYTHON=/path/to/python$WANTED"
}

# A finished environment has a stamp; one without was interrupted, one that names another folder was moved or copied.
venv_is_sound() {
    [ -f "$STAMP" ] && is_wanted "$VENV/bin/python" && grep -qF "$VENV" "$VENV/bin/activate"
}

use_uv() { "$VENV/bin/python" -m uv --version >/dev/null 2>&1; }

# What pip is told by its configuration files or by PIP_* variables; uv reads neither.
pip_setting() {
    "$VENV/bin/python" -m pip config list 2>/dev/null | sed -n "s/^\(global\|:env:\)\.$1='\(.*\)'\$/\2/p" | tail -n 1
}

# uv is many times faster than pip and shares files between environments. Compiling everything once halves the
# start-up of every process, also where Python may not write its caches.
install() {
    if use_uv; then
        local index certificates
        index=$(pip_setting index-url) certificates=$(pip_setting cert)
        if [ -n "$index" ]; then export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$index}; fi
        if [ -n "$certificates" ]; then export SSL_CERT_FILE=${SSL_CERT_FILE:-$certificates}; fi
        "$VENV/bin/python" -m uv pip install --quiet --compile-bytecode --python "$VENV/bin/python" --no-deps "$@" && return
        say "uv could not do it; trying pip"
    fi
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$@"
}

# Packages of the agents that have no wheel, compiled once for all checkouts of this user: two minutes on two cores. The
# package's own -O3 -g would take twice as long, and the time of a game is Python's.
COMPILED="fast-downward-textworld jericho"
WHEELS=${XDG_CACHE_HOME:-$HOME/.cache}/megatron-opd/wheels/$(uname -m)

install_compiled() {
    local name pinned wheel compiler
    compiler=$(mktemp -d)
    printf '#!/bin/sh\nexec c++ "$@" -O1 -g0\n' >"$compiler/c++"
    chmod +x "$compiler/c++"
    for name in $COMPILED; do
        pinned=$(grep "^$name==" "$LOCK")
        wheel=$(compgen -G "$WHEELS/${name//-/_}-${pinned#*==}-*.whl" || true)
        if [ -z "$wheel" ]; then
            say "compiling $pinned"
            CXX=$compiler/c++ "$VENV/bin/python" -m pip wheel --quiet --disable-pip-version-check --no-deps \
                --wheel-dir "$WHEELS" "$pinned" || return 1
            wheel=$(compgen -G "$WHEELS/${name//-/_}-${pinned#*==}-*.whl")
        fi
        install "$wheel" || return 1
    done
    rm -rf "$compiler"
}

# A tenth of a second with uv, some seconds with pip.
nothing_is_missing() {
    if use_uv; then
        "$VENV/bin/python" -m uv pip install --quiet --offline --python "$VENV/bin/python" --no-deps -r "$LOCK" 2>/dev/null
    else
        "$VENV/bin/python" -m pip install --quiet --no-index --no-deps -r "$LOCK" 2>/dev/null
    fi
}

key=$(cat pyproject.toml "$LOCK" tools/setup.sh | sha256sum | cut -d' ' -f1)
if venv_is_sound; then
    if [ "$(cat "$STAMP")" = "$key" ] && nothing_is_missing; then exit 0; fi
    say "the pinned packages changed, or some are missing: updating $NAME"
else
    python=$(find_python)
    if [ -e "$VENV" ]; then say "$NAME is unfinished, broken or was moved: making it anew"; fi
    say "making $NAME with $("$python" --version)"
    rm -rf "$VENV"
    "$python" -m venv "$VENV" || fail "$python cannot make environments: install its venv module (python$WANTED-venv)"
fi

if ! use_uv; then
    say "installing $(grep '^uv==' "$LOCK")"
    install "$(grep '^uv==' "$LOCK")" || say "uv is not available; pip will be used, which takes some minutes"
fi
if [ "$NAME" = .venv-agents ]; then
    install_compiled || fail "a package could not be compiled: that needs g++, make and cmake, and the network"
fi
say "installing $(grep -c '^[a-z].*==' "$LOCK") packages from $LOCK ($WHAT)"
install -r "$LOCK" || fail "packages could not be installed: check the network and pip's index settings, then run it again"
if [ "$NAME" = .venv ]; then
    say "installing this checkout in place"
    install --no-build-isolation --editable .
fi
echo "$key" >"$STAMP"
say "done: $NAME/bin"
