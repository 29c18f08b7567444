#!/usr/bin/env bash
# Creates the environment of an extra tool on top of $VENV (.venv): `extra.sh docs` (make docs-site) creates $DOCS
# (.venv-docs), which builds the documentation's site; `extra.sh peers` (make peers) creates $PEERS (.venv-peers) for the
# benchmarks' peers.
#
# It contains only the packages of requirements/NAME.txt. Torch and all other packages are those of $VENV, which a .pth
# file adds to its path, so everything that is compared runs on the same libraries. $VENV itself does not change. The
# stamp is written last: without one the next call starts from the beginning.
set -euo pipefail
cd "$(dirname "$0")/.."

name=${1:-}
fail() {
    printf '%s: %s\n' "$name" "$*" >&2
    exit 2
}
case $name in
docs)
    variable=DOCS target=docs-site
    check='import latex2mathml.converter, material, mkdocs.commands.build, mkdocstrings'
    ;;
peers)
    variable=PEERS target=peers
    check='from experiments.bench.peers import missing; assert not missing(), missing()'
    ;;
*) fail "there is no such environment; give docs or peers" ;;
esac

venv=${VENV:-.venv}
folder=${!variable:-.venv-$name}
stamp=$folder/upge-stamp
log=$folder/install.log
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

[[ -x $venv/bin/python ]] || fail "$venv/bin/python does not exist; run make env first"
base=$("$venv/bin/python" -c 'import sys, sysconfig; print(sys.version.split()[0], sysconfig.get_path("purelib"))')
made="$base $(cat "requirements/$name.txt" requirements/extra.sh | cksum)"
if [[ -f $stamp && $(<"$stamp") == "$made" ]]; then
    printf '%s: %s is up to date\n' "$name" "$folder"
    exit 0
fi
if [[ -d $folder && ! -f $folder/pyvenv.cfg && -n $(ls -A "$folder") ]]; then
    fail "$folder exists and is not a virtual environment: remove it or choose another folder with $variable=..."
fi

printf '%s: creating %s with the packages of requirements/%s.txt\n' "$name" "$folder" "$name"
# Without its own pip: setuptools and pip are also those of $VENV.
"$venv/bin/python" -m venv --clear --without-pip "$folder"
packages=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
printf '%s\n' "${base#* }" >"$packages/upge-base.pth"
install=("$venv/bin/python" -m pip --python "$folder/bin/python" install --no-deps -r "requirements/$name.txt")
if ! "${install[@]}" >"$log" 2>&1; then
    printf '%s\n' "--- end of $log:" "$(tail -n 15 "$log")" "---" >&2
    fail "the installation failed; fix the problem that $log shows and run make $target again"
fi
# Some wheels contain folders of their own project whose names collide with ours.
rm -rf "$packages/tests" "$packages/scripts"
"$folder/bin/python" -c "$check" || fail "these packages do not import; $log shows what was installed"
printf '%s\n' "$made" >"$stamp"
printf '%s: %s is ready after %s s\n' "$name" "$folder" "$SECONDS"
