#!/usr/bin/env bash
# tests/sanitize.sh PYTHON: the tests of the extension's CPU side with a build of it under AddressSanitizer and UBSan, in a
# copy of the sources. torch is not instrumented, but its allocations are watched: a byte read or written past a tensor ends
# the run with a report.
set -euo pipefail
python=$(realpath -s "${1:-python3}")
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
git ls-files -co --exclude-standard | tar cf - --ignore-failed-read -T - 2> /dev/null | tar xf - -C "$work"
cd "$work"
ln -s ../kernels gptneo_fast/kernels
export CXX="g++ -g -fsanitize=address,undefined -fno-sanitize-recover=undefined" CUDA_HOME=/nowhere PYTHONPATH=$work
"$python" setup.py -q build_ext --inplace > build.log || { cat build.log; exit 1; }
grep -q "built for the CPU only" build.log || { cat build.log; exit 1; }
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 # Python leaks at exit; torch defines some symbols twice
# --capture=sys leaves the sanitizers' reports their stderr; the tests left out build libraries of their own.
"$python" -m pytest -x -q --capture=sys -p no:cacheprovider tests/test_extension.py tests/test_cpu.py \
  -k "not sanitizers and not another_torch"
