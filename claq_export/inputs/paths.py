"""Path containment: a file that a folder's contents name must lie in that folder."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import ClaqError

NAME_LIMIT = 4096
"""Characters of a file name inside another file."""


def contained(folder: Path, name: object, error: type[ClaqError], named_by: str = "") -> Path:
    """The path of file ``name`` of ``folder``.

    The folder itself may be a link, and so may a file as long as it leads to a place inside the folder, or, in the
    snapshot folder of a Hugging Face cache, to the ``blobs`` beside the snapshots.

    Args:
        folder: an existing folder.
        name: what the file's name is said to be.
        error: raised when it is not acceptable.
        named_by: the file that says so, for the message.

    Raises:
        error: ``name`` is not a string, empty, absolute, has ``..`` or a control character, ends with a separator, or
            is a link out of the folder. A file that does not exist is no error here.
    """
    where = f"{named_by} names" if named_by else f"in {folder}:"
    if not isinstance(name, str) or not name or len(name) > NAME_LIMIT:
        raise error(f"{where} a file by {str(name)[:80]!r}, expected a file name")
    if not name.isprintable():
        raise error(f"{where} {name!r}, a file name with a control character")
    parts = name.replace("\\", "/").split("/")
    if not parts[-1]:
        raise error(f"{where} {name!r}, the name of a folder; a file is expected")
    if ".." in parts or name.startswith(("/", "\\")) or (len(name) > 1 and name[1] == ":") or Path(name).is_absolute():
        raise error(f"{where} {name!r}, which is outside {folder}; a file beside it is expected")
    path = folder / name
    real, root = os.path.realpath(path), os.path.realpath(folder)
    allowed = [root]
    if Path(root).parent.name == "snapshots":
        allowed.append(str(Path(root).parent.parent / "blobs"))
    if not any(real == base or real.startswith(base.rstrip(os.sep) + os.sep) for base in allowed):
        raise error(f"{path} is a link out of its folder, to {real}; put the file itself there")
    return path
