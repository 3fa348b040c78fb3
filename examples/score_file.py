"""Which lines of a file a model finds likely: python examples/score_file.py [file] [folder or hub id]"""

import sys
from pathlib import Path

import gptneo_fast
from gptneo_fast.demo import FOLDER

LINES = ["Once upon a time there was a little fox.", "Once upon a fox there time was little a.", "The dog went to the river."]
lines = Path(sys.argv[1]).read_text().splitlines() if len(sys.argv) > 1 else LINES
model = gptneo_fast.load(sys.argv[2] if len(sys.argv) > 2 else FOLDER)

scores = model.score(lines, context="", want=["logprob", "greedy"])  # "": each begins a text, so that its first token counts
for line, score in sorted(zip(lines, scores, strict=True), key=lambda pair: -pair[1].total / max(1, len(pair[1].tokens))):
    n = max(1, len(score.tokens))
    print(f"{score.total / n:8.3f} a token, {score.greedy.float().mean():4.0%} of them the likeliest: {line}")

print("perplexity of all lines together:", round(model.perplexity("\n".join(lines)), 2))
vectors = model.embed(lines, normalize=True)
print("cosine of the first two:", round(float(vectors[0] @ vectors[1]), 3))
