"""Last-word accuracy, by our own task and by lm-evaluation-harness where it is installed."""

import json
import math

import pytest
import torch

from claq_export.errors import ConfigError
from claq_export.evaluation import lambada_quality, read_passages
from claq_export.evaluation.harness import continuation_likelihood, harness_model, run_harness, write_lambada_task

VOCABULARY = 128


class Characters:
    """A tokenizer of one character a token."""

    bos_token_id = eos_token_id = 3
    name_or_path = "characters"
    chat_template = None

    def __call__(self, text, add_special_tokens=False, verbose=False):
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, ids):
        return "".join(map(chr, ids))


class Successor:
    """Is sure that the next character is the next letter; after a space or past z it has no idea."""

    def logits(self, tokens):
        logits = torch.zeros(*tokens.shape, VOCABULARY)
        known = (tokens >= ord("a")) & (tokens < ord("z"))
        logits.scatter_(-1, (tokens + 1).clamp(max=VOCABULARY - 1)[..., None], 9.0 * known[..., None].float())
        logits[..., ord(" ")] += 5.0 * (tokens == ord("z")).float()
        logits[..., ord("a")] += 5.0 * (tokens == ord(" ")).float()
        return logits


PASSAGES = ["xyz abc", "xyz abd", "z abcdef", "mno zz"]


def test_a_passage_counts_when_every_token_of_its_last_word_ranks_first():
    quality = lambada_quality(Successor(), Characters(), PASSAGES)
    assert quality.accuracy == 0.5
    assert quality.passages == 4
    losses = [
        -continuation_likelihood(Successor(), list(map(ord, p[: p.index(" ")])), list(map(ord, p[p.index(" ") :])), 99)[
            0
        ]
        for p in PASSAGES
    ]
    assert quality.perplexity == pytest.approx(math.exp(sum(losses) / 4), rel=1e-6)


def test_continuation_likelihood_is_the_sum_of_log_probabilities():
    value, greedy = continuation_likelihood(Successor(), [ord("a")], [ord("b"), ord("c")], 100)
    sure = 9 - math.log(math.exp(9) + VOCABULARY - 1)
    assert value == pytest.approx(2 * sure, rel=1e-5)
    assert greedy
    assert continuation_likelihood(Successor(), [ord("q")] * 50 + [ord("a")], [ord("b"), ord("c")], 3)[
        0
    ] == pytest.approx(value)


def test_reader_names_the_bad_line(tmp_path):
    file = tmp_path / "l.jsonl"
    file.write_text('{"text": "a b"}\n{"txt": 1}\n', encoding="utf-8")
    assert read_passages(file, limit=1) == ["a b"]
    with pytest.raises(ConfigError, match=r"l\.jsonl:2"):
        read_passages(file)
    for wrong in ('{"text": 3}', "[1]", "\x00"):
        file.write_text(wrong, encoding="utf-8")
        with pytest.raises(ConfigError, match=r"l\.jsonl:1"):
            read_passages(file)
    file.write_text('{"text": "word"}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="at least two words"):
        read_passages(file)


def test_without_the_harness_the_error_says_what_to_install():
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match="pip install lm-eval"):
            harness_model(Successor(), Characters())


def test_harness_agrees_with_our_own_count(tmp_path):
    pytest.importorskip("lm_eval")
    data = tmp_path / "l.jsonl"
    data.write_text("".join(json.dumps({"text": p}) + "\n" for p in PASSAGES), encoding="utf-8")
    write_lambada_task(tmp_path, data)
    results = run_harness(Successor(), Characters(), ["lambada_local"], include_path=tmp_path)["lambada_local"]
    ours = lambada_quality(Successor(), Characters(), PASSAGES)
    assert results["acc"] == ours.accuracy
    assert results["perplexity"] == pytest.approx(ours.perplexity, rel=1e-4)
    with pytest.raises(ConfigError, match="knows no task 'nonsense'"):
        run_harness(Successor(), Characters(), ["nonsense"])
