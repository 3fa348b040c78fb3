"""A story in JAX: the embedded model, or any folder or hub id that is given, in the Flax classes.

python examples/flax_generate.py [MODEL]          (needs: pip install 'gptneo-fast[flax]')
"""

import sys

import jax

from gptneo_fast import FlaxGPTNeoForCausalLM, GPT2Tokenizer
from gptneo_fast.demo import FOLDER

name = sys.argv[1] if len(sys.argv) > 1 else FOLDER
model = FlaxGPTNeoForCausalLM.from_pretrained(name)  # safetensors, pytorch_model.bin or flax_model.msgpack
tokenizer = GPT2Tokenizer.from_pretrained(name)
inputs = tokenizer("Once upon a time", return_tensors="np")
out = model.generate(**inputs, max_new_tokens=40, do_sample=True, temperature=0.7, prng_key=jax.random.PRNGKey(0))
print(tokenizer.decode(out.sequences[0].tolist(), skip_special_tokens=True))
