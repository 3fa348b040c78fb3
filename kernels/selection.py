"""Which of many scores are the largest: bounds found by halving, without sorting."""

import triton
import triton.language as tl


@triton.jit
def ordered(x):
    """Integers in the order of float32 numbers."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def kth_largest(key, k):
    """The largest t that at least k of the keys reach: the k-th largest key. int64."""
    low = tl.full((), -2147483648, tl.int64)
    high = tl.full((), 2147483647, tl.int64)
    for _ in range(32):
        middle = low + ((high - low + 1) >> 1)
        enough = tl.sum((key >= middle).to(tl.int32)) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit
def nucleus(key, mass, share):
    """The smallest t for which the keys above t have less than `share` of the mass. int64."""
    bound = share * tl.sum(mass)
    low = tl.full((), -2147483648, tl.int64)
    high = tl.full((), 2147483647, tl.int64)
    for _ in range(32):
        middle = low + ((high - low) >> 1)
        less = tl.sum(tl.where(key > middle, mass, 0.0)) < bound
        high = tl.where(less, middle, high)
        low = tl.where(less, low, middle + 1)
    return high


@triton.jit
def first_k(key, valid, k):
    """Which of the keys are the k largest; of equal ones the first."""
    t = kth_largest(tl.where(valid, key, -2147483648), k)
    tied = valid & (key == t)
    room = k - tl.sum((valid & (key > t)).to(tl.int32))
    return valid & ((key > t) | (tied & (tl.cumsum(tied.to(tl.int32)) <= room)))
