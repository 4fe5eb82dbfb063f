"""Run the device's migrations on the connection that `database.open_database` hands over."""

from adapter_store.migrating import run_migrations
from adapter_store.models import DeviceBase

run_migrations(DeviceBase.metadata)
