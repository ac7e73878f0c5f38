"""Perplexity and KL divergence against straightforward computations of their definitions."""

import itertools
import math

import pytest
import torch

from claq_export.errors import ConfigError, ModelError
from claq_export.evaluation import TorchModel, language_quality, read_text, token_windows


class Bigram(torch.nn.Module):
    """Logits that depend on the present token alone; small enough to check by hand."""

    def __init__(self, vocabulary: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("table", 3 * torch.randn(vocabulary, vocabulary, generator=generator))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table[tokens]


def windows_of(vocabulary: int, count: int, length: int) -> torch.Tensor:
    return torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(7))


def test_perplexity_is_exp_of_the_mean_loss_of_all_predicted_tokens():
    model, windows = Bigram(11, 1), windows_of(11, 3, 300)  # 300: more than one chunk of positions
    losses = []
    for window in windows.tolist():
        for now, following in itertools.pairwise(window):
            row = [float(v) for v in model.table[now].double()]
            losses.append(math.log(sum(math.exp(v) for v in row)) - row[following])
    quality = language_quality(TorchModel(model), windows)
    assert quality.predicted == 3 * 299 == len(losses)
    assert quality.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert quality.kl_mean is None


def test_kl_divergence_and_agreement_follow_their_definitions():
    model, original, windows = Bigram(13, 1), Bigram(13, 2), windows_of(13, 2, 200)
    quality = language_quality(TorchModel(model), windows, TorchModel(original))
    divergences, agree = [], 0
    for token in windows[:, :-1].flatten().tolist():
        p = torch.softmax(original.table[token].double(), 0)
        q = torch.softmax(model.table[token].double(), 0)
        divergences.append(float((p * (p / q).log()).sum()))
        agree += int(p.argmax()) == int(q.argmax())
    values = torch.tensor(divergences, dtype=torch.float64)
    assert quality.kl_mean == pytest.approx(float(values.mean()), rel=1e-5)
    assert quality.kl_median == pytest.approx(float(values.quantile(0.5)), rel=1e-4)
    assert quality.kl_p99 == pytest.approx(float(values.quantile(0.99)), rel=1e-4)
    assert quality.kl_max == pytest.approx(float(values.max()), rel=1e-5)
    assert quality.top1_agreement == pytest.approx(agree / len(divergences))
    alone = language_quality(TorchModel(original), windows)
    assert quality.reference_perplexity == pytest.approx(alone.perplexity, rel=1e-6)


def test_a_model_does_not_diverge_from_itself():
    model = TorchModel(Bigram(17, 3))
    quality = language_quality(model, windows_of(17, 2, 40), model)
    assert (quality.kl_mean, quality.kl_max, quality.top1_agreement) == (0.0, 0.0, 1.0)
    assert quality.perplexity == quality.reference_perplexity


def test_progress_ends_with_the_result():
    seen = []
    windows = windows_of(5, 3, 20)
    quality = language_quality(TorchModel(Bigram(5, 1)), windows, progress=lambda *step: seen.append(step))
    assert [(done, total) for done, total, _ in seen] == [(1, 3), (2, 3), (3, 3)]
    assert seen[-1][2] == quality


def test_vocabularies_must_match():
    with pytest.raises(ConfigError, match="vocabularies of 5 and 7"):
        language_quality(TorchModel(Bigram(5, 1)), windows_of(5, 1, 20), TorchModel(Bigram(7, 1)))


def test_windows_do_not_overlap_and_leave_the_tail_out():
    text = "abcdefghij"
    windows = token_windows(text, lambda t: [ord(c) for c in t], length=4)
    assert ["".join(map(chr, w)) for w in windows.tolist()] == ["abcd", "efgh"]
    assert token_windows(text, lambda t: [ord(c) for c in t], length=4, limit=1).shape == (1, 4)
    with_bos = token_windows(text, lambda t: [ord(c) for c in t], length=4, bos_token_id=1)
    assert with_bos[:, 0].tolist() == [1, 1]
    assert with_bos[1, 1:].tolist() == [ord(c) for c in "fgh"]


def test_text_shorter_than_a_window_is_named():
    with pytest.raises(ConfigError, match="10 tokens, less than one window of 11"):
        token_windows("abcdefghij", lambda t: [ord(c) for c in t], length=11)


def test_text_is_read_as_it_is(tmp_path):
    file = tmp_path / "t.txt"
    file.write_bytes(b" = A =\r\n\n x \n")
    assert read_text(file) == " = A =\r\n\n x \n"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_text(file)
    file.write_bytes(b" \n")
    with pytest.raises(ConfigError, match="empty"):
        read_text(file)
    with pytest.raises(ConfigError, match="does not exist"):
        read_text(tmp_path / "missing.txt")


def test_a_module_without_logits_is_named():
    class Nothing(torch.nn.Module):
        def forward(self, tokens):
            return {"other": tokens}

    with pytest.raises(ModelError, match="without logits"):
        TorchModel(Nothing()).logits(torch.zeros(1, 3, dtype=torch.int64))


class Constant(torch.nn.Module):
    """The same logits for every token."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.register_buffer("row", torch.tensor(logits))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.row.expand(*tokens.shape, -1)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_logits_without_a_rank_agree_with_nothing(broken):
    """Their ``argmax`` is 0, as the original's is here."""
    original, windows = TorchModel(Constant(4.0, 0.0, 0.0)), windows_of(3, 2, 20)
    quality = language_quality(TorchModel(Constant(broken, broken, broken)), windows, original)
    assert math.isnan(quality.top1_agreement)
    assert math.isnan(quality.kl_mean)


def test_a_masked_vocabulary_does_not_diverge_from_itself():
    model, windows = TorchModel(Constant(1.0, -math.inf, 2.0)), torch.zeros(2, 20, dtype=torch.int64)
    quality = language_quality(model, windows, model)
    assert (quality.kl_mean, quality.kl_max, quality.top1_agreement) == (0.0, 0.0, 1.0)
    other = language_quality(TorchModel(Constant(-math.inf, 0.0, 2.0)), windows, model)
    assert other.kl_mean == math.inf
