#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs the inference job that a YAML describes; `bash infer.sh --help` lists the options.

YAML_FILE_NAME=demo.yaml # a file of the config folder beside this script, or a path

if [ -z "${BASH_VERSION:-}" ]; then
    echo "infer.sh: this shell is not bash; run: bash infer.sh" >&2
    return 2 2>/dev/null || exit 2
fi
if (return 0 2>/dev/null); then # sourced: a child process keeps the caller's shell unchanged
    "$BASH" -- "${BASH_SOURCE[0]}" "$@"
    return
fi

set -euo pipefail
set +o posix
unset CDPATH
MODEL_DIR="$(readlink -f -- "${BASH_SOURCE[0]:-}"; echo x)" # symlinks resolved; x keeps a trailing newline of the path
MODEL_DIR="${MODEL_DIR%/*}"
if [[ "$MODEL_DIR" != /* || ! -f "$MODEL_DIR/../../executor/scripts/function.sh" ]]; then
    echo "infer.sh: it is not inside its repository: run it there, or through a symbolic link" >&2
    exit 2
fi
# shellcheck source=../../executor/scripts/set_env.sh
source "$MODEL_DIR/../../executor/scripts/set_env.sh"
# shellcheck source=../../executor/scripts/function.sh
source "$MODEL_DIR/../../executor/scripts/function.sh"

usage() {
    cat <<END
usage: bash infer.sh [--yaml NAME] [--set SECTION.KEY=VALUE]... [--output FILE]

  --yaml NAME              a file of models/qwen3_moe/config, or a path, with or without .yaml (default: $YAML_FILE_NAME)
  --set SECTION.KEY=VALUE  overrides one setting of the YAML; may be repeated
  --output FILE            also writes the results there
  -h, --help               prints this

YAML files: $(list_yamls "$MODEL_DIR/config")
END
}

yaml_source=YAML_FILE_NAME yaml_name="$YAML_FILE_NAME"
options=()
while (($# > 0)); do
    case "$1" in
        -h | --help)
            usage
            exit 0
            ;;
        --yaml=* | --set=* | --output=*)
            set -- "${1%%=*}" "${1#*=}" "${@:2}"
            continue
            ;;
        --yaml | --set | --output)
            [[ -n "${2:-}" && "$2" != --* ]] || die "$1 needs an argument (--help lists the options)"
            if [[ "$1" == --yaml ]]; then
                yaml_source=--yaml yaml_name="$2"
            else
                options+=("$1=$2")
            fi
            shift 2
            ;;
        *) die "unknown option '$1' (--help lists the options)" ;;
    esac
done

find_yaml "$yaml_source" "$yaml_name" "$MODEL_DIR/config"
source_cann
choose_python
launch "--yaml_file_path=$YAML" ${options[@]+"${options[@]}"}
