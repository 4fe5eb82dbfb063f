"""The first tables: samples, episodes, outbox, inbox, settings."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "samples",
        sa.Column("seq", sa.Integer(), primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(64), nullable=False, unique=True),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("label", sa.Text(), nullable=False),
        sa.Column("probability", sa.Float(), nullable=False),
        sa.Column("adapter", sa.String(64)),
        sa.Column("score", sa.Float(), nullable=False),
        sa.Column("p_value", sa.Float(), nullable=False),
        sa.Column("features", sa.BLOB()),
        sa.Column("image", sa.BLOB()),
        sa.Column("true_label", sa.Text()),
        sa.Column("labelled_at", sa.Float()),
        sqlite_autoincrement=True,
    )
    op.create_index(
        "ix_samples_labelled", "samples", ["seq"], sqlite_where=sa.text("true_label IS NOT NULL")
    )
    op.create_index(
        "ix_samples_buffered", "samples", ["seq"], sqlite_where=sa.text("features IS NOT NULL")
    )
    op.create_table(
        "episodes",
        sa.Column("number", sa.Integer(), primary_key=True),
        sa.Column("open", sa.Boolean(), nullable=False),
        sa.Column("onset_seq", sa.Integer()),
        sa.Column("body", sa.Text(), nullable=False),
    )
    op.create_table(
        "outbox",
        sa.Column("position", sa.Integer(), primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(64), nullable=False, unique=True),
        sa.Column("kind", sa.String(64), nullable=False),
        sa.Column("key", sa.String(200), unique=True),
        sa.Column("message", sa.BLOB(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("next_at", sa.Float(), nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "inbox",
        sa.Column("position", sa.Integer(), primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(64), nullable=False, unique=True),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "settings",
        sa.Column("key", sa.String(200), primary_key=True),
        sa.Column("value", sa.Text(), nullable=False),
    )


def downgrade() -> None:
    for table in ("settings", "inbox", "outbox", "episodes", "samples"):
        op.drop_table(table)
