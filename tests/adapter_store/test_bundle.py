"""What was packed comes back; everything else is refused by name, before anything is allocated."""

import contextlib
import hashlib
import json
import struct
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load

from adapter_store import bundle as bundles
from adapter_store import container
from adapter_store.bundle import Limits, bundle_digest, check_compatible, pack, unpack
from adapter_store.errors import (
    BundleError,
    BundleTooLargeError,
    CorruptBundleError,
    ForeignBundleError,
    InvalidManifestError,
    NonFiniteBundleError,
    TruncatedBundleError,
    WrongEncoderError,
)
from ood.signature import signature
from ood.statistics import ClassStatistics, GaussianHead, l2_normalise


def changed(bundle, **fields):
    return replace(bundle, manifest=msgspec.structs.replace(bundle.manifest, **fields))


def repacked(data, *, manifest=None, arrays=None, drop=()):
    """The same bundle with other content and an honest checksum."""
    metadata, found = container.read(data, Limits())
    fields = json.loads(metadata["driftkeel"])
    fields.update(manifest or {})
    metadata["driftkeel"] = json.dumps(fields)
    found = {name: array for name, array in found.items() if name not in drop}
    return container.write({**found, **(arrays or {})}, metadata)


@pytest.fixture(scope="session")
def adapted(make_bundle):
    return make_bundle(family="bottleneck")


@pytest.fixture(scope="session")
def packed(adapted):
    return pack(adapted)


@pytest.mark.parametrize("family", ["frozen", "bottleneck"])
def test_a_bundle_comes_back_as_it_was_packed(make_bundle, family) -> None:
    bundle = make_bundle(family=family)
    again = unpack(pack(bundle))
    assert again.manifest == bundle.manifest
    assert again.tensors.keys() == bundle.tensors.keys()
    for name, tensor in bundle.tensors.items():
        assert np.array_equal(again.tensors[name], tensor)
        assert again.tensors[name].flags.writeable
    for before, after in ((bundle.base, again.base), (bundle.own, again.own)):
        assert after.labels == before.labels
        assert np.array_equal(after.counts, before.counts)
        assert np.allclose(after.means, before.means, atol=1e-7)
        assert np.allclose(after.scatter, before.scatter, atol=2e-4 * np.abs(before.scatter).max())
    assert again.signature == bundle.signature
    assert (again.own is again.base) == (family == "frozen")


def test_the_same_bundle_gives_the_same_bytes(adapted, packed) -> None:
    backwards = dict(reversed(adapted.tensors.items()))
    assert pack(replace(adapted, tensors=backwards)) == packed
    assert bundle_digest(packed) == hashlib.sha256(packed).hexdigest()


def test_any_safetensors_reader_opens_it(packed, adapted) -> None:
    arrays = load(packed)
    assert {f"adapter/{name}" for name in adapted.tensors} < arrays.keys()


def test_a_bundle_of_the_default_encoders_size_is_small_and_its_head_the_same() -> None:
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(192, 192)) * np.exp(-np.arange(192) / 30)[:, None]
    # Fewer samples than dimensions: the scatter is singular.
    features = l2_normalise(rng.normal(size=(150, 192)) @ mix + 3)
    statistics = ClassStatistics.fit(features, [f"class {k % 5}" for k in range(150)])
    shapes = {
        "down.weight": (16, 192),
        "down.bias": (16,),
        "up.weight": (192, 16),
        "up.bias": (192,),
    }
    tensors = {
        f"blocks.{k}.mlp/{name}": rng.normal(size=shape).astype(np.float32)
        for k in range(3)
        for name, shape in shapes.items()
    }
    manifest = bundles.Manifest(
        encoder="e" * 64,
        family="bottleneck",
        rank=16,
        sites=tuple(f"blocks.{k}.mlp" for k in range(3)),
        labels=statistics.labels,
        task="t",
        created_at=0.0,
        created_by="d",
        samples=150,
        score_quantiles=tuple(range(101)),
    )
    sign = signature(features, seed="e" * 64)
    data = pack(bundles.Bundle(manifest, tensors, statistics, statistics, sign))
    assert len(data) <= 180_000
    before = GaussianHead.from_statistics([statistics])
    after = GaussianHead.from_statistics([unpack(data).base])
    assert np.allclose(after.distances(features), before.distances(features), rtol=1e-3)


