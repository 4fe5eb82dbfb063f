"""Run the device's migrations on the connection that `database.open_database` hands over."""

from alembic import context

from adapter_store.models import DeviceBase

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=DeviceBase.metadata,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
