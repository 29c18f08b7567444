#!/usr/bin/env bash
# Creates the environment of the benchmarks' peers, $PEERS (.venv-peers), on top of $VENV (.venv); `make peers` calls it.
#
# It contains only the packages of requirements/peers.txt. Torch and all other packages are those of $VENV, which a .pth
# file adds to its path, so everything that is compared runs on the same libraries. $VENV itself does not change. The
# stamp is written last: without one the next call starts from the beginning.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VENV:-.venv}
peers=${PEERS:-.venv-peers}
stamp=$peers/upge-stamp
log=$peers/install.log
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

fail() {
    printf 'peers: %s\n' "$*" >&2
    exit 2
}

[[ -x $venv/bin/python ]] || fail "$venv/bin/python does not exist; run make env first"
base=$("$venv/bin/python" -c 'import sys, sysconfig; print(sys.version.split()[0], sysconfig.get_path("purelib"))')
inputs=$(cat requirements/peers.txt requirements/peers.sh | cksum)
made="$base $inputs"
if [[ -f $stamp && $(<"$stamp") == "$made" ]]; then
    printf 'peers: %s is up to date\n' "$peers"
    exit 0
fi
if [[ -d $peers && ! -f $peers/pyvenv.cfg && -n $(ls -A "$peers") ]]; then
    fail "$peers exists and is not a virtual environment: remove it or choose another folder with PEERS=..."
fi

printf 'peers: creating %s: %s\n' "$peers" "$(grep -v '^#' requirements/peers.txt | paste -sd ' ')"
# Without its own pip: setuptools and pip are also those of $VENV.
"$venv/bin/python" -m venv --clear --without-pip "$peers"
packages=$("$peers/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
printf '%s\n' "${base#* }" >"$packages/upge-base.pth"
install=("$venv/bin/python" -m pip --python "$peers/bin/python" install --no-deps -r requirements/peers.txt)
if ! "${install[@]}" >"$log" 2>&1; then
    printf '%s\n' "--- end of $log:" "$(tail -n 15 "$log")" "---" >&2
    fail "the installation failed; fix the problem that $log shows and run make peers again"
fi
# Some wheels contain folders of their own project whose names collide with ours.
rm -rf "$packages/tests" "$packages/scripts"
"$peers/bin/python" -c 'from experiments.bench.peers import missing; import sys; sys.exit(", ".join(f"{n} ({e})" for n, e in missing().items()) or 0)' ||
    fail "these packages do not import; $log shows what was installed"
printf '%s\n' "$made" >"$stamp"
printf 'peers: %s is ready after %s s\n' "$peers" "$SECONDS"
