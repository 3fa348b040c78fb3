"""Numbers that kernels and Python share. It imports nothing, so that kernels may import it."""

LOGITS_ALIGN = 8  # a row of logits takes a multiple of this many elements

# `sample`; see `gptneo_fast.ops.sampling`
GREEDY, FREE, FEW, ALL = METHODS = range(4)  # the likeliest; temperature alone; top_k of up to KEEP; any top_k, top_p, min_p
KEEP = 64
TOKEN, PLACE, COUNT, STATUS, TICKET = STATE = range(5)  # rows of the state
FINISHED, BROKEN = STATUS_BITS = (1, 2)  # of a row
END, SUPPRESSED, NOT_FIRST = FLAGS = (1, 2, 4)  # bits of a token
