#!/usr/bin/env bash
# Make the checkout's own environment, .venv, with the project installed in it; quick when there is nothing to do.
#
#     bash tools/environment.sh [extra]        extra: docs, test, dev, ffcv, dali; none for what training needs
#
# Installs again only when pyproject.toml changed (or the checkout moved): a stamp in .venv is written after
# success, so an interrupted installation is repaired by the next call. PYTHON=/path/to/python chooses the
# interpreter of a new .venv.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"; exit ;; esac

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
extra="${1:-}"

complain() {
    echo "environment.sh: $*" >&2
    exit 1
}

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

choose_python() {
    if [[ -n "${PYTHON:-}" ]]; then
        new_enough "$PYTHON" || complain "PYTHON=$PYTHON does not run, or is older than Python 3.10"
        echo "$PYTHON"
        return
    fi
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if command -v "$candidate" >/dev/null && new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    complain "Python 3.10 or newer is needed ($(python3 --version 2>&1 || echo 'no python3 here'))." \
        "Install one, or name it: PYTHON=/path/to/python bash $0"
}

# Debian and Ubuntu keep the part of Python that makes environments (ensurepip) in a package of its own.
install_venv_module() {
    local python="$1" package as_root=()
    package="$("$python" -c 'import sys; print(f"python3.{sys.version_info[1]}-venv")')"
    if command -v apt-get >/dev/null && [[ $EUID -ne 0 ]] && command -v sudo >/dev/null; then
        as_root=(sudo)
        [[ -t 0 ]] || as_root=(sudo -n) # nobody is there to type a password
    elif [[ $EUID -ne 0 ]] || ! command -v apt-get >/dev/null; then
        complain "$python cannot make environments. Install its venv module, then run this again:" \
            "apt-get install $package"
    fi
    echo "$python has no venv module: installing $package"
    { "${as_root[@]}" apt-get update -q && "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -q "$package"; } ||
        complain "installing $package failed. Run: apt-get update && apt-get install $package"
}

make_venv() {
    local python
    python="$(choose_python)"
    "$python" -c 'import ensurepip, venv' 2>/dev/null || install_venv_module "$python"
    echo "making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
}

install_project() {
    echo "installing spark-fast${extra:+[$extra]} into $venv (torch is large: a few minutes the first time)"
    (cd "$root" && "$venv/bin/python" -m pip install -e ".${extra:+[$extra]}") ||
        complain "the installation failed; $venv has $(df -h --output=avail "$venv" | tail -1 | tr -d ' ') of disk left," \
            "and torch with CUDA takes 7 GB"
}

# Another demo.sh or test.sh of this checkout may be installing: wait for it. The lock goes with the process.
if command -v flock >/dev/null; then
    exec 9<"$root"
    flock 9
fi

usable() { new_enough "$venv/bin/python" && "$venv/bin/python" -c 'import pip' 2>/dev/null; }
usable || make_venv

installed="$root $(cksum <"$root/pyproject.toml")"
# Every extra brings the base along, and dev brings docs and test: such a stamp will do as well.
case "$extra" in
    "") enough=("" docs test dev ffcv dali) ;;
    docs | test) enough=("$extra" dev) ;;
    *) enough=("$extra") ;;
esac
for found in "${enough[@]}"; do
    if [[ "$(cat "$venv/installed-$found" 2>/dev/null)" == "$installed" ]]; then exit 0; fi
done
install_project
echo "$installed" >"$venv/installed-$extra"
