"""A LoRA adapter on GPT-Neo with peft, trained on a few lines and used: pip install peft; python examples/lora.py"""

import torch
from peft import LoraConfig, get_peft_model

import gptneo_fast
from gptneo_fast.demo import FOLDER

torch.manual_seed(0)
model = gptneo_fast.load(FOLDER, dtype="float32", quantize="int8")  # frozen in 8 bits; the adapter is float32
tokenizer = model.tokenizer
tokenizer.pad_token = tokenizer.eos_token
adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
adapted.print_trainable_parameters()

lines = ["Tom the robot lived on the moon.", "Ann the fox had a red ship.", "Max the owl flew home."]
rows = tokenizer([line + tokenizer.eos_token for line in lines], return_tensors="pt", padding=True)
labels = rows.input_ids.masked_fill(rows.attention_mask == 0, -100)
optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=3e-3)
adapted.train()
losses = []
for _ in range(120):
    loss = adapted(**rows, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")

adapted.eval()
ids = tokenizer("Tom the robot", return_tensors="pt").input_ids
print(tokenizer.decode(adapted.generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0]))
with adapted.disable_adapter():
    print("without:", tokenizer.decode(adapted.generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0]))
