"""What a review predicted for 1.3B in bfloat16 on an H100 before any GPU had run this code; a run confirms or refutes it.

A kernel's time includes the gap to the next one in a captured step.
"""

from __future__ import annotations

MODEL = "1.3B"

KERNEL_US = {  # by op and shape, as kernel_times names them
    "norm_qkv_append, 1x1": 10.3,
    "decode_attention, global batch 1, context 128": 5.0,
    "decode_attention, local batch 1, context 128": 5.0,
    "linear_add, out_proj 1x1": 4.8,
    "norm_linear, c_fc 1x1": 13.2,
    "linear_add, c_proj 1x1": 13.4,
    "lm_head, 1 rows": 75.0,
    "sample, greedy 1 rows": 4.0,
    "norm_qkv_append, 8x1": 15.0,
    "decode_attention, global batch 8, context 1024": 27.0,
    "decode_attention, local batch 8, context 1024": 9.0,
    "linear_add, out_proj 8x1": 6.5,
    "norm_linear, c_fc 8x1": 18.0,
    "linear_add, c_proj 8x1": 14.5,
    "lm_head, 8 rows": 80.0,
    "sample, greedy 8 rows": 8.0,
    "norm_qkv_append, 64x1": 34.0,  # 16 once one matrix of 64 rows is no batch of one
    "decode_attention, global batch 64, context 2048": 420.0,
    "decode_attention, local batch 64, context 2048": 58.0,
    "linear_add, out_proj 64x1": 8.0,
    "norm_linear, c_fc 64x1": 22.0,
    "linear_add, c_proj 64x1": 18.0,
    "lm_head, 64 rows": 95.0,
    "sample, greedy 64 rows": 10.0,
}

WHOLE_MS = {  # by work, as costs.WORK names it
    "decode 1, ctx 128": 1.20,
    "decode 1, ctx 128, early launch": 1.09,
    "decode 8, ctx 1024": 1.82,
    "decode 64, ctx 2048": 7.8,  # 7.2 with the mended qkv
    "prefill 1x2048": 9.4,  # on the device alone
    "scoring 32x512": 85.0,
}


def kernel_us(shape: str, what: str) -> float | None:
    """Microseconds predicted of a kernel."""
    return KERNEL_US.get(what) if shape == MODEL else None


def whole_ms(shape: str, what: str) -> float | None:
    """Milliseconds predicted of a step, a prompt or a scoring."""
    return WHOLE_MS.get(what) if shape == MODEL else None
