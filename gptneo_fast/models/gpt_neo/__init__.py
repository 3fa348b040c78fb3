"""Where transformers keeps its GPT-Neo: the classes under the paths that scripts import them from."""
