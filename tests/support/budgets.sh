#!/usr/bin/env bash
# tests/support/budgets.sh PYTHON: the error budgets as other CPUs have them: with every instruction set of torch's that this one
# has, MKL asked for the same, and with one thread and two. What really computed is printed before each run.
set -euo pipefail
python=${1:-python3}
cd "$(dirname "$0")/../.."

used() { # what torch and MKL say that they compute with
  MKL_VERBOSE=1 "$python" -c 'import torch; torch.ones(99, 99) @ torch.ones(99, 99); print(torch.backends.cpu.get_cpu_capability())' |
    sed -n 's/.*SGEMM.*CNR:\([A-Z0-9_,]*\).*/MKL \1,/p; /^MKL/d; s/^[A-Z0-9_]*$/torch &,/p' | tr '\n' ' '
}
# torch takes ATEN_CPU_CAPABILITY at its word, and dies of an instruction that the CPU lacks: no set above its own choice.
best=$(env -u ATEN_CPU_CAPABILITY "$python" -c 'import torch; print(torch.backends.cpu.get_cpu_capability().lower())')
for set in default:COMPATIBLE avx2:AVX2 avx512:AVX512; do
  export ATEN_CPU_CAPABILITY=${set%:*} MKL_CBWR=${set#*:}
  for threads in 1 2; do
    echo "$(used)threads $threads"
    GPTNEO_FAST_TEST_THREADS=$threads "$python" -m pytest -q tests/ops/test_cpu.py tests/ops/test_budget.py
  done
  [ "$ATEN_CPU_CAPABILITY" != "$best" ] || break
done
echo "the most that this CPU has is $best"
