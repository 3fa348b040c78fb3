"""A small trained GPT-Neo (3.6 million parameters) that tells children's stories; examples/demo_model/ made it."""

from pathlib import Path

FOLDER = Path(__file__).parent / "model"
"""The model's folder: config, weights (fp16), tokenizer. `gptneo_fast.load(FOLDER)` loads it."""
