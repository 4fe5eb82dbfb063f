"""`driftkeel families` from the outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from adapter_store.codecs import CODECS
from edge_agent.bench.families_cli import families
from exporter.errors import EncoderError


def call(*words: object) -> Result:
    return CliRunner().invoke(families, [str(word) for word in words])


def test_families_are_measured_beside_the_bare_encoder(striped_file: Path, cache: Path) -> None:
    done = call(
        *("--data", striped_file, "--cache", cache, "--rank", 4, "--epochs", 1),
        *("--nested", "--json"),
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert set(found["families"]) >= {"gaussian", "bottleneck"}
    bare, adapted = found["families"]["gaussian"], found["families"]["bottleneck"]
    assert bare["parameters"] == bare["train_s"] == 0
    assert 0 <= adapted["accuracy_quarter_rank"] <= 1
    assert 0.5 <= adapted["accuracy"] <= 1
    assert set(adapted["bytes"]) == set(CODECS)
    assert adapted["bytes"]["fp32"] == 4 * adapted["parameters"] > adapted["bytes"]["int4"]
    assert found["settings"]["test"] == 12


def test_the_table_has_a_row_for_each_family(striped_file: Path, cache: Path) -> None:
    done = call("--data", striped_file, "--cache", cache, "--rank", 2, "--epochs", 1)
    assert done.exit_code == 0, done.output
    rows = [line for line in done.stdout.splitlines() if "gaussian" in line or "bottlen" in line]
    assert len(rows) == 2


def test_a_family_that_the_encoder_was_not_built_for_is_refused(striped_file: Path) -> None:
    with pytest.raises(EncoderError, match="has no adapter family 'ssf'"):
        CliRunner().invoke(
            families,
            ["--data", str(striped_file), "--families", "ssf"],
            catch_exceptions=False,
        )
