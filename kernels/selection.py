"""Which of many scores are the largest: bounds found by halving, without sorting."""

import triton
import triton.language as tl


@triton.jit
def ordered(x):
    """Integers in the order of float32 numbers, where -0 and 0 are one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def kth_largest(key, k):
    """The largest t that at least k of the keys reach: the k-th largest key."""
    low = tl.full((), -2147483648, tl.int64)
    high = tl.full((), 2147483647, tl.int64)
    for _ in range(32):
        middle = low + ((high - low + 1) >> 1)
        enough = tl.sum((key >= middle.to(tl.int32)).to(tl.int32)) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low.to(tl.int32)


@triton.jit
def nucleus(key, mass, bound):
    """The smallest t for which the keys above t have less mass than `bound`."""
    low = tl.full((), -2147483648, tl.int64)
    high = tl.full((), 2147483647, tl.int64)
    for _ in range(32):
        middle = low + ((high - low) >> 1)
        less = tl.sum(tl.where(key > middle.to(tl.int32), mass, 0.0)) < bound
        high = tl.where(less, middle, high)
        low = tl.where(less, low, middle + 1)
    return high.to(tl.int32)


@triton.jit
def first_k(key, ids, valid, k):
    """Which of the keys are the k largest; of equal ones those with the lowest ids, which may come in any order."""
    t = kth_largest(tl.where(valid, key, -2147483648), k)
    tied = valid & (key == t)
    room = k - tl.sum((valid & (key > t)).to(tl.int32))
    last = tl.full((), 2147483647, tl.int32)
    if tl.sum(tied.to(tl.int32)) > room:
        last = -kth_largest(tl.where(tied, -ids, -2147483648), room)
    return valid & ((key > t) | (tied & (ids <= last)))
