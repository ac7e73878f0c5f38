"""A service that embeds sentences and generates text in ONNX Runtime, as many run one.

MODEL=encoder/model.onnx GENERATOR=decoder/model.onnx uvicorn MODULE:app
"""

import json
import os
from pathlib import Path

import numpy as np
import onnxruntime
from decoding import Decoder
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field
from tokenizers import Tokenizer

import claq_runtime

MODEL = Path(os.environ["MODEL"])
GENERATOR = Path(os.environ["GENERATOR"])
THREADS = int(os.environ.get("THREADS", "1"))

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = THREADS
claq_runtime.register(options)
session = onnxruntime.InferenceSession(MODEL, options, providers=["CPUExecutionProvider"])
names = {value.name for value in session.get_inputs()}
decoder = Decoder(GENERATOR, options)

tokenizer = Tokenizer.from_file(str(MODEL.parent / "tokenizer.json"))
tokenizer.enable_truncation(max_length=256)
tokenizer.enable_padding()

app = FastAPI(title="embeddings and text")


class Sentences(BaseModel):
    sentences: list[str] = Field(min_length=1, max_length=64)


class Prompt(BaseModel):
    prompt: str = Field(min_length=1, max_length=20_000)
    max_new_tokens: int = Field(default=64, ge=1, le=512)


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


@app.post("/generate")
def generate(request: Prompt) -> StreamingResponse:
    """A line of JSON for each token as soon as it is there: ``{"token": 253, "text": " the"}``."""
    prompt = decoder.tokenizer.encode(request.prompt).ids
    if not 0 < len(prompt) <= decoder.context - request.max_new_tokens:
        raise HTTPException(422, f"{len(prompt)} prompt and {request.max_new_tokens} new tokens; {decoder.context} fit")
    steps = decoder.stream(prompt, request.max_new_tokens)
    lines = (json.dumps({"token": token, "text": text}) + "\n" for token, text in steps)
    return StreamingResponse(lines, media_type="application/x-ndjson")
