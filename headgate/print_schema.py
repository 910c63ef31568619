"""`headgate print-schema`: the API's OpenAPI document without a server."""

from __future__ import annotations

import json

from headgate.router.gateway.openapi import DEFAULT_INFO, make_document


def print_schema() -> int:
    """With TGI's default limits, to standard output."""
    print(json.dumps(make_document(DEFAULT_INFO, has_key=False), indent=2))
    return 0
