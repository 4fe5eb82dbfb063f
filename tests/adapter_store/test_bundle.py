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
from adapter_store import codecs, container
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
from ood.calibration import score_quantiles
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
    shapes = {name: tensor.shape for name, tensor in bundle.tensors.items()}
    assert again.manifest == changed(bundle, shapes=shapes).manifest
    assert again.tensors.keys() == bundle.tensors.keys()
    for name, tensor in bundle.tensors.items():
        assert np.array_equal(again.tensors[name], tensor)
        assert again.tensors[name].flags.writeable
    for before, after in ((bundle.base, again.base), (bundle.own, again.own)):
        assert after.labels == before.labels
        assert np.array_equal(after.counts, before.counts)
        assert np.allclose(after.means, before.means, atol=4e-3)
        assert np.isclose(np.trace(after.scatter), np.trace(before.scatter), rtol=1e-9)
        assert np.allclose(after.scatter, before.scatter, atol=0.1 * np.abs(before.scatter).max())
    assert again.signature == bundle.signature
    assert (again.own is again.base) == (family == "frozen")


def test_the_same_bundle_gives_the_same_bytes(adapted, packed) -> None:
    backwards = dict(reversed(adapted.tensors.items()))
    assert pack(replace(adapted, tensors=backwards)) == packed
    assert bundle_digest(packed) == hashlib.sha256(packed).hexdigest()


def test_any_safetensors_reader_opens_it(packed) -> None:
    assert load(packed).keys() == {"adapter", "base", "own", "signature"}


@pytest.mark.parametrize("codec", codecs.CODECS)
def test_what_is_read_back_is_what_the_codec_leaves(adapted, codec) -> None:
    again = unpack(pack(adapted, codec=codec))
    assert again.manifest.codec == codec
    expected = codecs.quantised(adapted.tensors, codec)
    for name, tensor in again.tensors.items():
        assert tensor.dtype == np.float32
        assert tensor.tobytes() == expected[name].tobytes()
    assert unpack(pack(adapted, codec=codec)).tensors[name].tobytes() == tensor.tobytes()


def test_a_codec_named_in_the_manifest_is_used(adapted) -> None:
    assert pack(changed(adapted, codec="int4")) == pack(adapted, codec="int4")


