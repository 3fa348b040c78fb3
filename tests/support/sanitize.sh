#!/usr/bin/env bash
# tests/support/sanitize.sh PYTHON: the extension's tests with builds of it under AddressSanitizer and UBSan, in a copy of the
# sources: the CPU side, then the CUDA side of kv_append run on the CPU in its place (cuda_on_host/). torch is not
# instrumented, but its allocations are watched: a byte read or written past a tensor, or a vector off its alignment, ends
# the run with a report. Before them, the CPU's loops on several threads under ThreadSanitizer (threads.cpp).
set -euo pipefail
python=$(realpath -s "${1:-python3}")
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
git ls-files -co --exclude-standard | tar cf - --ignore-failed-read -T - 2> /dev/null | tar xf - -C "$work"
cd "$work"
ln -s ../kernels gptneo_fast/kernels
export CXX="g++ -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined" CUDA_HOME=/nowhere PYTHONPATH=$work
"$python" setup.py -q build_ext --inplace > build.log || { cat build.log; exit 1; }
grep -q "built for the CPU only" build.log || { cat build.log; exit 1; }
torch=$("$python" -c 'import torch; print(torch.__path__[0])')
flags="-std=c++17 -fPIC -Wno-psabi -DTORCH_TARGET_VERSION=0x020b000000000000 -DGPTNEO_FAST_CUDA -isystem $torch/include"
ops=$(ls csrc/*.cpp | grep -v -e kv_append_cpu -e decode_lanes)
$CXX $flags -shared -I tests/support/cuda_on_host $ops build/temp*/decode_lanes.cpp.*.o \
  tests/support/cuda_on_host/kv_append_cpu.cpp -L "$torch/lib" -lc10 -ltorch_cpu -o cuda_on_host.so
# ThreadSanitizer does not know torch's OpenMP, so the threads are of the standard library and there is no torch.
for lanes in "4" "8 -mavx2 -mfma -mf16c"; do
  [ "$lanes" = 4 ] || grep -q avx2 /proc/cpuinfo || continue
  g++ -g -O1 -std=c++17 -Wno-psabi -fsanitize=thread -DGPTNEO_FAST_LANES=$lanes tests/support/threads.cpp csrc/decode_lanes.cpp \
    -pthread -o threads
  ./threads
done
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 # Python leaks at exit; torch defines some symbols twice
# --capture=sys leaves the sanitizers' reports their stderr; the tests left out build libraries of their own, or fork,
# which AddressSanitizer's allocator does not survive beside threads.
tests() { "$python" -m pytest -q --capture=sys -p no:cacheprovider -k "not sanitizers and not another_torch and not forked" "$@"; }
cpu=0 cuda=0 # either half runs whatever became of the other
tests tests/ops/test_extension.py tests/ops/test_drawing.py tests/ops/test_cpu.py tests/ops/test_cpu_attention.py tests/ops/test_quantized.py \
  tests/models/test_quantize.py::test_what_stands_behind_a_tensor_in_memory_does_not_matter tests/network/test_decoding*.py || cpu=$?
GPTNEO_FAST_TEST_LIBRARY=$work/cuda_on_host.so tests tests/ops/test_extension.py || cuda=$?
echo "under sanitizers: the CPU side exited with $cpu, the CUDA side on the CPU with $cuda"
exit $((cpu ? cpu : cuda))