@given(rows=st.integers(2, 30), dim=st.integers(1, 12), seed=st.integers(0, 1000))
def test_statistics_survive_the_trip_whatever_their_rank(rows, dim, seed) -> None:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(rows, dim)) * np.exp(rng.normal(size=dim) * 3)
    before = ClassStatistics.fit(features, ["a", "b"] * (rows // 2) + ["a"] * (rows % 2))
    arrays = bundles._pack_statistics(before)
    after = bundles._unpack_statistics(before.labels, arrays, "base")
    assert np.allclose(after.scatter, before.scatter, atol=1e-3 * np.abs(before.scatter).max())
    assert np.linalg.eigvalsh(after.scatter).min() >= -1e-9 * np.trace(after.scatter)


# Refusals ----------------------------------------------------------------------------------------


def test_a_bundle_cut_anywhere_is_refused(packed) -> None:
    for length in {*range(0, 600, 7), *range(600, len(packed), 211), len(packed) - 1}:
        with pytest.raises(TruncatedBundleError):
            unpack(packed[:length])


def test_a_flipped_bit_anywhere_is_refused(packed) -> None:
    rng = np.random.default_rng(0)
    for position in {*range(200), *rng.integers(0, len(packed), 400).tolist()}:
        broken = bytearray(packed)
        broken[position] ^= 1 << int(rng.integers(8))
        with pytest.raises(BundleError):
            unpack(bytes(broken))


def test_a_flipped_weight_is_called_damage(packed) -> None:
    broken = packed[:-1] + bytes([packed[-1] ^ 1])
    with pytest.raises(CorruptBundleError, match="checksum"):
        unpack(broken)


@pytest.mark.parametrize(
    "data",
    [b"\x89PNG\r\n\x1a\n" + bytes(100), b"PK\x03\x04" + bytes(100), b"\x80\x04\x95" + bytes(60)],
)
def test_a_foreign_file_is_refused(data) -> None:
    with pytest.raises(ForeignBundleError, match="no safetensors file"):
        unpack(data)


def test_a_safetensors_file_that_is_no_bundle_is_refused() -> None:
    data = container.write({"x": np.ones(3, np.float32)}, {"format": "pt"})
    with pytest.raises(ForeignBundleError, match="no Driftkeel bundle"):
        unpack(data)


def test_another_format_version_is_refused(packed) -> None:
    with pytest.raises(ForeignBundleError, match="format version 7, this version reads 1"):
        unpack(repacked(packed, manifest={"format": 7, "some_new_field": 1}))


def test_trailing_bytes_are_refused(packed) -> None:
    with pytest.raises(CorruptBundleError, match="belong to nothing"):
        unpack(packed + b"payload")


def test_a_bundle_over_the_limits_is_refused(packed) -> None:
    for limits in (Limits(bundle_bytes=1000), Limits(header_bytes=100), Limits(tensors=3)):
        with pytest.raises(BundleTooLargeError, match="are taken"):
            unpack(packed, limits=limits)


@pytest.mark.parametrize(
    ("entry", "error"),
    [
        ({"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}, TruncatedBundleError),
        ({"dtype": "F32", "shape": [2**47, 2**47], "data_offsets": [0, 16]}, CorruptBundleError),
        ({"dtype": "F32", "shape": [2**64], "data_offsets": [0, 16]}, CorruptBundleError),
        ({"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}, CorruptBundleError),
        ({"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}, CorruptBundleError),
        ({"dtype": "F32", "shape": [4], "data_offsets": [4, 20]}, CorruptBundleError),
        ({"dtype": "F32", "shape": [0, 2**40], "data_offsets": [0, 0]}, CorruptBundleError),
        ({"dtype": "F32", "shape": [1] * 40, "data_offsets": [0, 4]}, CorruptBundleError),
        ({"dtype": "F64", "shape": [2], "data_offsets": [0, 16]}, CorruptBundleError),
        ({"dtype": "O", "shape": [2], "data_offsets": [0, 16]}, CorruptBundleError),
        ({"dtype": "F32", "shape": 4, "data_offsets": [0, 16]}, CorruptBundleError),
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 16], "x": 1}, CorruptBundleError),
        ([], CorruptBundleError),
    ],
)
def test_absurd_declarations_are_refused(entry, error) -> None:
    header = json.dumps({"__metadata__": {"driftkeel": "{}"}, "x": entry}).encode()
    with pytest.raises(error):
        unpack(struct.pack("<Q", len(header)) + header + bytes(16))


def test_two_tensors_may_not_share_bytes() -> None:
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    header = json.dumps({"__metadata__": {}, "x": entry, "y": entry}).encode()
    with pytest.raises(CorruptBundleError, match="overlap"):
        unpack(struct.pack("<Q", len(header)) + header + bytes(16))


def test_a_deeply_nested_header_is_refused() -> None:
    header = b'{"__metadata__":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    with pytest.raises(CorruptBundleError):
        unpack(struct.pack("<Q", len(header)) + header)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(adapted, packed, value) -> None:
    name = min(adapted.tensors)
    broken = adapted.tensors[name].copy()
    broken[0, 0] = value
    with pytest.raises(NonFiniteBundleError, match=name):
        pack(replace(adapted, tensors={**adapted.tensors, name: broken}))
    with pytest.raises(NonFiniteBundleError, match=name):
        unpack(repacked(packed, arrays={f"adapter/{name}": broken}))
    means = np.full((2, 6), value, np.float32)
    with pytest.raises(NonFiniteBundleError, match="base/means"):
        unpack(repacked(packed, arrays={"base/means": means}))


@pytest.mark.parametrize(
    "fields",
    [
        {"metrics": {"accuracy": float("nan")}},
        {"created_at": float("inf")},
        {"score_quantiles": (float("nan"),) * 101},
    ],
)
def test_manifest_numbers_that_are_not_finite_are_refused(adapted, fields) -> None:
    with pytest.raises(NonFiniteBundleError, match="manifest"):
        pack(changed(adapted, **fields))


@pytest.mark.parametrize(
    "label", ["dog\x1b[2J", "dog\n", "\u202edog", "d\x00g", "x" * 201, "", " dog", "dog\u2028"]
)
def test_a_label_that_cannot_be_shown_is_refused(packed, label) -> None:
    with pytest.raises(InvalidManifestError, match=r"label|expected") as caught:
        unpack(repacked(packed, manifest={"labels": ["cat", label]}))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "fields",
    [
        {"task": "rm -rf\n/"},
        {"created_by": "\x07"},
        {"metrics": {"\x1b": 1.0}},
        {"rank": 4096},
        {"rank": -1},
        {"samples": 0},
        {"encoder": "e" * 64 + "\n"},
        {"encoder": "../x"},
        {"score_quantiles": [1.0] * 100},
        {"score_quantiles": [1.0] * 100 + [0.5]},
        {"labels": []},
        {"family": "frozen"},
        {"unknown_field": 1},
    ],
)
def test_a_manifest_that_cannot_be_is_refused(packed, fields) -> None:
    with pytest.raises(InvalidManifestError):
        unpack(repacked(packed, manifest=fields))


def test_the_packer_holds_itself_to_the_same_rules(adapted) -> None:
    for fields in ({"task": "\x07"}, {"rank": 4096}, {"labels": ("a", "b")}, {"sites": ()}):
        with pytest.raises(InvalidManifestError):
            pack(changed(adapted, **fields))


@pytest.mark.parametrize(
    ("drop", "arrays"),
    [
        (["signature"], {}),
        (["base/means"], {}),
        (["own/step"], {}),
        ([], {"signature": np.zeros(4, np.uint8)}),
        ([], {"surprise": np.zeros(4, np.uint8)}),
        ([], {"base/surprise": np.zeros(4, np.uint8)}),
        ([], {"base/step": np.full(6, -1, np.float32)}),
        ([], {"base/step": np.full(6, 1e30, np.float32)}),
        ([], {"base/step": np.ones(7, np.float32)}),
        ([], {"base/factor": np.ones(21, np.float32)}),
        ([], {"base/counts": np.array([3, -1])}),
        ([], {"adapter/blocks.0.mlp/up": np.ones((6, 2), np.int16)}),
    ],
)
def test_parts_that_contradict_each_other_are_refused(packed, drop, arrays) -> None:
    with pytest.raises(CorruptBundleError):
        unpack(repacked(packed, drop=drop, arrays=arrays))


@pytest.mark.parametrize("labels", [["cat"], ["dog", "cat"], ["cat", "cat"]])
def test_statistics_of_other_classes_than_the_manifests_are_refused(packed, labels) -> None:
    with pytest.raises(CorruptBundleError, match=r"label|class|mean|count"):
        unpack(repacked(packed, manifest={"labels": labels}))


@given(st.binary(max_size=400))
def test_random_bytes_are_never_anything_but_refused(data) -> None:
    with pytest.raises(BundleError):
        unpack(data)


@given(data=st.data())
def test_random_changes_are_never_anything_but_refused(packed, data) -> None:
    broken = bytearray(packed)
    for _ in range(data.draw(st.integers(1, 4))):
        begin = data.draw(st.integers(0, len(broken)))
        end = begin + data.draw(st.integers(0, 12))
        broken[begin:end] = data.draw(st.binary(max_size=12))
    if bytes(broken) != packed:
        with pytest.raises(BundleError):
            unpack(bytes(broken))


@given(data=st.data())
def test_random_headers_with_an_honest_length_raise_nothing_but_bundle_errors(packed, data) -> None:
    (length,) = struct.unpack("<Q", packed[:8])
    header = bytearray(packed[8 : 8 + length])
    for _ in range(data.draw(st.integers(1, 3))):
        begin = data.draw(st.integers(0, len(header)))
        header[begin : begin + data.draw(st.integers(0, 30))] = data.draw(
            st.sampled_from([b"", b"null", b"[]", b"1e999", b'"', b"-1", b"}", b"\xff", b"\\ud800"])
        )
    forged = struct.pack("<Q", len(header)) + bytes(header) + packed[8 + length :]
    with contextlib.suppress(BundleError):
        unpack(forged)


@given(
    manifest=st.dictionaries(
        st.sampled_from([*bundles.Manifest.__struct_fields__, "x"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2)
            ),
            max_leaves=5,
        ),
        min_size=1,
    )
)
def test_random_manifests_with_an_honest_checksum_only_raise_bundle_errors(
    packed, manifest
) -> None:
    with contextlib.suppress(BundleError):
        unpack(repacked(packed, manifest=manifest))


# Fitting an encoder ------------------------------------------------------------------------------


def test_a_fitting_bundle_is_accepted(make_bundle, interface) -> None:
    for family in ("frozen", "bottleneck"):
        check_compatible(make_bundle(family=family, rank=5), interface)


def test_a_bundle_for_another_encoder_is_refused(adapted, interface) -> None:
    other = msgspec.structs.replace(interface, digest="f" * 64)
    with pytest.raises(WrongEncoderError, match="eeeeeeeeeeee, this one is ffffffffffff"):
        check_compatible(adapted, other)


@pytest.mark.parametrize(
    "fields",
    [
        {"feature_dim": 7},
        {"families": {}},
        {"sites": ("blocks.0.mlp",)},
        {"families": {"bottleneck": {"blocks.0.mlp/down": ("rank", 6)}}},
    ],
)
def test_a_bundle_that_does_not_fit_the_encoders_sites_is_refused(
    adapted, interface, fields
) -> None:
    with pytest.raises(WrongEncoderError):
        check_compatible(adapted, msgspec.structs.replace(interface, **fields))


def test_tensors_of_another_rank_than_declared_are_refused(adapted, interface) -> None:
    with pytest.raises(WrongEncoderError, match=r"blocks\.0\.mlp/down"):
        check_compatible(changed(adapted, rank=3), interface)
    with pytest.raises(WrongEncoderError):
        check_compatible(changed(adapted, sites=("blocks.0.mlp",)), interface)
