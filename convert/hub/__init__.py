"""Pushes exported models to the Hugging Face hub.

Offered: checks that need no upload, and the upload of one directory in one commit.
"""

from convert.hub.formats import PushFormat, choose_format
from convert.hub.repository import HubTarget, check_access, check_name
from convert.hub.upload import check_directory, push_directory

__all__ = [
    "HubTarget",
    "PushFormat",
    "check_access",
    "check_directory",
    "check_name",
    "choose_format",
    "push_directory",
]
