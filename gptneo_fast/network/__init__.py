"""The network over the ops: modules, KV cache, masks, checks of inputs, output classes. It knows neither files nor text."""
