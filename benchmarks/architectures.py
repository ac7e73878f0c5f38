"""Tries architectures of transformers by name, as a user would: a saved folder, an export, the file beside the model.

One small model of each with random weights is saved, exported at 4 bits without calibration, loaded back into
transformers from the artifact, and run by ONNX Runtime alone and with claq-runtime: several lengths, padding, and models that
generate token by token with their cache, against the model without one. Written to docs/models.md.

    python benchmarks/architectures.py                     # all of them, each in a process of its own (an hour on two cores)
    python benchmarks/architectures.py --only gemma2 bert  # some
    python benchmarks/architectures.py --page-only         # the page from the results there are
"""

from __future__ import annotations

import argparse
import importlib.metadata
import inspect
import json
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "support")]
RESULTS = ROOT / "benchmarks" / "results" / "architectures.json"
PAGE = ROOT / "docs" / "models.md"
TOLERANCE = 5e-5
TIME_LIMIT = 600

TRIED = {
    "text-generation": """llama mistral qwen2 qwen3 gemma gemma2 gemma3_text gemma3n_text gemma4_text phi phi3 gpt2 gptj
        gpt_neo gpt_neox gpt_neox_japanese gpt_bigcode opt bloom falcon mpt codegen olmo olmo2 olmo3 granite granitemoe
        granite_swa cohere cohere2 stablelm starcoder2 smollm3 helium nemotron persimmon gpt_oss qwen2_moe qwen3_moe mixtral
        deepseek_v2 deepseek_v3 glm glm4 glm4_moe exaone4 ernie4_5 ernie4_5_moe hunyuan_v1_dense llama4_text lfm2 arcee apertus
        biogpt bitnet xglm ctrl openai-gpt jetmoe doge minimax_m2 ministral ministral3 modernbert-decoder nanochat olmoe phimoe
        seed_oss vaultgemma youtu minicpm3 internlm3 cwm flex_olmo hyperclovax iquestcoder jais2 solar_open afmoe nemotron_h
        qwen3_5_text mamba mamba2 jamba rwkv bert roberta electra bart marian mbart pegasus plbart whisper xlm""",
    "text2text-generation": """t5 mt5 umt5 longt5 bart mbart marian pegasus pegasus_x m2m_100 nllb-moe blenderbot blenderbot-small
        plbart mvp fsmt bigbird_pegasus led prophetnet switch_transformers t5gemma""",
    "automatic-speech-recognition": "whisper",
    "fill-mask": """albert bert big_bird camembert convbert data2vec-text deberta deberta-v2 distilbert electra ernie
        eurobert flaubert fnet gte jina_embeddings_v3 layoutlm longformer megatron-bert mobilebert modernbert mpnet mra
        nomic_bert nystromformer rembert roberta roberta-prelayernorm roc_bert roformer squeezebert xlm xlm-roberta
        xlm-roberta-xl yoso""",
    "text-classification": """albert bart bert deberta-v2 distilbert electra gemma3_text gpt2 gpt_neox gte llama mistral
        modernbert opt phi3 qwen2 qwen3 roberta xlm-roberta nomic_bert""",
    "feature-extraction": """albert bert deberta-v2 distilbert electra gte jina_embeddings_v3 modernbert mpnet nomic_bert roberta
        xlm-roberta qwen3 qwen2 mistral gemma3_text llama eurobert clip_text_model splinter canine tapas nystromformer
        bert-generation layoutlm markuplm""",
    "image-classification": """beit data2vec-vision deit dinov2 dinov2_with_registers focalnet ijepa mobilevit pvt pvt_v2
        segformer swiftformer swin swinv2 vit vit_msn""",
    "image-feature-extraction": """vit dinov2 dinov2_with_registers dinov3_vit clip_vision_model siglip_vision_model beit swin
        ijepa mlcd_vision_model data2vec-vision""",
}

