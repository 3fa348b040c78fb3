"""Text from a prompt, piece by piece: python examples/generate.py ["a prompt"] [folder or hub id]"""

import sys

import gptneo_fast
from gptneo_fast.demo import FOLDER  # a small model of stories, which every install has

prompt = sys.argv[1] if len(sys.argv) > 1 else "Once upon a time"
model = gptneo_fast.load(sys.argv[2] if len(sys.argv) > 2 else FOLDER)

print(prompt, end="", flush=True)
for piece in model.stream(prompt, max_new_tokens=60, do_sample=True, temperature=0.7, top_k=40, seed=0):
    print(piece, end="", flush=True)
print()

# Many prompts decode together, and come in their order
prompts = [f"The {animal} was" for animal in ("fox", "dog", "bird")]
for text, more in zip(prompts, model.generate_many(prompts, max_new_tokens=20), strict=True):
    print(f"- {text}{more}")
