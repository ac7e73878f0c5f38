"""``options`` of ``torch.compile``: the fields of :class:`~claq_export.config.Config` and what only the backend needs."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import NO_CALIBRATION, Config
from ..errors import ConfigError

FALLBACKS = ("inductor", "eager")
DEFAULT_OBSERVE = 16
"""Calls that are observed when the options name no other calibration."""


@dataclass(frozen=True)
class CompileOptions:
    """What ``torch.compile(..., backend="claq", options={...})`` was told.

    Attributes:
        config: the settings shared with the command line.
        fallback: who compiles the rewritten graph: ``"inductor"``, or ``"eager"`` to run it operator by operator.
        observe: the first calls that run in full precision and whose inputs calibrate; 0 where data, saved weights or
            no calibration at all are asked for.
        observe_bytes: most memory the observed inputs may take; further calls count but are not kept.
        release_weights: free the original weights once they are quantized.
        tokenizer: for calibration on text.
        weights: folder with ``claq.safetensors`` and ``claq.json`` to take the quantized weights from.
        progress: show a progress line while quantizing.
        mode: Inductor's ``mode``, as ``torch.compile`` takes it.
    """

    config: Config
    fallback: str = "inductor"
    observe: int = 0
    observe_bytes: int = 1 << 30
    release_weights: bool = False
    tokenizer: Any = None
    weights: Path | None = None
    progress: bool = True
    mode: str | None = None

    @property
    def key(self) -> str:
        """Names these options among others: weights quantized under one set do not serve another."""
        calibration = self.config.calibration
        told = {
            **self.config.to_json(),
            "data": str(calibration) if isinstance(calibration, (str, Path)) else id(calibration),
            "tokenizer": id(self.tokenizer),
            "observe": self.observe,
            "weights": str(self.weights),
        }
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]


_OWN = ("fallback", "observe", "observe_bytes", "release_weights", "tokenizer", "weights", "progress")


def parse_options(options: Mapping[str, Any] | None, mode: str | None = None) -> CompileOptions:
    """Check the options and sort them.

    Raises:
        ConfigError: an option is unknown (the message names the nearest ones), out of range, or contradicts another.
    """
    given = dict(options or {})
    settings = {field.name for field in dataclasses.fields(Config)}
    known = sorted(settings | set(_OWN))
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 3, 0.5)
            raise ConfigError(
                f"torch.compile(backend='claq') has no option {name!r}; "
                + (f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(known)}")
            )
    for name in ("include", "exclude"):
        if isinstance(given.get(name), (list, set)):
            given[name] = tuple(given[name])
    own = {name: given.pop(name) for name in _OWN if name in given}
    asked = "calibration" in given
    if "dtype" in given:
        raise ConfigError(
            "dtype is that of an exported graph; torch.compile keeps the module's (cast it: module.half())"
        )
    config = Config(**given)
    if own.get("fallback", FALLBACKS[0]) not in FALLBACKS:
        raise ConfigError(f"fallback must be one of {', '.join(FALLBACKS)}, got {own['fallback']!r}")
    for name, least in (("observe", 0), ("observe_bytes", 1)):
        value = own.get(name, least)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}")
    for name in ("release_weights", "progress"):
        if not isinstance(own.get(name, False), bool):
            raise ConfigError(f"{name} must be True or False, got {own[name]!r}")
    own["weights"] = Path(own["weights"]) if own.get("weights") is not None else None
    ways = [
        name
        for name, chosen in (
            ("weights", own["weights"] is not None),
            ("observe", bool(own.get("observe"))),
            ("calibration", asked),
        )
        if chosen
    ]
    if len(ways) > 1:
        raise ConfigError(f"the options {' and '.join(ways)} exclude one another: choose one way to calibrate")
    if not ways and own.get("tokenizer") is None and own.get("observe") is None:
        own["observe"] = DEFAULT_OBSERVE
    if own.get("observe") == 0 and not ways and own.get("tokenizer") is None:
        config = dataclasses.replace(config, calibration=NO_CALIBRATION)
    return CompileOptions(config=config, mode=mode, **own)
