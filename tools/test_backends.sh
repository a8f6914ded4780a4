#!/usr/bin/env bash
# The tests of the optional decoders, FFCV and DALI, with both really installed into the checkout's .venv; those that
# ask djpeg, libjpeg's own command, which images are damaged; those of shards on servers of S3 and Google Cloud Storage,
# which moto and gcp-storage-emulator play; and the conversion on Ray.
#
#     bash tools/test_backends.sh
#
# Skipped only where the package registry cannot be reached, and then it says so.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"; exit ;; esac

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/tools/environment.sh" dev
cd "$root"
python="$root/.venv/bin/python"
packages="$("$python" -c 'from spark_fast.commands import FFCV_SYSTEM_PACKAGES as found; print(*found)')"
read -ra system <<<"$packages libjpeg-turbo-progs" # FFCV is compiled against these; djpeg

have_system_packages() {
    command -v djpeg >/dev/null && command -v pkg-config >/dev/null && pkg-config --exists libturbojpeg opencv4
}

install_system_packages() {
    local as_root=()
    if [[ $EUID -ne 0 ]]; then as_root=(sudo -n); fi
    "${as_root[@]}" apt-get update -q &&
        "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${system[@]}"
}

registry_answers() {
    "$python" -m pip download --quiet --no-deps --dest "$(mktemp -d)" tomli-w >/dev/null 2>&1
}

echo "== FFCV and DALI, installed for real"
if ! registry_answers; then
    echo "SKIPPED: the package registry cannot be reached, so FFCV and DALI cannot be installed here"
    exit 0
fi
if ! have_system_packages && ! install_system_packages; then
    echo "SKIPPED: the registry of system packages cannot be reached, so FFCV cannot be compiled here (${system[*]})"
    exit 0
fi
"$python" -m pip install --quiet -e ".[ffcv,dali]" s3fs 'moto[server]>=5' gcsfs gcp-storage-emulator ray # from s3fs on: 700 MB
"$python" -c 'import ffcv, nvidia.dali, s3fs, moto.server, gcsfs, gcp_storage_emulator, ray'

export OMP_WAIT_POLICY=passive
exec "$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder --full -m "ffcv or dali or djpeg or s3 or gs or ray"
