"""Language-model quality: perplexity, KL divergence to the original model and top-1 agreement, over windows of running
text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from .models import LogitsModel

# Positions whose probabilities are computed at once: 128 x 49152 float64 is 50 MB.
_CHUNK = 128

Progress = Callable[[int, int, "LanguageQuality"], None]


@dataclass(frozen=True)
class LanguageQuality:
    """Quality over a text. Natural logarithms; KL in nats a token.

    Attributes:
        perplexity: exp of the mean negative log-likelihood over all predicted tokens.
        negative_log_likelihood: that mean.
        windows, length: number of windows and their tokens.
        predicted: predicted tokens, ``windows * (length - 1)``.
        reference_perplexity: of the original model on the same tokens; None without a reference, as are all that
            follow.
        kl_mean, kl_median, kl_p99, kl_max: KL(original || model) over positions, as llama.cpp's perplexity tool reports
            it.
        top1_agreement: share of positions where both models rank the same token first; NaN if a position has logits that
            cannot be ranked.
    """

    perplexity: float
    negative_log_likelihood: float
    windows: int
    length: int
    predicted: int
    reference_perplexity: float | None = None
    kl_mean: float | None = None
    kl_median: float | None = None
    kl_p99: float | None = None
    kl_max: float | None = None
    top1_agreement: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


def read_text(path: str | Path) -> str:
    """A UTF-8 text file as it is, line ends included.

    Raises:
        ConfigError: missing, empty or not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"text file {str(path)!r} does not exist")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"text file {str(path)!r} is not UTF-8: {error}") from error
    if not text.strip():
        raise ConfigError(f"text file {str(path)!r} is empty")
    return text


def token_windows(
    text: str, tokenizer: Any, length: int = 2048, limit: int | None = None, bos_token_id: int | None = None
) -> torch.Tensor:
    """Non-overlapping windows of a text, as GPTQ's and llama.cpp's perplexity take them.

    The text is tokenized in one piece without special tokens; the tail that does not fill a window is left out.

    Args:
        text: running text, joined as it is.
        tokenizer: a transformers tokenizer, or a function from text to token ids.
        length: tokens a window (the literature's context length).
        limit: windows at most.
        bos_token_id: token that replaces the first of every window (llama.cpp does so for models trained with it);
            None: none.

    Returns:
        int64 ``[windows, length]``.

    Raises:
        ConfigError: the text is shorter than one window.
    """
    if length < 2:
        raise ConfigError(f"a window needs at least 2 tokens, got length {length}")
    if hasattr(tokenizer, "encode_plus") or hasattr(tokenizer, "add_special_tokens"):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        ids = list(tokenizer(text))
    count = len(ids) // length
    if count == 0:
        raise ConfigError(f"the text has {len(ids)} tokens, less than one window of {length}")
    count = min(count, limit) if limit else count
    windows = torch.tensor(ids[: count * length], dtype=torch.int64).reshape(count, length)
    if bos_token_id is not None:
        windows[:, 0] = bos_token_id
    return windows


def language_quality(
    model: LogitsModel,
    windows: torch.Tensor | Sequence[torch.Tensor],
    reference: LogitsModel | None = None,
    progress: Progress | None = None,
) -> LanguageQuality:
    """Run a model over windows, one at a time.

    Each window is scored on its own: its tokens 1 to S-1 are predicted from those before them in the window.

    Args:
        model: the model under evaluation.
        windows: int64 ``[W, S]``, or W tensors ``[S]``.
        reference: the original model; gives KL divergence and top-1 agreement.
        progress: called after each window with windows done, windows in all, and the quality so far.

    Raises:
        ConfigError: the two models have vocabularies of different size.
    """
    losses: list[torch.Tensor] = []
    reference_losses: list[torch.Tensor] = []
    divergences: list[torch.Tensor] = []
    agreements: list[torch.Tensor] = []
    total = len(windows)

    def result() -> LanguageQuality:
        length = len(windows[0])
        nll = float(torch.cat(losses).mean())
        quality = {
            "perplexity": perplexity_of(nll),
            "negative_log_likelihood": nll,
            "windows": len(losses),
            "length": length,
            "predicted": sum(x.numel() for x in losses),
        }
        if reference is not None:
            kl = torch.cat(divergences)
            quality |= {
                "reference_perplexity": perplexity_of(float(torch.cat(reference_losses).mean())),
                "kl_mean": float(kl.mean()),
                "kl_median": float(kl.quantile(0.5)),
                "kl_p99": float(kl.quantile(0.99)),
                "kl_max": float(kl.max()),
                "top1_agreement": float(torch.cat(agreements).mean()),
            }
        return LanguageQuality(**quality)  # type: ignore[arg-type]

    for number, window in enumerate(windows):
        tokens = window.reshape(1, -1)
        target = tokens[0, 1:]
        logits = model.logits(tokens)[0, :-1].cpu()
        if reference is None:
            losses.append(torch.cat([_losses(part, t) for part, t in _chunks(logits, target)]))
        else:
            original = reference.logits(tokens)[0, :-1].cpu()
            if original.shape != logits.shape:
                raise ConfigError(
                    f"model and reference have vocabularies of {logits.shape[-1]} and {original.shape[-1]} tokens; "
                    "KL divergence needs the same"
                )
            parts = [
                _compare(part, base, t)
                for (part, t), (base, _) in zip(_chunks(logits, target), _chunks(original, target), strict=True)
            ]
            for collected, values in zip(
                (losses, reference_losses, divergences, agreements), zip(*parts, strict=True), strict=True
            ):
                collected.append(torch.cat(values))
        if progress is not None:
            progress(number + 1, total, result())
    return result()


