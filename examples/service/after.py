"""A service that embeds sentences with all-MiniLM-L6-v2 in ONNX Runtime, as many run one.

MODEL=folder/model.onnx uvicorn MODULE:app
"""

import os
from pathlib import Path

import numpy as np
import onnxruntime
from fastapi import FastAPI
from pydantic import BaseModel, Field
from tokenizers import Tokenizer

import claq_runtime

MODEL = Path(os.environ["MODEL"])
THREADS = int(os.environ.get("THREADS", "1"))

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = THREADS
claq_runtime.register(options)
session = onnxruntime.InferenceSession(MODEL, options, providers=["CPUExecutionProvider"])
names = {value.name for value in session.get_inputs()}

tokenizer = Tokenizer.from_file(str(MODEL.parent / "tokenizer.json"))
tokenizer.enable_truncation(max_length=256)
tokenizer.enable_padding()

app = FastAPI(title="sentence embeddings")


class Sentences(BaseModel):
    sentences: list[str] = Field(min_length=1, max_length=64)


@app.get("/health")
def health() -> dict[str, str]:
    return {"status": "ok"}


@app.post("/embed")
def embed(request: Sentences) -> dict[str, list[list[float]]]:
    """Unit vectors: the mean of the token states over the attention mask."""
    encoded = tokenizer.encode_batch(request.sentences)
    mask = np.array([e.attention_mask for e in encoded], dtype=np.int64)
    feeds = {
        "input_ids": np.array([e.ids for e in encoded], dtype=np.int64),
        "attention_mask": mask,
        "token_type_ids": np.zeros_like(mask),
    }
    states = session.run(["last_hidden_state"], {name: feeds[name] for name in names})[0]
    weights = mask[..., None].astype(states.dtype)
    means = (states * weights).sum(1) / weights.sum(1)
    return {"embeddings": (means / np.linalg.norm(means, axis=1, keepdims=True)).tolist()}
