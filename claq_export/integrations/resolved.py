"""Which files ``from_pretrained`` of transformers before 5 reads: it resolves them, and tells a quantizer nothing."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

import transformers.modeling_utils

_KEPT = 8

_last = threading.local()


def watch() -> None:
    """Note the files of each ``from_pretrained`` from now on, with all of its options (``subfolder``, ``variant``, …)."""
    original: Any = transformers.modeling_utils._get_resolved_checkpoint_files

    @functools.wraps(original)
    def noting(pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        files, *rest = original(pretrained_model_name_or_path, *args, **kwargs)
        noted = vars(_last).setdefault("files", {})
        # By name, since a model may load parts of itself from elsewhere while it is made.
        noted.pop(str(pretrained_model_name_or_path), None)
        noted[str(pretrained_model_name_or_path)] = files
        while len(noted) > _KEPT:
            del noted[next(iter(noted))]
        return (files, *rest)

    transformers.modeling_utils._get_resolved_checkpoint_files = noting


def noted_files(name: str) -> Sequence[str]:
    """The files that this thread resolved last for the model ``name``; none where it did not."""
    return vars(_last).get("files", {}).get(name) or ()
