#!/usr/bin/env bash
# Creates the environment that builds the documentation's site, $DOCS (.venv-docs), on top of $VENV (.venv); `make
# docs-site` calls it.
#
# It contains only the packages of requirements/docs.txt. All other packages are those of $VENV, which a .pth file adds to
# its path. $VENV itself does not change. The stamp is written last: without one the next call starts from the beginning.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VENV:-.venv}
docs=${DOCS:-.venv-docs}
stamp=$docs/upge-stamp
log=$docs/install.log
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

fail() {
    printf 'docs: %s\n' "$*" >&2
    exit 2
}

[[ -x $venv/bin/python ]] || fail "$venv/bin/python does not exist; run make env first"
base=$("$venv/bin/python" -c 'import sys, sysconfig; print(sys.version.split()[0], sysconfig.get_path("purelib"))')
inputs=$(cat requirements/docs.txt requirements/docs.sh | cksum)
made="$base $inputs"
if [[ -f $stamp && $(<"$stamp") == "$made" ]]; then
    printf 'docs: %s is up to date\n' "$docs"
    exit 0
fi
if [[ -d $docs && ! -f $docs/pyvenv.cfg && -n $(ls -A "$docs") ]]; then
    fail "$docs exists and is not a virtual environment: remove it or choose another folder with DOCS=..."
fi

printf 'docs: creating %s: mkdocs-material, mkdocstrings and what they need\n' "$docs"
# Without its own pip: setuptools and pip are also those of $VENV.
"$venv/bin/python" -m venv --clear --without-pip "$docs"
packages=$("$docs/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
printf '%s\n' "${base#* }" >"$packages/upge-base.pth"
install=("$venv/bin/python" -m pip --python "$docs/bin/python" install --no-deps -r requirements/docs.txt)
if ! "${install[@]}" >"$log" 2>&1; then
    printf '%s\n' "--- end of $log:" "$(tail -n 15 "$log")" "---" >&2
    fail "the installation failed; fix the problem that $log shows and run make docs-site again"
fi
"$docs/bin/python" -c 'import latex2mathml.converter, material, mkdocs.commands.build, mkdocstrings' ||
    fail "these packages do not import; $log shows what was installed"
printf '%s\n' "$made" >"$stamp"
printf 'docs: %s is ready after %s s\n' "$docs" "$SECONDS"
