"""Keys of an ONNX artifact's ``metadata_props`` that claq's own readers use (``docs/onnx.md`` lists all)."""

TASK = "claq.task"
"""The model's task, or empty."""

PARTS = "claq.parts"
"""JSON: stacked layer -> ``[[qualified name of a linear, its rows], ...]`` in the order of the layer's rows."""

TRANSPOSED = "claq.transposed"
"""JSON: sorted list of the layers whose weight the original model stores as ``[in_features, out_features]``."""

CACHE_BUFFERS = "claq.cache_buffers"
"""``1`` where past keys and values may be buffers with room for more tokens that each step writes into (with claq-runtime)."""
