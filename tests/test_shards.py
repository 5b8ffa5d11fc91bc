"""Patterns of shards: what they mean, and how what is missing is told."""

import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitds.cluster.doctor.probe import digest_of_data
from vitds.shards import expand_braces, find_shards, shard_names

PIECES = st.recursive(
    st.sampled_from(["a", "bc", "x-", "{00..03}", "{9..11}", "{3..1}", "{08..10}", "{u,v}", "7"]),
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: "{" + ",".join(parts) + "}"),
    ),
    max_leaves=6,
)


@settings(deadline=None)  # a process each
@given(PIECES)
def test_braces_mean_what_bash_means_by_them(text):
    in_bash = subprocess.run(["bash", "-c", f"echo {text}"], capture_output=True, text=True, check=True).stdout.split()
    assert list(expand_braces(text)) == in_bash


@pytest.mark.parametrize("text", ["plain", "a{b}c", "{}", "{a,b", "a}b", "{1..x}"])
def test_braces_without_alternatives_stay(text):
    assert list(expand_braces(text)) == [text]


@pytest.fixture
def shards(tmp_path):
    for name in (
        "a-000.tar",
        "a-001.tar",
        "a-002.tar",
        "b-000.tar",
        "deep/a-000.tar",
        "deep/er/c.tar",
        "odd[1].tar",
        "b.tar.index",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a-001.tar", ["a-001.tar"]),
        ("", ["a-000.tar", "a-001.tar", "a-002.tar", "b-000.tar", "odd[1].tar"]),
        ("a-{000..002}.tar", ["a-000.tar", "a-001.tar", "a-002.tar"]),
        ("a-{002..000}.tar", ["a-000.tar", "a-001.tar", "a-002.tar"]),
        ("{a,b}-*.tar", ["a-000.tar", "a-001.tar", "a-002.tar", "b-000.tar"]),
        ("a-00[12].tar", ["a-001.tar", "a-002.tar"]),
        ("**/a-000.tar", ["a-000.tar", "deep/a-000.tar"]),
        ("odd[1].tar", ["odd[1].tar"]),
        ("{deep,deep/er}", ["deep/a-000.tar", "deep/er/c.tar"]),
        ("d*p", ["deep/a-000.tar"]),
        ("b*", ["b-000.tar"]),
    ],
)  # fmt: skip
def test_patterns(shards, pattern, expected):
    assert find_shards(f"{shards}/{pattern}") == [str(shards / name) for name in expected]


def test_several_are_joined_each_shard_once(shards, monkeypatch):
    both = f"{shards}/b-000.tar::{shards}/a-{{000..001}}.tar::{shards}/deep/../a-000.tar"
    assert find_shards(both) == [str(shards / name) for name in ("a-000.tar", "a-001.tar", "b-000.tar")]
    monkeypatch.setenv("HOME", str(shards))
    assert find_shards("~/deep::~/b-000.tar") == [str(shards / "b-000.tar"), str(shards / "deep/a-000.tar")]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{0}/a-{{000..005}}.tar", "3 of the 6 shards or patterns .* are not there, first '.*/a-003.tar'"),
        ("{0}/c*.tar", r"nothing matches '.*/c\*.tar'"),
        ("{0}/none.tar", "'.*/none.tar' is not there"),
        ("{0}/void", "'.*/void' holds no \\*.tar"),
        ("{0}/a-000.tar::{0}/c*.tar", r"1 of the 2 .* first '.*/c\*.tar'"),
        ("s3://bucket/a-{{000..005}}.tar", "'s3://bucket/a-{000..005}.tar' is not a local path; mount"),
        ("pipe:cat a.tar", "not a local path"),
    ],
)
def test_what_is_missing_is_told(shards, pattern, message):
    (shards / "void").mkdir()
    with pytest.raises(ValueError, match=message):
        find_shards(pattern.format(shards))


def test_shards_of_one_name_are_told_apart():
    paths = ["/d/x/1.tar", "/d/y/1.tar", "/e/y/1.tar", "/d/2.tar", "/d/x/3.tar", "/e/z/3.tar"]
    assert shard_names(paths) == ["d/x/1.tar", "d/y/1.tar", "e/y/1.tar", "2.tar", "x/3.tar", "z/3.tar"]


def test_hosts_compare_what_a_pattern_means(shards):
    """The doctor's digest: of names and sizes of the shards, not of what else is there."""
    pattern = f"{shards}/a-{{000..002}}.tar"
    first = digest_of_data(pattern)
    assert first["entries"] == 3
    (shards / "a-003.tar").write_bytes(b"")
    assert digest_of_data(pattern) == first
    (shards / "a-001.tar").write_bytes(b"longer than it was")
    assert digest_of_data(pattern)["digest"] != first["digest"]
    (shards / "a-001.tar").unlink()
    assert digest_of_data(pattern)["error"].startswith(f"{shards}: 1 of the 3 shards or patterns")


def test_what_only_one_host_has_indexed_yet_is_no_difference(shards):
    first = digest_of_data(str(shards))
    (shards / "a-000.tar.index.safetensors").write_bytes(b"")
    assert digest_of_data(str(shards)) == first
    (shards / "a-000.tar.copy").write_bytes(b"")
    assert digest_of_data(str(shards)) != first