_CLASSES = {
    "text-generation": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "text2text-generation": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "automatic-speech-recognition": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "fill-mask": "MODEL_FOR_MASKED_LM_MAPPING",
    "text-classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "image-classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
}
_BASE = "MODEL_MAPPING"

# Settings that make a model small, under the names that one configuration or another has for them.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "dim", "emb_dim", "embedding_size", "word_embed_proj_dim"), 64
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "num_sparse_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner"), 160),
    **dict.fromkeys(
        (
            "max_position_embeddings",
            "n_positions",
            "max_seq_len",
            "n_ctx",
            "max_2d_position_embeddings",
            "max_target_positions",
            "max_encoder_position_embeddings",
            "max_decoder_position_embeddings",
        ),
        64,
    ),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(
        ("num_experts_per_tok", "moe_k", "moe_topk", "num_key_value_heads", "bos_token_id", "decoder_start_token_id"), 2
    ),
    **dict.fromkeys(("head_dim", "attention_head_dim", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "d_kv"), 16),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(
        ("sliding_window", "rotary_dim", "qk_rope_head_dim", "hidden_size_per_layer_input", "patch_size"), 8
    ),
    "hidden_dim": 160,
    "num_mel_bins": 8,
    "max_source_positions": 10,
    "q_lora_rank": 24,
    "image_size": 32,
    "num_channels": 3,
    "pad_token_id": 0,
    "eos_token_id": 3,
    "initializer_range": 0.08,
}
# May be set where the default is None.
_OPTIONAL = {"num_key_value_heads", "sliding_window", "head_dim", "pad_token_id", "bos_token_id", "eos_token_id"}
_LATENT = {"num_key_value_heads": 4, "head_dim": 8}  # multi-head latent attention: the rotated part alone
_SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "patch_size": 4}
_DECODER = {"is_decoder": True}
_T5GEMMA = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}
_OWN: dict[str, dict[str, Any]] = {
    "bert": _DECODER,
    "electra": _DECODER,
    "roberta": _DECODER,
    "big_bird": {"attention_type": "original_full"},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 32},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "position_buckets": 8,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
    },
    "deepseek_v2": {**_LATENT, "num_experts_per_tok": 2, "topk_method": "greedy"},
    "deepseek_v3": _LATENT,
    "minicpm3": _LATENT,
    "youtu": _LATENT,
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "laurel_rank": 8,
        "intermediate_size": 160,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "granite": {"embedding_multiplier": 12.0, "attention_multiplier": 0.1, "logits_scaling": 8.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba": {"state_size": 8, "time_step_rank": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 8},
    "mobilebert": {"intra_bottleneck_size": 32, "true_hidden_size": 32},
    "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 2},
    "modernbert-decoder": {"local_attention": 8, "global_attn_every_n_layers": 2},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "fsmt": {"src_vocab_size": 160, "tgt_vocab_size": 160, "langs": ["en", "de"]},
    "led": {"attention_window": 8},
    "t5gemma": {"encoder": _T5GEMMA, "decoder": {**_T5GEMMA, "cross_attention_hidden_size": 64}, "vocab_size": 160},
    "swin": _SWIN,
    "swinv2": _SWIN,
}


HEAD = f"""# Models that were tried

Written by [`benchmarks/architectures.py`](../benchmarks/architectures.py). Of each architecture that transformers has
under these names, one small model with random weights is saved as a folder, exported at 4 bits as `claq-export FOLDER` does,
loaded from the artifact by `from_pretrained`, and the two are compared: ONNX Runtime alone and with claq-runtime, at several
lengths, with padding, and models that generate token by token with their cache. Those that pass agree within
{TOLERANCE:.0e} of the largest output. A name here says that graph and operators are right, not how well a trained model takes
4 bits.
"""


