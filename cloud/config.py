"""The catalogue's settings: one TOML file, every key documented in `docs/catalogue.md`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import msgspec

from adapter_store.config import load_config
from ood.signature import DEFAULT_MIN_SIMILARITY

DEFAULT_URL: Final = "http://127.0.0.1:8790"

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Text = Annotated[str, msgspec.Meta(min_length=1)]


class CatalogueSection(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """``[catalogue]``: where things are kept.

    Attributes:
        state_dir: Bundles, keys, uploads under way, and the database unless it is elsewhere. A
            relative path starts at the file's folder.
        database_url: An SQLAlchemy URL; empty for SQLite in ``state_dir``.
        min_similarity: Candidates less similar than this (0 to 1) are not offered to a device.
        max_bundle_bytes: Larger uploads are refused.
        max_uploads: Devices that upload at the same time; the others wait for their turn.
    """

    state_dir: Text
    database_url: str = ""
    min_similarity: Annotated[float, msgspec.Meta(ge=0, le=1)] = DEFAULT_MIN_SIMILARITY
    max_bundle_bytes: Annotated[int, msgspec.Meta(ge=1, le=64 * 1024 * 1024)] = 16 * 1024 * 1024
    max_uploads: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 8


class MqttSection(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """``[mqtt]``: the broker.

    Attributes:
        host: Its host.
        port: Its port.
        username: The catalogue's account.
        password: Its password.
        keepalive_s: Seconds between signs of life.
    """

    host: Text
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 1883
    username: str = ""
    password: str = ""
    keepalive_s: Annotated[int, msgspec.Meta(ge=1, le=3600)] = 30


class HttpSection(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """``[http]``: the operators' API.

    Attributes:
        host: Where to listen; only the loopback address unless a proxy adds TLS.
        port: Its port; 0 takes a free one. Either way ``state_dir/http.json`` names it.
        token: What operators must present; empty for one that is made at the first start and kept
            in ``state_dir/operator.token``.
    """

    host: Text = "127.0.0.1"
    port: Port = 8790
    token: str = ""


class Config(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The whole file."""

    catalogue: CatalogueSection
    mqtt: MqttSection
    http: HttpSection = HttpSection()

    @classmethod
    def load(cls, path: Path) -> Config:
        """Read the file.

        Raises:
            ConfigError: It cannot be read, or a key is unknown, missing or wrong.
        """
        config = load_config(path, cls)
        state_dir = str((path.absolute().parent / config.catalogue.state_dir).resolve())
        catalogue = msgspec.structs.replace(config.catalogue, state_dir=state_dir)
        return msgspec.structs.replace(config, catalogue=catalogue)

    @property
    def state_dir(self) -> Path:
        """Where the catalogue keeps everything."""
        return Path(self.catalogue.state_dir)

    @property
    def database_url(self) -> str:
        """The database's URL, the default filled in."""
        return self.catalogue.database_url or f"sqlite:///{self.state_dir / 'catalogue.db'}"

    @property
    def address_file(self) -> Path:
        """The file that names where the operators' API listens, while it does."""
        return self.state_dir / "http.json"

    @property
    def token_file(self) -> Path:
        """The file with the operator token, unless it is in the configuration."""
        return self.state_dir / "operator.token"
