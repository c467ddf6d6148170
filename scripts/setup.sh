#!/usr/bin/env bash
# Puts Consilium and everything it needs, for running and for testing, into .venv. Run by `make setup`; safe to repeat.
#   PYTHON  the interpreter to use (default: the first of python3, python3.11, … that is new enough)
#   TORCH   what to give pip for torch, for example "torch==2.11.0" (default: the CPU build where there is no NVIDIA driver)
set -euo pipefail
cd "$(dirname "$0")/.."

DEFAULT_TORCH=torch==2.13.0
CPU_INDEX=https://download.pytorch.org/whl/cpu

step() { printf '[setup %3ds] %s\n' "$SECONDS" "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

install() { pip install -qq "$@"; }

find_python() {
    local name
    for name in ${PYTHON:-python3 python3.11 python3.12 python3.13}; do
        if new_enough "$name"; then echo "$name"; return; fi
    done
    fail "Python 3.11 or newer is needed and was not found; install it, or name it: make setup PYTHON=/path/to/python3.11"
}

make_venv() {
    if [ -x .venv/bin/python ] && new_enough .venv/bin/python && pip --version >/dev/null 2>&1; then return; fi
    local python
    python=$(find_python)
    step "making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv ||
        fail "$python cannot make virtual environments; on Debian and Ubuntu install python3-venv, then run this again"
}

has_nvidia_driver() { [ -e /proc/driver/nvidia/version ] || command -v nvidia-smi >/dev/null; }

install_torch() {
    if [ -n "${TORCH:-}" ]; then
        step "installing $TORCH"
        install $TORCH # several words are allowed: an index, a second package
    elif .venv/bin/python -c 'import torch' 2>/dev/null; then
        step "torch is there already"
    elif has_nvidia_driver; then
        step "installing $DEFAULT_TORCH for CUDA: an NVIDIA driver was found (several GB)"
        install "$DEFAULT_TORCH"
    else
        step "installing $DEFAULT_TORCH for CPUs: no NVIDIA driver was found (about 200 MB)"
        # Asked once: behind a mirror of the package index, PyTorch's own is often out of reach.
        if ! install --index-url "$CPU_INDEX" --timeout 10 --retries 0 "$DEFAULT_TORCH" 2>/dev/null; then
            step "$CPU_INDEX could not be used; installing from the package index (may be the larger CUDA build)"
            install "$DEFAULT_TORCH"
        fi
    fi
}

make_venv
install_torch
step "installing Consilium and its tools"
install --editable '.[test]'
step "ready: .venv/bin/consilium"
