"""The network over the ops: modules, the KV cache, masks, checks of inputs, output classes. Nothing here knows files or text."""
