#!/usr/bin/env bash
# All runs of "What pre-training gives" in benchmarks/README.md, then its tables and picture. Goes on where it was.
#
#     bash benchmarks/evidence.sh cifar10.tar.gz /tmp/evidence
set -euo pipefail
data="$(realpath "$1")" out="$(realpath -m "$2")"
cd "$(dirname "${BASH_SOURCE[0]}")"

python learning_scans.py "$out/scans_images"
python learning.py --form evidence_scans --data "$out/scans_images" --out "$out/scans"
python learning.py --form evidence --data "$data" --out "$out"
python learning.py --form evidence_resnet18 --data "$data" --out "$out/resnet18"
python learning_report.py --form evidence_scans --out "$out/scans" --write README.md
python learning_report.py --form evidence --out "$out" --write README.md --picture accuracy.png
python learning_report.py --form evidence_resnet18 --out "$out/resnet18" --write README.md
