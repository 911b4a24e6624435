"""Where a Ray of our own on this machine keeps its state, and who may reach it. Imports no Ray."""

import os
import secrets
import sys
import tempfile
from pathlib import Path
from typing import Final

from lorafleet.core.config import home
from lorafleet.core.errors import ConfigError

# A UNIX socket's path has at most 107 bytes, of which Ray's session folder and socket names take about 65.
MAX_RAY_DIR_CHARS: Final = 40


def prepare_local_ray() -> Path:
    """Sets what Ray reads from the environment, before it is imported; the folder for its sessions.

    A variable that is already set is left as it is. Ray 2.60 gives a local cluster a token anyway, in ~/.ray.

    Raises:
        ConfigError: Ray was imported already, without RAY_AUTH_MODE: it would not read the token any more.
    """
    if "ray" in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        raise ConfigError(
            "ray was imported before it could be given an access token: begin before anything imports ray, or set "
            "RAY_AUTH_MODE=token (or disabled) for the process",
            param="ray_address",
        )
    folder = home() / "ray"
    folder.mkdir(parents=True, exist_ok=True)
    token = folder / "auth_token"
    if not token.exists():
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN_PATH", str(token))
    # Off, Ray's own servers bind to the loopback address. Its name is older than its meaning:
    # ray/_private/services.py, get_node_ip_address.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    if len(str(folder)) <= MAX_RAY_DIR_CHARS:
        return folder
    return Path(tempfile.mkdtemp(prefix="lorafleet-"))
