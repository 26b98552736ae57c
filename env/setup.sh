#!/bin/sh
# Makes .venv from requirements.txt: `make setup`. Nothing to do, nothing done, in a few hundredths of a second.
#
# Needs Python 3.11 or newer (PYTHON=… names one). The stamp .venv/.made is taken away before the first change and
# written after the last, so a .venv without it is half-made: it is thrown away and made anew.
set -eu
unset PYTHONPATH PYTHONHOME
cd -P "$(dirname "$0")/.."

say() { printf '%s\n' "$*" >&2; }
die() { say "$@"; exit 1; }

stamp() { # The checkout, the Python, and a hash of everything that .venv is made from, one a line.
    .venv/bin/python -ISc '
import hashlib, os, sys
inputs = b"".join(open(name, "rb").read() for name in sys.argv[1:])
print(os.fsencode(os.getcwd()).hex(), "%d.%d" % sys.version_info[:2], hashlib.sha256(inputs).hexdigest(), sep="\n")
' requirements.txt env/pyproject.toml env/setup.sh env/javascript/deno.* 2>/dev/null
}

made() { [ -f .venv/.made ] && [ "$(cat .venv/.made)" = "$(stamp)" ]; }

find_python() {
    for python in "${PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11; do
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && return
        [ -z "${PYTHON:-}" ] || break
    done
    die "Python 3.11 or newer is needed${PYTHON:+; $PYTHON is not one}. Install it, or name it: make setup PYTHON=/path/to/python3"
}

need_venv() { # Debian and Ubuntu keep what makes a virtual environment in a package of its own.
    "$python" -c 'import ensurepip, venv' 2>/dev/null && return
    package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    command -v apt-get >/dev/null || die "$python cannot make virtual environments: install its venv and ensurepip modules."
    say "Installing $package ..."
    sudo=
    [ "$(id -u)" = 0 ] || sudo=sudo
    { $sudo apt-get -qq update && $sudo env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y "$package"; } >/dev/null ||
        die "$package could not be installed. Try: $sudo apt-get install $package"
}

make_venv() {
    rm -rf .venv
    "$python" -m venv .venv || die "$python could not make .venv."
    awk '/^[^ ]/ { keep = /^uv==/ } keep' requirements.txt >.venv/uv.txt
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r .venv/uv.txt ||
        die "uv could not be installed: is the package index reachable?"
}

made && exit
find_python
exec 9<env/setup.sh # One at a time: the lock lies on descriptor 9, which ends with this script.
"$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
made && exit
start=$(date +%s)
if [ -f .venv/.made ] && [ "$(head -n 2 .venv/.made)" = "$(stamp | head -n 2)" ]; then
    say "Updating .venv ..."
    rm .venv/.made
else
    say "Making .venv with $("$python" --version) ..."
    need_venv
    make_venv
fi
uv="env -u VIRTUAL_ENV .venv/bin/uv pip"
$uv sync --quiet --python .venv/bin/python requirements.txt &&
    $uv install --quiet --python .venv/bin/python --no-deps --no-build-isolation --editable env ||
    die "The packages could not be installed: is the package index reachable?"
mkdir -p .venv/etc/ipython # A kernel would say on every start that it talks over loopback without encryption.
echo '{"IPKernelApp": {"log_level": "ERROR"}}' >.venv/etc/ipython/ipython_kernel_config.json
kernel=.venv/share/jupyter/kernels/deno # Deno's own installer knows the user's home alone.
mkdir -p "$kernel"
.venv/bin/python -c '
import json, sys
argv = [sys.executable, "-m", "lab.javascript", "{connection_file}"]
print(json.dumps({"argv": argv, "display_name": "Deno", "language": "typescript"}))
' >"$kernel/kernel.json"
packages=.venv/share/javascript # gRPC's own library for JavaScript: deno.lock holds a hash of each package.
mkdir -p "$packages"
cp env/javascript/deno.json env/javascript/deno.lock "$packages"
(cd "$packages" && ../../bin/deno install --quiet --frozen) || die "The JavaScript packages could not be installed: is their registry reachable?"
stamp >.venv/made.new
mv .venv/made.new .venv/.made
say ".venv made in $(($(date +%s) - start)) s."
