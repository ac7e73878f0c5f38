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
UNEVEN = ["xyz abc ", "mno  ab\n"]
"""With white space where there is usually none."""


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
    for passage in ("word", "hello\\tworld", " hello\\tworld ", "word "):
        file.write_text(f'{{"text": "{passage}"}}\n', encoding="utf-8")
        with pytest.raises(ConfigError, match=r"l\.jsonl:1: .* at least two words"):
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
    data.write_text("".join(json.dumps({"text": p}) + "\n" for p in [*PASSAGES, *UNEVEN]), encoding="utf-8")
    write_lambada_task(tmp_path, data)
    results = run_harness(Successor(), Characters(), ["lambada_local"], include_path=tmp_path)["lambada_local"]
    ours = lambada_quality(Successor(), Characters(), [*PASSAGES, *UNEVEN])
    assert results["acc"] == ours.accuracy
    assert results["perplexity"] == pytest.approx(ours.perplexity, rel=1e-4)
    with pytest.raises(ConfigError, match="knows no task 'nonsense'"):
        run_harness(Successor(), Characters(), ["nonsense"])


def test_a_last_word_without_tokens_is_named():
    class Silent(Characters):
        def __call__(self, text, add_special_tokens=False, verbose=False):
            return {"input_ids": [ord(c) for c in text.partition(" ")[0]]}

    with pytest.raises(ConfigError, match="no last word after other tokens in the passage 'abc d'"):
        lambada_quality(Successor(), Silent(), ["abc d"])

    class LastWord(Characters):
        def __call__(self, text, add_special_tokens=False, verbose=False):
            return {"input_ids": [ord(c) for c in text.partition(" ")[2]]}

    with pytest.raises(ConfigError, match="no last word after other tokens in the passage 'abc def'"):
        lambada_quality(Successor(), LastWord(), ["abc def"])


def test_a_model_that_is_surely_wrong_has_infinite_perplexity():
    class Wrong(Successor):
        def logits(self, tokens):
            return torch.where(torch.arange(VOCABULARY) == 1, 0.0, -9000.0).expand(*tokens.shape, VOCABULARY)

    assert lambada_quality(Wrong(), Characters(), ["ab c"]).perplexity == math.inf


class Short(Successor):
    """Takes five tokens."""

    max_sequence = 5

    def logits(self, tokens):
        assert tokens.shape[1] <= 5
        return super().logits(tokens)


def test_the_end_of_a_long_passage_is_read():
    passages = ["mmmm nnnn xyz abc", "mmmm nnnn xyz abd"]
    assert lambada_quality(Short(), Characters(), passages) == lambada_quality(Successor(), Characters(), passages)
    with pytest.raises(ConfigError, match="the last word of the passage 'a bcdefgh' has 8 tokens; the model takes 5"):
        lambada_quality(Short(), Characters(), ["a bcdefgh"])


def test_white_space_at_the_end_is_no_word_and_spaces_before_the_last_word_are_its_own():
    plain = lambada_quality(Successor(), Characters(), ["xyz abc"])
    assert lambada_quality(Successor(), Characters(), ["xyz abc \n"]) == plain
    whole = list(map(ord, "xyz  abc"))
    likelihood, hit = continuation_likelihood(Successor(), whole[:3], whole[3:], 99)
    spaced = lambada_quality(Successor(), Characters(), ["xyz  abc"])
    assert (spaced.accuracy, spaced.perplexity) == (hit, pytest.approx(math.exp(-likelihood)))


def test_the_harness_gives_a_model_no_more_than_it_takes():
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    model = harness_model(Short(), Characters())
    scored = Instance(request_type="loglikelihood", doc={}, arguments=("x" * 30 + "a", "bc"), idx=0)
    assert model.loglikelihood([scored], disable_tqdm=True)[0][1]
    rolling = Instance(request_type="loglikelihood_rolling", doc={}, arguments=("abcdefghijkl",), idx=0)
    assert math.isfinite(model.loglikelihood_rolling([rolling])[0])
