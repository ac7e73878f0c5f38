"""``options`` of ``torch.compile``: the fields of :class:`~claq_export.config.Config` and what only the backend needs."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import NO_CALIBRATION, Config
from ..errors import ConfigError
from ..setting_types import in_types_of
from .replay import replayed

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


_CHOOSING = ("include", "exclude", "fuse_siblings")
"""Settings that matter for weights that are quantized already, too."""

_FILES_ONLY = {
    "dtype": "is that of an exported graph; torch.compile keeps the module's (cast it: module.half())",
    "opset": "is that of an exported file; torch.compile writes none, leave it out",
    "last_logits": "is for an exported file; torch.compile keeps what the module returns, leave it out",
    "cache_dtype": "is for an exported file; torch.compile keeps the module's own cache, leave it out",
}
"""Settings without a meaning here, and what to do instead."""

_EXPECTED = {"fallback": f"one of {', '.join(FALLBACKS)}", "weights": "a folder or None"}
"""What errors say where the type of the field says too little."""

_WAYS = ("weights", "observe", "calibration")
_OWN = ("fallback", "observe", "observe_bytes", "release_weights", "tokenizer", "weights", "progress")


def parse_options(options: Mapping[str, Any] | None, mode: str | None = None) -> CompileOptions:
    """Check the options and sort them.

    Raises:
        ConfigError: an option is unknown (the message names the nearest ones), of the wrong type, out of range, without a
            meaning for compiled modules, or contradicts another.
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
    for name, instead in _FILES_ONLY.items():
        if name in given:
            raise ConfigError(f"{name} {instead}")
    asked = {name for name in given if name in settings}
    own = in_types_of(CompileOptions, {name: given.pop(name) for name in _OWN if name in given}, _EXPECTED)
    if "calibration" in given:
        given["calibration"] = replayed(given["calibration"])
    config = Config(**given)
    if own.get("fallback", FALLBACKS[0]) not in FALLBACKS:
        raise ConfigError(f"fallback must be {_EXPECTED['fallback']}, got {own['fallback']!r}")
    for name, least in (("observe", 0), ("observe_bytes", 1)):
        if own.get(name, least) < least:
            raise ConfigError(f"{name} must be a whole number of at least {least}, got {own[name]!r}")
    ways = [name for name in _WAYS if name in given or own.get(name)]
    _check_together(ways, asked, own, config)
    if not ways and own.get("tokenizer") is None and own.get("observe") is None:
        own["observe"] = DEFAULT_OBSERVE
    if own.get("observe") == 0 and not ways and own.get("tokenizer") is None:
        config = dataclasses.replace(config, calibration=NO_CALIBRATION)
    return CompileOptions(config=config, mode=mode, **own)


def _check_together(ways: Sequence[str], asked: Set[str], own: Mapping[str, Any], config: Config) -> None:
    """Raise where options contradict one another.

    Args:
        ways: to come to quantized weights, those of the options.
        asked: the fields of ``config`` among the options.
        own: the other options.

    Raises:
        ConfigError: see above.
    """
    if len(ways) > 1:
        raise ConfigError(f"the options {' and '.join(ways)} exclude one another: choose one way to calibrate")
    if "weights" in ways and (useless := sorted(asked - {*_CHOOSING})):
        raise ConfigError(
            f"{' and '.join(useless)} would say how to quantize, and weights={str(own['weights'])!r} is quantized already: leave "
            f"one or the other out (beside weights, {', '.join(_CHOOSING)} choose what of it is used)"
        )
    if own.get("tokenizer") is not None:
        way = f"calibration={NO_CALIBRATION!r}" if config.calibration == NO_CALIBRATION else "".join(ways)
        if way not in ("", "calibration"):
            raise ConfigError(
                f"tokenizer is for calibration on text, and there is none with {way}: leave one of them out"
            )
