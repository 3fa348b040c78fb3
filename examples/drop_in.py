"""A script written for transformers, after its import line was changed: python examples/drop_in.py"""

import torch

# from transformers import AutoModelForCausalLM, AutoTokenizer
from gptneo_fast import AutoModelForCausalLM, AutoTokenizer
from gptneo_fast.demo import FOLDER  # for "EleutherAI/gpt-neo-125m", which a script would have here

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token

inputs = tokenizer(["Once upon a time", "The little dog"], return_tensors="pt", padding=True)
torch.manual_seed(0)
out = model.generate(**inputs, max_new_tokens=40, do_sample=True, temperature=0.8, top_p=0.95)
for text in tokenizer.batch_decode(out, skip_special_tokens=True):
    print(text)

with torch.no_grad():
    loss = model(**inputs, labels=inputs["input_ids"]).loss
print("loss:", round(loss.item(), 3))
