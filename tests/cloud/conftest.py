"""One running catalogue with a device and adapters, for the tests that only speak with it."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from cloud.broker import start_broker
from tests.cloud.field import CatalogueProcess, FieldDevice, bundle, field


@dataclass(frozen=True)
class Fleet:
    """A running catalogue and who takes part.

    Attributes:
        catalogue: The process.
        device: An online device that does what it is told.
        approved: The digest of the adapter that it runs.
        alike: Two digests with the same first character.
    """

    catalogue: CatalogueProcess
    device: FieldDevice
    approved: str
    alike: tuple[str, str]


@pytest.fixture(scope="session")
def fleet(
    tmp_path_factory: pytest.TempPathFactory, broker_users: dict[str, str]
) -> Iterator[Fleet]:
    """Shared, so a test may count on no more than what the attributes say."""
    root = tmp_path_factory.mktemp("fleet")
    with (
        start_broker(root / "broker", broker_users) as broker,
        field(root, broker, broker_users) as (catalogue, device),
    ):
        by_initial: dict[str, str] = {}
        for world in range(100, 117):
            digest = device.upload(bundle(world, task=f"world {world}"))
            other = by_initial.setdefault(digest[0], digest)
            if other != digest:
                break
        device.generations = {1: [], 2: [other]}
        device.join()
        catalogue.client.post("adapters", other, "approve", body={})
        yield Fleet(catalogue, device, other, (other, digest))
