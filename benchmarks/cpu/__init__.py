"""pytest benchmarks on the CPU, and the peers measured there."""
