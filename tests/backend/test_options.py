"""The options: names, ranges, contradictions, and what is chosen without them."""

from __future__ import annotations

from typing import Any

import pytest

from claq_export.backend.options import DEFAULT_OBSERVE, parse_options
from claq_export.errors import ConfigError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bit": 3}, "no option 'bit'; did you mean 'bits'"),
        ({"zzzz": 3}, "no option 'zzzz'; known: .*release_weights"),
        ({"bits": 7}, "bits must be"),
        ({"fallback": "tvm"}, "fallback must be one of inductor, eager"),
        ({"observe": -1}, "observe must be a whole number of at least 0"),
        ({"observe": True}, "observe must be a whole number"),
        ({"release_weights": 1}, "release_weights must be True or False"),
        ({"observe": 3, "calibration": "none"}, "observe and calibration exclude one another"),
        ({"weights": "out", "observe": 3}, "weights and observe exclude one another"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_options(options)


def test_ways_to_calibrate() -> None:
    assert parse_options(None).observe == DEFAULT_OBSERVE
    assert parse_options({"observe": 2}).observe == 2
    assert parse_options({"observe": 0}).config.calibration == "none"
    assert parse_options({"calibration": "none"}).observe == 0
    with_tokenizer = parse_options({"tokenizer": object()})
    assert (with_tokenizer.observe, with_tokenizer.config.calibration) == (0, "default")
    assert parse_options({"weights": "folder"}).observe == 0


def test_names_as_a_list() -> None:
    assert parse_options({"exclude": ["a", "b"]}).config.exclude == ("a", "b")


def test_weights_serve_the_settings_they_were_made_with() -> None:
    key = parse_options({"bits": 3}).key
    assert key == parse_options({"bits": 3, "fallback": "eager", "release_weights": True}).key
    assert key != parse_options({"bits": 4}).key
    assert key != parse_options({"bits": 3, "calibration": "none"}).key