def small_config(kind: str, task: str, vocabulary: int) -> Any:
    """The configuration of an architecture with every size that it has made small."""
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[kind]
    wanted = {**_SIZES, "vocab_size": vocabulary, "vocab_size_per_layer_input": vocabulary, "n_vocab": vocabulary}
    defaults = {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()}
    settings = {
        name: value
        for name, value in wanted.items()
        if name in defaults and (type(defaults[name]) in (int, float) or (defaults[name] is None and name in _OPTIONAL))
    }
    own = _OWN.get(kind, {})
    settings |= {} if own is _DECODER and task != "text-generation" else own
    default = cls()
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or ()))
    if kinds and "layer_types" in defaults and "layer_types" not in settings:
        settings["layer_types"] = (kinds * 2)[: max(2, len(kinds))]
        settings |= {
            name: len(settings["layer_types"]) for name in ("num_hidden_layers", "num_layers") if name in settings
        }
    if getattr(default, "mlp_layer_types", None):
        settings["mlp_layer_types"] = None
    return cls(**settings)


def save_small(kind: str, task: str, folder: Path) -> Any:
    """Save a model with random weights and a tokenizer; returns its class."""
    import torch
    import transformers.models.auto.modeling_auto as auto
    from tiny_models import save_tokenizer

    config = small_config(kind, task, save_tokenizer(folder))
    cls = getattr(auto, _CLASSES.get(task, _BASE))[type(config)]
    cls = cls[0] if isinstance(cls, tuple) else cls
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias") or value.dim() == 1:  # zeros and ones would not show that one is lost
                value.add_(torch.randn_like(value) * 0.05)
    model.save_pretrained(folder)
    return cls


def attempt(task: str, kind: str) -> dict[str, Any]:
    """What came of one architecture: ``deviations`` by run, or ``refused`` with claq's reason; ``cache``, ``loads``."""
    import torch

    import claq_export
    import claq_export.integrations.transformers
    import claq_runtime
    from claq_export.capture.captured import PARTS
    from claq_export.emit.artifact import part_path
    from claq_export.errors import ClaqError
    from claq_export.generation_seq2seq import is_seq2seq_folder
    from claq_export.onnx_session import open_session

    row: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        source, out = Path(scratch) / "model", Path(scratch) / "out" / "model.onnx"
        source.mkdir()
        cls = save_small(kind, task, source)
        config = claq_export.Config(bits=4, calibration="none", accuracy="fp32")
        try:
            claq_export.export(source, out=out, config=config, task=task)
        except ClaqError as error:
            row["refused"] = " ".join(str(error).replace(scratch, "").split())
            if "--no-cache" not in row["refused"]:
                return row
            claq_export.export(source, out=out, config=config, task=task, cache=False)
            row["cache"] = row.pop("refused")
        try:
            model = cls.from_pretrained(out.parent).eval()
        except ClaqError as error:
            row["loads"] = " ".join(str(error).split())
            model = cls.from_pretrained(source).eval()
            claq_export.load(out.parent, model)
        row["deviations"] = {}
        for name, library in (("stock", None), ("runtime", claq_runtime.library_path())):
            with torch.no_grad():
                if is_seq2seq_folder(out.parent):
                    sessions = [open_session(part_path(out, part), library) for part in PARTS]
                    row["deviations"][name] = _answered(sessions, model)
                else:
                    row["deviations"][name] = _deviation(task, open_session(out, library), model)
    return row


def _deviation(task: str, session: Any, model: Any) -> float:
    """Largest deviation of a session's output from the model's, relative to the largest value."""
    inputs = {value.name: value for value in session.get_inputs()}
    if "pixel_values" in inputs:
        return _images(session, model, task)
    if any(name.startswith("past_key_values") for name in inputs):
        return _token_by_token(session, model, inputs)
    return max(_tokens(session, model, inputs, *sizes) for sizes in ((1, 1, 0), (1, 9, 0), (3, 21, 6), (2, 33, 11)))


