"""Whether the model hub can be reached, asked once before anything else is asked of it."""

from __future__ import annotations

import logging
import os
import socket
import time
from functools import cache
from urllib.parse import urlsplit
from urllib.request import getproxies

TRIES, TIMEOUT, PAUSE = 2, 3.0, 1.0  # seconds, for each of its addresses

log = logging.getLogger(__name__)


@cache
def look_for_hub() -> None:
    """Where the hub cannot be reached, go on as with HF_HUB_OFFLINE=1, and say so: its client would
    try again for half a minute for each file before it looks at what was downloaded earlier.

    Called before a first request. A proxy is taken to reach it.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or {"all", "http", "https"} & getproxies().keys():
        return
    url = urlsplit(constants.ENDPOINT)
    port = url.port or (80 if url.scheme == "http" else 443)
    for left in reversed(range(TRIES)):
        try:
            socket.create_connection((url.hostname or "", port), TIMEOUT).close()
            return
        except OSError:
            if left:
                time.sleep(PAUSE)
    log.warning(
        "%s cannot be reached: going on off line, as with HF_HUB_OFFLINE=1, with what was "
        "downloaded before",
        constants.ENDPOINT,
    )
    os.environ["HF_HUB_OFFLINE"] = "1"  # of processes and libraries that start later
    constants.HF_HUB_OFFLINE = True