def perplexity_of(loss: float) -> float:
    """exp of a mean loss; infinity beyond what a float holds, NaN of NaN."""
    return math.inf if loss >= 700 else math.exp(loss)


def _chunks(logits: torch.Tensor, target: torch.Tensor) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    return zip(logits.split(_CHUNK), target.split(_CHUNK), strict=True)


def _losses(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each target, float64 ``[S]``."""
    return torch.nn.functional.cross_entropy(logits.float(), target, reduction="none").double()


def _compare(
    logits: torch.Tensor, original: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per position: both losses, KL(original || model), and agreement of the first ranks."""
    q = logits.float().log_softmax(-1)
    p = original.float().log_softmax(-1)
    pick = target[:, None]
    return (
        -q.gather(1, pick)[:, 0].double(),
        -p.gather(1, pick)[:, 0].double(),
        divergence(p, q),
        agreement(original, logits),
    )


def divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of distributions given as log-probabilities ``[..., V]``: float64 ``[...]``, in nats.

    What p rules out adds nothing, whatever q says of it.
    """
    probability = p.exp()
    return torch.where(probability == 0, 0.0, probability * (p - q)).sum(-1, dtype=torch.float64)


def agreement(original: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Whether logits ``[..., V]`` have the same first rank: float64 ``[...]`` of 1 and 0, NaN where one side has no rank.

    There is none among NaN, nor where the largest logit is infinite: ``argmax`` would say 0, which may be right by chance.
    """
    (most, first), (expected, wanted) = logits.max(-1), original.max(-1)
    ranked = most.isfinite() & expected.isfinite()
    return torch.where(ranked, (first == wanted).double(), math.nan)


class LogitsComparison:
    """KL divergence and first-rank agreement of an artifact with its original, position by position as logits come."""

    def __init__(self) -> None:
        self._divergences: list[torch.Tensor] = []
        self._agreements: list[torch.Tensor] = []

    def add(self, original: torch.Tensor, logits: torch.Tensor, counted: torch.Tensor | None = None) -> None:
        """Compare logits ``[..., V]``.

        Args:
            original, logits: of the original and of the artifact.
            counted: bool ``[...]``: which positions count; None: all.

        Raises:
            ConfigError: the shapes differ.
        """
        if original.shape != logits.shape:
            raise ConfigError(
                f"artifact and original give logits of shape {list(logits.shape)} and {list(original.shape)}"
            )
        kl = divergence(original.float().log_softmax(-1), logits.float().log_softmax(-1))
        same = agreement(original, logits)
        self._divergences.append(kl.flatten() if counted is None else kl[counted])
        self._agreements.append(same.flatten() if counted is None else same[counted])

    def measures(self) -> dict[str, float]:
        """Mean and 99th percentile of the divergence, and the share of positions that agree, by name."""
        kl = torch.cat(self._divergences)
        return {
            "kl_mean": float(kl.mean()),
            "kl_p99": float(kl.quantile(0.99)),
            "top1_agreement": float(torch.cat(self._agreements).mean()),
        }
