"""Which layer carries a fact from one prompt to another: hooks that keep and replace what a block gives.

python examples/activation_patching.py
"""

import gptneo_fast
from gptneo_fast.demo import FOLDER

model = gptneo_fast.load(FOLDER)
encode = lambda text: model.tokenizer(text, return_tensors="pt").input_ids  # noqa: E731
clean, other = encode("The dog was very happy. The dog"), encode("The cat was very happy. The cat")
assert clean.shape == other.shape

kept = {}
hooks = [
    block.register_forward_hook(lambda module, args, out, i=i: kept.update({i: out[0] if isinstance(out, tuple) else out}))
    for i, block in enumerate(model.transformer.h)
]
before = model(clean).logits[0, -1].log_softmax(-1)
for hook in hooks:
    hook.remove()
base = model(other).logits[0, -1].log_softmax(-1)

for i, block in enumerate(model.transformer.h):

    def patch(module, args, out, i=i):
        """The last token's state of the first prompt in the place of the second's."""
        hidden = (out[0] if isinstance(out, tuple) else out).clone()
        hidden[:, -1] = kept[i][:, -1]
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    hook = block.register_forward_hook(patch)
    patched = model(other).logits[0, -1].log_softmax(-1)
    hook.remove()
    moved = (patched - base).norm() / (before - base).norm()
    print(f"layer {i}: {moved:.0%} of the way to the first prompt's prediction")