def _of_real_size(classes: int = 10) -> tuple[bundles.Bundle, np.ndarray]:
    """Bottleneck 16 at four sites of 192 dimensions, base features of three depths."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(576, 576)) * np.exp(-np.arange(576) / 60)[:, None]
    centres = rng.normal(size=(classes, 576)) * 2
    names = [f"a class called {k:02d}" for k in range(classes)] * 60
    features = l2_normalise(
        np.tile(centres, (60, 1)) + rng.normal(size=(60 * classes, 576)) @ mix + 3
    )
    base = ClassStatistics.fit(features, names)
    own = ClassStatistics.fit(l2_normalise(features[:, :192]), names)
    shapes = {
        "down.weight": (16, 192),
        "down.bias": (16,),
        "up.weight": (192, 16),
        "up.bias": (192,),
    }
    tensors = {
        f"blocks.{k}.mlp/{name}": rng.normal(0, 0.02, size=shape).astype(np.float32)
        for k in range(8, 12)
        for name, shape in shapes.items()
    }
    manifest = bundles.Manifest(
        encoder="e" * 64,
        family="bottleneck",
        rank=16,
        sites=tuple(f"blocks.{k}.mlp" for k in range(8, 12)),
        labels=base.labels,
        task="ten classes",
        created_at=1764000000.123,
        created_by="device-a",
        parents=tuple(f"{k:064x}" for k in range(10)),
        samples=base.samples,
        score_quantiles=tuple(score_quantiles(rng.normal(500, 40, size=1000))),
    )
    sign = signature(features, seed="e" * 64)
    return bundles.Bundle(manifest, tensors, base, own, sign), features


def test_ten_classes_of_the_default_encoder_fit_into_60_kb_with_the_same_head() -> None:
    bundle, features = _of_real_size()
    data = pack(bundle, codec="int8")
    assert len(data) <= 60_000
    assert len(pack(bundle, codec="int4")) <= 60_000
    assert len(pack(bundle, codec="int1")) <= 40_000
    truth = [f"a class called {k:02d}" for k in range(10)] * 60
    for statistics in (bundle.base, unpack(data).base):
        head = GaussianHead.from_statistics([statistics])
        found = head.label_probabilities(head.log_likelihoods(features)).argmax(axis=1)
        assert np.mean([head.labels[k] == name for k, name in zip(found, truth, strict=True)]) > 0.9


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
    with pytest.raises(ForeignBundleError, match="format version 7, this version reads 2"):
        unpack(repacked(packed, manifest={"format": 7, "some_new_field": 1}))


def test_trailing_bytes_are_refused(packed) -> None:
    with pytest.raises(CorruptBundleError, match="belong to nothing"):
        unpack(packed + b"payload")


def test_a_bundle_over_the_limits_is_refused(packed) -> None:
    for limits in (Limits(bundle_bytes=1000), Limits(header_bytes=100), Limits(tensors=2)):
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
    forged = b"".join(
        (broken if each == name else tensor).tobytes()
        for each, tensor in sorted(adapted.tensors.items())
    )
    with pytest.raises(NonFiniteBundleError, match=name):
        unpack(repacked(packed, arrays={"adapter": np.frombuffer(forged, np.uint8)}))


@pytest.mark.parametrize("codec", ["fp16", "int8", "int1"])
def test_weights_that_a_codec_cannot_hold_are_refused(adapted, codec) -> None:
    name = min(adapted.tensors)
    large = np.full_like(adapted.tensors[name], 1e30)
    with pytest.raises(NonFiniteBundleError, match="store it as fp32"):
        pack(replace(adapted, tensors={**adapted.tensors, name: large}), codec=codec)


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
        {"codec": "int3"},
        {"shapes": {}},
        {"shapes": {"blocks.0.mlp/down": [0, 6]}},
        {"shapes": {"blocks.0.mlp/down": [-2, 6]}},
        {"shapes": {"blocks.0.mlp/down": [2**40]}},
        {"shapes": {"blocks.0.mlp/down": [1] * 40}},
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
        (["base"], {}),
        (["own"], {}),
        (["adapter"], {}),
        ([], {"signature": np.zeros(4, np.uint8)}),
        ([], {"surprise": np.zeros(4, np.uint8)}),
        ([], {"base/surprise": np.zeros(4, np.uint8)}),
        ([], {"base": np.zeros(4, np.uint8)}),
        ([], {"base": np.zeros(400, np.uint8)}),
        ([], {"own": np.zeros((20, 20), np.uint8)}),
        ([], {"own": np.zeros(100, np.float32)}),
        ([], {"adapter": np.zeros(191, np.uint8)}),
        ([], {"adapter": np.zeros(193, np.uint8)}),
        ([], {"adapter": np.zeros(48, np.float32)}),
    ],
)
def test_parts_that_contradict_each_other_are_refused(packed, drop, arrays) -> None:
    with pytest.raises(CorruptBundleError):
        unpack(repacked(packed, drop=drop, arrays=arrays))


def test_an_adapter_of_more_numbers_than_allowed_is_refused_unread(packed) -> None:
    # At one bit a number a small file could ask for a great deal of memory.
    for shape in ([2**22, 2], [2**22, 2**22, 2**22, 2**22]):
        manifest = {"codec": "int1", "shapes": {"blocks.0.mlp/down": shape}}
        with pytest.raises(BundleTooLargeError, match="numbers"):
            unpack(repacked(packed, manifest=manifest))


def test_a_frozen_bundle_with_an_adapter_is_refused(make_bundle, packed) -> None:
    frozen = pack(make_bundle())
    with pytest.raises(CorruptBundleError, match="expected"):
        unpack(repacked(frozen, arrays={"adapter": np.zeros(4, np.uint8)}))
    with pytest.raises(InvalidManifestError):
        unpack(repacked(frozen, manifest={"shapes": {"x": [1]}}))


def test_own_statistics_may_have_fewer_dimensions_than_base_but_not_more(
    adapted, interface
) -> None:
    narrow = ClassStatistics(
        adapted.own.labels,
        adapted.own.counts,
        adapted.own.means[:, :4].copy(),
        adapted.own.scatter[:4, :4].copy(),
    )
    again = unpack(pack(replace(adapted, own=narrow)))
    assert (again.base.dim, again.own.dim) == (6, 4)
    check_compatible(again, msgspec.structs.replace(interface, network_dim=4))
    for dim in (0, 5):
        with pytest.raises(WrongEncoderError, match="6/4"):
            check_compatible(again, msgspec.structs.replace(interface, network_dim=dim))
    with pytest.raises(CorruptBundleError, match="no larger"):
        pack(replace(adapted, base=narrow))
    wide = l2_normalise(np.random.default_rng(0).normal(size=(8, 9)))
    wider = ClassStatistics.fit(wide, list(adapted.own.labels) * 4)
    with pytest.raises(CorruptBundleError, match="no larger"):
        pack(replace(adapted, own=wider))


@pytest.mark.parametrize("labels", [["cat"], ["dog", "cat"], ["cat", "cat"]])
def test_statistics_of_other_classes_than_the_manifests_are_refused(packed, labels) -> None:
    with pytest.raises(CorruptBundleError, match=r"label|class"):
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