def _relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def _images(session: Any, model: Any, task: str) -> float:
    import torch

    (given,) = session.get_inputs()
    pixels = torch.randn(3, *given.shape[1:], generator=torch.Generator().manual_seed(1))
    result = model(pixel_values=pixels)
    wanted = result.logits if task == "image-classification" else result.last_hidden_state
    return _relative(session.run(None, {given.name: pixels.numpy()})[0], wanted.numpy())


def _some_tokens(batch: int, length: int, padding: slice) -> tuple[Any, Any]:
    """Tokens whose rows end as sentences do, and their mask; the last row is padded where ``padding`` says."""
    import torch

    tokens = torch.randint(5, 90, (batch, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[-1, padding] = 0
    if padding.stop is None:
        tokens[torch.arange(batch), mask.sum(1) - 1] = 3
    return tokens * mask, mask


def _tokens(session: Any, model: Any, inputs: Any, batch: int, length: int, padded: int) -> float:
    import torch

    tokens, mask = _some_tokens(batch, length, slice(length - padded, None))
    named = {
        "input_ids": tokens,
        "attention_mask": mask,
        "token_type_ids": torch.zeros_like(tokens),
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
        "decoder_input_ids": tokens[:, : length // 2 + 1],
    }
    given = {name: value for name, value in named.items() if name in inputs}
    result = model(**given)
    wanted = (result.logits if hasattr(result, "logits") else result.last_hidden_state).numpy()
    found = session.run(None, {name: value.numpy() for name, value in given.items()})[0]
    if wanted.shape[:2] == tuple(mask.shape):
        seen = mask.bool().numpy()
        return _relative(found[seen], wanted[seen])
    return _relative(found, wanted)


def _token_by_token(session: Any, model: Any, inputs: Any) -> float:
    """A padded batch and five greedy steps with the cache, against the model without one."""
    import torch

    from claq_export.cache_buffers import past_inputs

    tokens, mask = _some_tokens(3, 21, slice(0, 6))
    names = [value.name for value in session.get_outputs()]
    past = {name: kept.empty(3) for name, kept in past_inputs(session).items()}
    new, worst = tokens, 0.0
    for _ in range(6):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        count = new.shape[1]
        feed = {"input_ids": new, "attention_mask": mask, "position_ids": positions[:, -count:]}
        given = {name: value.numpy() for name, value in feed.items() if name in inputs}
        found = dict(zip(names, session.run(None, {**given, **past}), strict=True))
        past = {name: found[name.replace("past_key_values", "present")] for name in past}
        whole = {"position_ids": positions} if "position_ids" in inputs else {}
        wanted = model(input_ids=tokens, attention_mask=mask, use_cache=False, **whole).logits[:, -count:].numpy()
        seen = mask[:, -count:].bool().numpy()
        worst = max(worst, _relative(found["logits"][seen], wanted[seen]))
        new = torch.tensor(wanted[:, -1:].argmax(-1))
        tokens, mask = torch.cat([tokens, new], 1), torch.cat([mask, torch.ones(3, 1, dtype=torch.int64)], 1)
    return worst


def _answered(sessions: list[Any], model: Any) -> float:
    """An encoder-decoder's two tokens at once and five more with its cache, of a padded batch, against the model without one."""
    import torch

    encoder, step, later = sessions
    if any(value.name == "input_features" for value in encoder.get_inputs()):
        shape = encoder.get_inputs()[0].shape[1:]
        read = {"input_features": torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))}
    else:
        tokens, mask = _some_tokens(3, 21, slice(15, None))
        read = {"input_ids": tokens, "attention_mask": mask}
    named = {name: value.numpy() for name, value in read.items()}
    known = {
        "encoder_hidden_states": encoder.run(None, named)[0],
        "encoder_attention_mask": named.get("attention_mask"),
    }
    written, worst = torch.full((3, 2), 7), 0.0
    new = written
    for _ in range(6):
        feed = {**known, "input_ids": new.numpy()}
        names = [value.name for value in step.get_outputs()]
        found = dict(
            zip(names, step.run(None, {value.name: feed[value.name] for value in step.get_inputs()}), strict=True)
        )
        wanted = model(**read, decoder_input_ids=written, use_cache=False).logits[:, -new.shape[1] :].numpy()
        worst = max(worst, _relative(found.pop("logits"), wanted))
        known |= {name.replace("present", "past_key_values"): value for name, value in found.items()}
        new, step = torch.tensor(wanted[:, -1:].argmax(-1)), later
        written = torch.cat([written, new], 1)
    return worst


def one(task: str, kind: str) -> None:
    """Print the row of one architecture as JSON, last."""
    import torch

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    print(json.dumps(attempt(task, kind)), flush=True)


def in_a_process(task: str, kind: str) -> dict[str, Any]:
    """The row of one architecture, made by a process of its own."""
    command = [sys.executable, __file__, "--one", task, kind]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {TIME_LIMIT} s"}
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["nothing said"]
    return dict(json.loads(lines[-1])) if done.returncode == 0 else {"error": lines[-1]}


def passes(row: dict[str, Any]) -> bool:
    """Whether an artifact was written and both runs agree with the model in PyTorch."""
    return bool(row.get("deviations")) and max(row["deviations"].values()) <= TOLERANCE


def page(results: dict[str, Any]) -> str:
    """docs/models.md."""
    versions = ", ".join(f"{name} {results[name]}" for name in ("transformers", "torch", "onnxruntime"))
    text = [HEAD, f"{versions}, {results['date']}.\n"]
    for task, names in TRIED.items():
        found = results["tasks"].get(task, {})
        rows = {kind: found[kind] for kind in names.split() if kind in found}
        good = {kind: row for kind, row in rows.items() if passes(row)}
        text.append(f"## {task}: {len(good)} of {len(rows)}\n")
        for title, chosen in (
            ("", [kind for kind, row in good.items() if "cache" not in row]),
            ("Without a cache (`--no-cache`): ", [kind for kind, row in good.items() if "cache" in row]),
            (
                "Loaded by `claq_export.load`, not by `from_pretrained`: ",
                [kind for kind, row in good.items() if "loads" in row],
            ),
        ):
            if chosen:
                text.append(title + ", ".join(f"`{kind}`" for kind in chosen) + "\n")
        bad = {kind: row for kind, row in rows.items() if kind not in good}
        if bad:
            text.append("Not:\n")
            text += [f"- `{kind}`: {_why(row)}" for kind, row in bad.items()]
            text.append("")
    return "\n".join(text).rstrip("\n") + "\n"


def _why(row: dict[str, Any]) -> str:
    if "deviations" in row:
        runs = ", ".join(f"{name} {value:.0e}" for name, value in row["deviations"].items())
        return f"deviates: {runs}"
    reason = str(row.get("refused") or row["error"])
    return reason if len(reason) < 220 else reason[:217] + "..."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="names of architectures")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--page-only", action="store_true", help="write the page from the results there are")
    parser.add_argument("--one", nargs=2, metavar=("TASK", "NAME"), help="try one here and print what came of it")
    options = parser.parse_args()
    if options.one:
        one(*options.one)
        return
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"tasks": {}}
    if not options.page_only:
        results |= {name: importlib.metadata.version(name) for name in ("transformers", "torch", "onnxruntime")}
        results["date"] = time.strftime("%Y-%m-%d")
        pairs = [(task, kind) for task, names in TRIED.items() for kind in names.split()]
        wanted = [pair for pair in pairs if not options.only or pair[1] in options.only]
        with ThreadPoolExecutor(options.jobs) as pool:
            for (task, kind), row in zip(wanted, pool.map(lambda pair: in_a_process(*pair), wanted), strict=True):
                print(f"{task} {kind}: {row}", flush=True)
                results["tasks"].setdefault(task, {})[kind] = row
                RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
