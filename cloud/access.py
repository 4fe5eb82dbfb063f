"""How an operator's command finds the catalogue: its address, the token, the operator's name.

For `driftkeel shell` and for `driftkeel ood explain DEVICE EPISODE`, which takes the same options.
"""

from __future__ import annotations

import getpass
import json
from pathlib import Path

from adapter_store.errors import ConfigError
from adapter_store.explanation import Explanation
from cloud.config import DEFAULT_URL, Config
from cloud.shell_client import Client


def open_client(
    config_path: Path | None,
    url: str | None,
    token_file: Path | None,
    *,
    operator: str | None = None,
) -> Client:
    """The catalogue, from an operator's side.

    Args:
        config_path: The catalogue's TOML file; address and token are taken from it.
        url: The address, in place of the one in the file.
        token_file: The file with the token, in place of the one in the file.
        operator: The name in the audit log; the login when absent.

    Raises:
        ConfigError: There is no token.
    """
    token = ""
    if config_path is not None:
        config = Config.load(config_path)
        url = url or _address(config)
        if token_file is None:
            token, token_file = config.http.token, config.token_file
    if not token:
        if token_file is None:
            raise ConfigError("give --config FILE, or --url and --token-file")
        try:
            token = token_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"cannot read the operator token {token_file}: {error}; "
                "the catalogue writes it when it starts"
            ) from error
    return Client(url or DEFAULT_URL, token, operator or _login())


def explanation_of(
    device: str,
    episode: int,
    config_path: Path | None,
    url: str | None,
    token_file: Path | None,
) -> Explanation:
    """Why an episode of a device began, as the catalogue keeps it.

    Raises:
        ConfigError: There is no token.
        RefusedError: The catalogue has no such explanation, or does not answer.
    """
    return open_client(config_path, url, token_file).explanation(device, episode)


def _address(config: Config) -> str | None:
    """Where the catalogue of this configuration listens; None when that cannot be known."""
    try:
        where: str = json.loads(config.address_file.read_text(encoding="utf-8"))["url"]
    except (OSError, ValueError, KeyError, TypeError):
        port = config.http.port
        return f"http://{config.http.host}:{port}" if port else None
    return where


def _login() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "operator"
