"""How devices and adapters look to operators: database rows as JSON-able values."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec

from adapter_store import wire
from cloud.models import BundleRow, DeviceRow

CANDIDATE: Final = "candidate"
APPROVED: Final = "approved"
QUARANTINED: Final = "quarantined"
RETIRED: Final = "retired"
STATUSES: Final = (CANDIDATE, APPROVED, QUARANTINED, RETIRED)


def desired_of(row: DeviceRow) -> wire.Desired:
    """What the operator wants of a device."""
    return wire.Desired(
        version=row.desired_version, generation=row.desired_generation, pinned=row.desired_pinned
    )


def report_of(row: DeviceRow) -> wire.Report | None:
    """The newest a device reported."""
    return None if row.report is None else msgspec.json.decode(row.report, type=wire.Report)


def device_view(row: DeviceRow) -> dict[str, Any]:
    """One device."""
    return {
        "name": row.name,
        "online": row.online,
        "encoder": row.encoder,
        "software": row.software,
        "first_seen": row.first_seen,
        "last_seen": row.last_seen,
        "desired": {
            "version": row.desired_version,
            "generation": row.desired_generation,
            "pinned": row.desired_pinned,
        },
        "reported": None if row.report is None else json.loads(row.report),
    }


def running_bundles(devices: Iterable[DeviceRow]) -> dict[str, list[str]]:
    """The devices that run each bundle, by its digest, as they reported."""
    run_by: dict[str, list[str]] = {}
    for row in devices:
        report = report_of(row)
        for digest in () if report is None else _running(report):
            run_by.setdefault(digest, []).append(row.name)
    return {digest: sorted(names) for digest, names in run_by.items()}


def adapter_view(row: BundleRow, run_by: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """One adapter.

    Args:
        row: Its row.
        run_by: What `running_bundles` says.
    """
    manifest = json.loads(row.manifest)
    return {
        "digest": row.digest,
        "status": row.status,
        "size_bytes": row.size_bytes,
        "encoder": row.encoder,
        "family": row.family,
        "rank": manifest["rank"],
        "labels": manifest["labels"],
        "task": manifest["task"],
        "samples": manifest["samples"],
        "metrics": manifest.get("metrics", {}),
        "parents": manifest.get("parents", []),
        "created_by": manifest["created_by"],
        "uploaded_by": row.uploaded_by,
        "uploaded_at": row.uploaded_at,
        "run_by": list(run_by.get(row.digest, [])),
    }


def _running(report: wire.Report) -> Sequence[str]:
    return next((g.bundles for g in report.generations if g.number == report.generation), [])
