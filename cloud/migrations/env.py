"""Run the catalogue's migrations on the connection that `open_database` hands over."""

from adapter_store.migrating import run_migrations
from cloud.models import CatalogueBase

run_migrations(CatalogueBase.metadata)
