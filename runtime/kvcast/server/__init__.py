"""``kvcast serve``: llama-cpp-python's OpenAI-compatible API on ``kvcast.Llama``, a page to chat on, and a map of the context."""
