# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash disable=SC2154
# Launch functions: sourced, after set_env.sh, by a script that runs under `set -euo pipefail`.
# Environment they read:
#   PYTHON           the Python to use (default: python, or python3 where there is no python)
#   NPU_DEVICE_GLOB  the device files that tell an NPU machine (default: /dev/davinci[0-9]*)
#   JEMALLOC         on an NPU machine: the memory allocator to preload (default: libjemalloc.so.2 where there is one)
#   NODE_IPS, MASTER_PORT, RENDEZVOUS_TIMEOUT_S, JOB_SECRET   each in place of what set_env.sh says

ROOT="$(readlink -f -- "${BASH_SOURCE[0]}"; echo x)" # x: a path may end in a newline, which $() would cut off
ROOT="${ROOT%/*/*/*}"
ROOT="${ROOT:-/}"

# say TEXT: one line on stderr, what cannot be shown escaped, without its middle if it is long.
say() {
    { local LC_ALL=C.UTF-8; } 2>/dev/null # where there is none, the locale stays
    local text line='' character i
    text="$(without_middle "$*")"
    for ((i = 0; i < ${#text}; i++)); do
        character="${text:i:1}"
        [[ "$character" == [[:print:]] ]] || printf -v character '\\x%02x' "'$character"
        line+="$character"
    done
    printf '%s\n' "$(without_middle "$line")" >&2
}

without_middle() {
    if ((${#1} <= 400)); then
        printf '%s' "$1"
    else
        printf '%s' "${1:0:250} ... ${1: -140}"
    fi
}

# One line on stderr; exit 2: what the user gave is wrong.
die() {
    say "${0##*/}: $*"
    exit 2
}

# drop_empty_parts NAME: those of a list of folders, which mean the current folder. CANN's set_env.sh leaves one behind.
drop_empty_parts() {
    local folders=":${!1:-}:"
    while [[ "$folders" == *::* ]]; do
        folders="${folders//::/:}"
    done
    folders="${folders#:}"
    [[ -z "${!1:-}" ]] || printf -v "$1" '%s' "${folders%:}"
}

# run_module PYTHON MODULE ARGUMENT...: `python -m`, but without the current folder in sys.path, which Python 3.10 has no
# option for: nothing is imported before it is removed.
RUN_MODULE='import sys
sys.path = [folder for folder in sys.path if folder]
module, sys.argv = sys.argv[1], ["-m", *sys.argv[2:]]
import runpy
runpy.run_module(module, run_name="__main__", alter_sys=True)'
run_module() {
    "$1" -c "$RUN_MODULE" "${@:2}"
}

npu_visible() {
    compgen -G "${NPU_DEVICE_GLOB:-/dev/davinci[0-9]*}" >/dev/null
}

# list_yamls CONFIG_DIR: the YAML names in it, on one line.
list_yamls() {
    local file names=()
    for file in "$1"/*.yaml; do
        [[ -f "$file" ]] && names+=("${file##*/}")
    done
    echo "${names[*]:-none}"
}

# find_yaml SOURCE NAME CONFIG_DIR: sets YAML to the file of CONFIG_DIR, or else the path, that NAME means, with or
# without .yaml; SOURCE is where the user wrote NAME.
find_yaml() {
    local candidates=("$2" "$2.yaml")
    [[ "$2" == */* ]] || candidates=("$3/$2" "$3/$2.yaml" "${candidates[@]}")
    for YAML in "${candidates[@]}"; do
        [[ ! -f "$YAML" ]] || return 0
    done
    die "$1: no such YAML file: '$2' (in ${3#"$ROOT/"}: $(list_yamls "$3"))"
}

# inspect_python PYTHON: prints `ready` if PYTHON has all that is needed, else `old TORCH_VERSION` or
# `missing PACKAGE...`; prints none of these if it is no Python 3.10 or newer. Looks packages up without importing them, as importing
# torch takes seconds.
inspect_python() {
    "$1" -c '
import sys
if sys.version_info < (3, 10):
    sys.exit(1)
sys.path = [folder for folder in sys.path if folder]  # nothing is imported from the current folder
import importlib.metadata, importlib.util, re
modules = {"torch": "torch", "transformers": "transformers", "safetensors": "safetensors", "yaml": "pyyaml",
           "tokenizers": "tokenizers", "tqdm": "tqdm", "psutil": "psutil"}
specs = {package: importlib.util.find_spec(module) for module, package in modules.items()}
missing = [package for package, spec in specs.items() if spec is None or spec.origin is None]
try:
    version = "" if "torch" in missing else importlib.metadata.version("torch")
except importlib.metadata.PackageNotFoundError:
    version = ""
numbers = re.match(r"(\d+)\.(\d+)", version)
if numbers and tuple(map(int, numbers.groups())) < (2, 8):
    print("old", version)
elif missing:
    print("missing", *missing)
else:
    print("ready")
'
}

# Whether PYTHON ($1) has all that is needed.
python_is_ready() {
    [[ "$(inspect_python "$1" 2>/dev/null)" == ready ]]
}

# Sets PYTHON to the active Python if that has all that is needed. An installed torch is never replaced, as it may be
# built for this machine's accelerator; where there is none, and no NPU, the packages go into .venv.
choose_python() {
    local candidates=(python python3) candidate report='' missing
    drop_empty_parts PYTHONPATH
    drop_empty_parts LD_LIBRARY_PATH
    [[ "$ROOT" != *:* ]] || die "the path of this repository has a colon, which parts PYTHONPATH: '$ROOT'"
    [[ -z "${PYTHON:-}" ]] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        report="$(inspect_python "$candidate" 2>/dev/null)" || true
        [[ ! "$report" =~ ^(ready$|old\ |missing\ ) ]] || break
        report=''
    done
    [[ -n "$report" ]] || die "no Python 3.10 or newer (tried: ${candidates[*]}); set PYTHON=/path/to/python"
    PYTHON="$candidate"

    missing="${report#missing }"
    case "$report" in
        ready) ;;
        'old '*) die "torch of $(command -v "$PYTHON") is ${report#old }; torch>=2.8 is needed" ;;
        'missing torch'*)
            npu_visible && die "$(command -v "$PYTHON") lacks $missing; on an NPU machine you install them"
            use_venv
            ;;
        *) die "$(command -v "$PYTHON") lacks $missing; run: $PYTHON -m pip install$(requirements_of "$missing")" ;;
    esac
}

# requirements_of 'PACKAGE...': each with the range that requirements.txt gives it, quoted for a shell.
requirements_of() {
    local package
    for package in $1; do
        printf " '%s'" "$(grep -E "^$package([<>=]|$)" "$ROOT/requirements.txt" || echo "$package")"
    done
}

# Sets PYTHON to that of .venv in the repository root, making it first if need be. .venv/.made_from holds the checksum
# of the requirements it was completed from, or `incomplete`; a .venv without that file is the user's own, left alone.
use_venv() {
    local venv="$ROOT/.venv" wanted
    wanted="$(cksum <"$ROOT/requirements.txt")"
    (
        if command -v flock >/dev/null && ! flock -n 9; then
            say "waiting for another launch to make $venv"
            flock 9
        fi
        if [[ -e "$venv" && ! -e "$venv/.made_from" ]]; then
            python_is_ready "$venv/bin/python" && exit 0
            die "$venv was not made by this script and lacks packages: install requirements.txt into it, or remove it"
        fi
        if [[ -e "$venv" && "$(cat "$venv/.made_from")" == "$wanted" ]] && python_is_ready "$venv/bin/python"; then
            exit 0
        fi
        say "torch is not installed: making $venv from requirements.txt (once; torch is a large download)"
        rm -rf "$venv"
        if mkdir "$venv" && echo incomplete >"$venv/.made_from" && run_module "$PYTHON" venv "$venv" >&2 &&
            run_module "$venv/bin/python" pip install --disable-pip-version-check -r "$ROOT/requirements.txt" >&2; then
            echo "$wanted" >"$venv/.made_from"
        else
            say "${0##*/}: could not make $venv; set PYTHON to a Python that has the packages of requirements.txt"
            exit 1
        fi
    ) 9<"$ROOT" || exit $?
    PYTHON="$venv/bin/python"
}

# On an NPU machine: the driver's libraries and CANN's own environment. Without a cann_path, CANN that is set up already
# (ASCEND_HOME_PATH) stays; else it is looked for where its installer puts it, since CANN 8.5 and before.
source_cann() {
    npu_visible || return 0
    if [[ -d "$driver_path" ]]; then
        export LD_LIBRARY_PATH="$driver_path/lib64/driver:$driver_path/lib64/common${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
    fi
    local name folder file folders=("$cann_path")
    if [[ -z "$cann_path" ]]; then
        [[ -z "${ASCEND_HOME_PATH:-}" ]] || return 0
        folders=()
        for name in cann ascend-toolkit/latest; do
            folders+=("/usr/local/Ascend/$name" "${HOME:-}/Ascend/$name")
        done
    fi
    for folder in "${folders[@]}"; do
        for file in "$folder/set_env.sh" "$folder/bin/setenv.bash"; do
            if [[ -f "$file" ]]; then
                set +eu
                # shellcheck disable=SC1090
                source "$file"
                set -eu
                return 0
            fi
        done
    done
    [[ -z "$cann_path" ]] || die "cann_path: no set_env.sh in '$cann_path'"
}

# On an NPU machine: what HCCL, torch_npu and the allocator read, each unless it is set already, and a line that says
# what is in force. JEMALLOC is the library to preload; it is looked for, and JEMALLOC= means none.
export_npu_settings() {
    npu_visible || return 0
    local setting name found=() devices line
    mapfile -t devices < <(compgen -G "${NPU_DEVICE_GLOB:-/dev/davinci[0-9]*}")
    line="NPU environment: device_files=${#devices[@]}"
    for name in ASCEND_HOME_PATH ASCEND_RT_VISIBLE_DEVICES HCCL_BUFFSIZE HCCL_EXEC_TIMEOUT HCCL_OP_EXPANSION_MODE; do
        [[ -z "${!name+set}" ]] || line+=" $name=${!name}"
    done
    for setting in HCCL_CONNECT_TIMEOUT=1200 PYTORCH_NPU_ALLOC_CONF=expandable_segments:True TASK_QUEUE_ENABLE=1; do
        name="${setting%%=*}"
        [[ -n "${!name+set}" ]] || export "${setting?}"
        line+=" $name=${!name}"
    done
    if [[ -z "${JEMALLOC+set}" ]]; then
        mapfile -t found < <(compgen -G '/usr/lib*/libjemalloc.so.2'; compgen -G '/usr/lib/*/libjemalloc.so.2')
    fi
    JEMALLOC="${JEMALLOC-${found[0]:-}}"
    if [[ -n "$JEMALLOC" ]]; then
        [[ -f "$JEMALLOC" ]] || die "JEMALLOC: no such file: '$JEMALLOC'"
        export LD_PRELOAD="$JEMALLOC${LD_PRELOAD:+:$LD_PRELOAD}"
        line+=" LD_PRELOAD=$LD_PRELOAD"
    fi
    echo "$line" >&2
}

# launch ARGUMENT...: executor.launch takes this process's place, so its exit code and signals are its own. What
# set_env.sh says goes into its environment, unless it is there already.
# PYTHONSAFEPATH keeps what it starts from importing what lies in the current folder, such as another `executor`.
launch() {
    export PYTHONSAFEPATH=1 PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
    export NODE_IPS="${NODE_IPS:-${IPs[*]}}" MASTER_PORT="${MASTER_PORT:-$master_port}"
    export RENDEZVOUS_TIMEOUT_S="${RENDEZVOUS_TIMEOUT_S:-$rendezvous_timeout_s}"
    export JOB_SECRET="${JOB_SECRET:-${job_secret:-}}"
    export_npu_settings
    exec "$PYTHON" -c "$RUN_MODULE" executor.launch "$@"
}
