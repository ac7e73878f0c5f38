"""The data format of ``docs/format.md``: one quantized layer, its packing, and the safetensors container."""
