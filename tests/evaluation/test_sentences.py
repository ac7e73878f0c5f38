"""Pooling, rank correlation and the readers of similarity files."""

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity

from claq_export.errors import ConfigError
from claq_export.evaluation import SimilarityPair, embed, read_pairs, sentence_quality, spearman


class WordTokenizer:
    """Pads to the longest, as transformers' tokenizers do; a word is its length."""

    def __call__(self, texts, padding, truncation, max_length, return_tensors):
        rows = [[len(word) for word in text.split()][:max_length] for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


class Table:
    """Token embeddings from a table; padding gets a huge vector that pooling must leave out."""

    def __init__(self, seed: int) -> None:
        self.table = torch.randn(20, 6, generator=torch.Generator().manual_seed(seed))
        self.table[0] = 1e6

    def hidden(self, tokens, mask):
        return self.table[tokens]


SENTENCES = ["a bb ccc", "dddd", "ee fffff g hhh iiiiii jj", "kk a"]


def test_embedding_is_the_normalised_mean_over_real_tokens_in_given_order():
    model = Table(0)
    vectors = embed(model, WordTokenizer(), SENTENCES, batch_size=2)
    for vector, sentence in zip(vectors, SENTENCES, strict=True):
        mean = torch.stack([model.table[len(word)] for word in sentence.split()]).mean(0)
        torch.testing.assert_close(vector, mean / mean.norm())


def test_cosine_to_the_original():
    model, original = Table(0), Table(1)
    quality = sentence_quality(model, WordTokenizer(), sentences=SENTENCES, reference=original)
    a, b = embed(model, WordTokenizer(), SENTENCES), embed(original, WordTokenizer(), SENTENCES)
    expected = np.diag(cosine_similarity(a.numpy(), b.numpy()))
    assert quality.sentences == 4
    assert quality.cosine_mean == pytest.approx(expected.mean(), abs=1e-6)
    assert quality.cosine_min == pytest.approx(expected.min(), abs=1e-6)
    assert sentence_quality(model, WordTokenizer(), sentences=SENTENCES, reference=model).cosine_min == pytest.approx(1)


def test_rank_correlation_of_pairs():
    pairs = [
        SimilarityPair(a, b, s) for a, b, s in (("a", "a", 5), ("a bb", "ccc", 1), ("dddd", "ee a", 2.5), ("g", "h", 4))
    ]
    model = Table(3)
    quality = sentence_quality(model, WordTokenizer(), pairs=pairs, reference=model)
    cosines = [float(torch.dot(*embed(model, WordTokenizer(), [p.first, p.second]))) for p in pairs]
    assert quality.spearman == pytest.approx(100 * spearman(cosines, [p.score for p in pairs]))
    assert quality.reference_spearman == quality.spearman


def test_spearman_equals_scipy_with_ties():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 6, 30), rng.normal(size=30).round(1)
        assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert np.isnan(spearman([1, 1, 1], [1, 2, 3]))


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_no_rank_correlation_of_what_is_no_number(broken):
    assert np.isnan(spearman([broken, 1, 2, 3], [4, 1, 2, 3]))
    assert np.isnan(spearman([4, 1, 2, 3], [broken, 1, 2, 3]))


def test_both_forms_of_pair_files(tmp_path):
    stsb = tmp_path / "sts.csv"
    stsb.write_text(
        'g\tf\t2012\t1\t2.500\tA "b, c.\tD.\textra\nbroken line\ng\tf\t2012\t2\t0.0\tE\tF\n', encoding="utf-8"
    )
    assert read_pairs(stsb) == [SimilarityPair('A "b, c.', "D.", 2.5), SimilarityPair("E", "F", 0.0)]
    plain = tmp_path / "plain.csv"
    plain.write_text('sentence1,sentence2,score\n"a, b",c,3\n', encoding="utf-8")
    assert read_pairs(plain) == [SimilarityPair("a, b", "c", 3.0)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sentence1,score\na,1\n", "no column 'sentence2'"),
        ("sentence1,sentence2,score\na,b,high\n", "'high' is not a score"),
        ("sentence1,sentence2,score\na,b,nan\n", "'nan' is not a score"),
        ("sentence1,sentence2,score\na,b,1\na,b\n", r"pairs\.csv:3: a row of fewer fields"),
        ("sentence1,sentence2,score\n", "no sentence pairs"),
    ],
)
def test_malformed_pair_files_are_named(tmp_path, content, message):
    file = tmp_path / "pairs.csv"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_pairs(file)


def test_nothing_to_compare_with_is_an_error():
    with pytest.raises(ConfigError, match="reference"):
        sentence_quality(Table(0), WordTokenizer(), sentences=["a"])
    with pytest.raises(ConfigError, match="no sentences"):
        sentence_quality(Table(0), WordTokenizer(), reference=Table(0))


def test_pairs_of_another_encoding_are_named(tmp_path):
    file = tmp_path / "pairs.csv"
    file.write_bytes("sentence1,sentence2,score\ncaf\xe9,b,1\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"pairs\.csv' is not UTF-8"):
        read_pairs(file)


def test_embeddings_of_two_sizes_are_not_compared():
    class Wide(Table):
        def hidden(self, tokens, mask):
            return torch.cat([self.table[tokens]] * 2, -1)

    with pytest.raises(ConfigError, match="6 values, those of the reference 12"):
        sentence_quality(Table(0), WordTokenizer(), sentences=SENTENCES, reference=Wide(0))


def test_sentences_are_cut_to_what_both_models_take():
    class Short(Table):
        max_sequence = 3

        def hidden(self, tokens, mask):
            assert tokens.shape[1] <= 3
            return super().hidden(tokens, mask)

    class Shorter(Short):
        max_sequence = 2

    short = sentence_quality(Short(0), WordTokenizer(), sentences=["a bb ccc dddd"], reference=Shorter(1))
    cut = sentence_quality(Table(0), WordTokenizer(), sentences=["a bb"], reference=Table(1))
    assert short.cosine_mean == cut.cosine_mean
