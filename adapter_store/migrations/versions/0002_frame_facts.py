"""What the pixels of a journalled sample said, for telling a broken sensor."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("samples", sa.Column("frame", sa.BLOB()))


def downgrade() -> None:
    op.drop_column("samples", "frame")
