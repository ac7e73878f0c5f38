"""The report is one self-contained page whose numbers are those of the stored layers."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from claq_export.errors import OutputError
from claq_export.format.layer import assemble
from claq_export.report import BudgetRecord, QualityRow, ReportData, layer_record, render_report, write_report
from claq_export.report.charts import bin_means
from claq_export.report.data import PARTS, bytes_by_part

N, K = 24, 70


def make_layer(bits, outliers=True, seed=0):
    """A stored layer and a weight near to it."""
    generator = torch.Generator().manual_seed(seed)
    width = torch.as_tensor(bits)
    codes = torch.stack([torch.randint(0, 1 << int(b), (N,), generator=generator) for b in width])
    centroids = torch.randint(-127, 128, (K, 16), generator=generator, dtype=torch.int8)
    kept = torch.zeros(N, K)
    if outliers:
        kept[[1, 5, 7], [3, 3, 40]] = torch.tensor([200.0, -300.0, 150.0])
    layer = assemble(codes, centroids, torch.full((K,), 0.01).half(), torch.linspace(0.5, 2, N).half(), width, kept)
    return layer, layer.dequantize() + 0.01 * torch.randn(N, K, generator=generator)


def mixed_bits():
    return [4] * 10 + [3] * 20 + [2] * 40


@pytest.fixture
def data():
    records = []
    for number, bits in enumerate((mixed_bits(), [4] * K)):
        layer, weight = make_layer(bits, outliers=number == 0, seed=number)
        records.append(
            layer_record(
                f"block.{number}.<proj>",
                layer,
                weight,
                nominal_bits=2.5 + number,
                error=0.0123 * (number + 1),
                seconds=1.5,
                parts=("block.0.q", "block.0.k") if number == 0 else (),
            )
        )
    return ReportData(
        "tiny & <model>",
        records,
        size_before=5_000_000,
        size_after=1_250_000,
        config={"bits": 2.5, "calibration": "</script><b>text"},
        quality=[QualityRow("perplexity", "29.22", "31.40", "8 windows")],
        seconds=125.0,
        versions={"claq": "0.1"},
        skipped={"lm_head": "tied to the embedding"},
    )


class Page(HTMLParser):
    """Collects tags, attributes and visible text, and checks that elements are closed in order."""

    VOID = frozenset({"meta", "link", "img", "br", "rect", "line", "circle", "input"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.loads, self.text = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.loads += [v for k, v in attributes if k in ("src", "href", "srcset", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, text):
        self.text.append(text)


def test_page_is_well_formed_and_loads_nothing(data):
    text = render_report(data)
    page = Page(text)
    assert page.loads == []
    assert "@import" not in text
    assert not re.search(r"url\(|https?://", text)
    assert text.count("</script>") == 2  # the settings' text must not end a script


def test_numbers_are_on_the_page(data):
    text = " ".join(Page(render_report(data)).text)
    size = sum(sum(layer.bytes.values()) for layer in data.layers)
    for expected in (
        "tiny & <model>",
        "5.00 MB",
        "1.25 MB",
        "4.00 times smaller",
        f"{8 * size / (2 * N * K):.3f}",
        "3.000",  # nominal: the mean of 2.5 and 3.5
        "2.460%",
        "31.40",
        "2 min 5 s",
        "stacked: q, k",
        "tied to the embedding",
        "</script><b>text",
    ):
        assert expected in text


def test_budget_is_shown_beside_what_was_asked_for(data):
    def shown(budget):
        return " ".join(Page(render_report(replace(data, budget=budget))).text)

    assert "Bit budget" not in shown(None)
    text = shown(BudgetRecord(1_000_000, 996_000, weights=3_200_000, floors={"*.down_<proj>": 3}))
    for expected in ("1.00 MB", "996.0 kB", "2.5000", "2.4900", "-0.40%", "*.down_<proj>: 3 bits"):
        assert expected in text
    assert "+0.00%" in shown(BudgetRecord(60_000_000, 59_999_999))
    text = shown(BudgetRecord(60_000_000, 60_060_000))
    for expected in ("whole artifact", "60.00 MB", "60.06 MB", "+0.10%", "least widths set: none"):
        assert expected in text


def test_tables_have_a_row_a_layer_with_sortable_values(data):
    page = Page(render_report(data))
    values = [a["data-value"] for tag, a in page.tags if tag == "td" and "data-value" in a]
    assert len(values) == 2 * 9
    assert values[1] == "block.0.<proj>"
    assert float(values[5]) == 0.0123


@pytest.mark.parametrize("bits", [mixed_bits(), [4] * K, [3] * 64 + [2] * 6])
@pytest.mark.parametrize("outliers", [False, True])
def test_parts_add_up_to_all_bytes(bits, outliers):
    layer, _ = make_layer(bits, outliers)
    sizes = bytes_by_part(layer)
    assert set(sizes) == set(PARTS)
    assert sum(sizes.values()) == sum(t.numel() * t.element_size() for t in layer.tensors().values())
    assert sizes["codes"] == sum(bits) * N // 8
    assert sizes["codebooks"] == sum(1 << b for b in bits)
    assert (sizes["outliers"] > 0) == outliers
    columns = layer.stored_columns - K
    assert (sizes["padding"] > 0) == (columns > 0)


def test_record_follows_the_stored_layer(data):
    layer, weight = make_layer(mixed_bits())
    record = data.layers[0]
    assert list(record.column_bits) == mixed_bits()
    assert record.outlier_share == 3 / (N * K)
    assert {s.bits for s in record.samples} == {4, 3, 2}
    row_scale = layer.row_scale.float()
    decoded = layer.dequantize() / row_scale[:, None]
    for sample in record.samples:
        assert sum(sample.counts) == N
        assert len(sample.centroids) == 1 << sample.bits
        values = decoded[:, sample.feature]
        known = torch.tensor([*sample.centroids, *sample.outliers])
        assert float((values[:, None] - known).abs().amin(1).max()) < 1e-4
        scaled = weight[:, sample.feature] / row_scale
        assert sample.low <= float(scaled.min())
        assert sample.high >= float(scaled.max()) - 1e-6
    assert len(next(s for s in record.samples if s.feature == 3).outliers) == 2


def test_column_view_data_is_json(data):
    text = render_report(data)
    columns = json.loads(re.search(r'id="columns">(.*?)</script>', text, re.S).group(1))
    assert [entry["layer"] for entry in columns] == ["block.0.<proj>", "block.1.<proj>"]
    assert columns[0]["samples"][0]["counts"] == list(data.layers[0].samples[0].counts)


def test_page_without_extras():
    layer, _ = make_layer([4] * K, outliers=False)
    record = layer_record("only", layer, None, nominal_bits=4.0, error=None, seconds=0.1)
    text = render_report(ReportData("m", [record], 100, 50))
    Page(text)
    assert "No weight is reserved" in text
    assert 'id="histogram"' not in text
    assert "mean layer error" not in text


def test_heat_map_cells_are_means():
    assert bin_means([4, 2, 3, 3], 2) == [3.0, 3.0]
    assert bin_means([4, 2], 10) == [4.0, 2.0]
    assert sum(bin_means(list(range(1000)), 192)) / 192 == pytest.approx(499.5, rel=0.01)


def test_file_is_written_whole_or_not_at_all(tmp_path, data):
    target = tmp_path / "report.html"
    assert write_report(target, data) == target
    assert target.read_text(encoding="utf-8") == render_report(data)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(OutputError, match="cannot write the report"):
        write_report(tmp_path / "missing" / "report.html", data)
