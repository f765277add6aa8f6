"""Secrets in what is logged and answered."""

from __future__ import annotations

import pytest
from cachefs_csi.redacting import redacted, secret_values, shown_map
from hypothesis import given
from hypothesis import strategies as st

from cachefs.model import ConfigError


def test_an_error_that_quotes_the_secret_it_refuses_does_not_show_it() -> None:
    secrets = secret_values({"secret": "wJal/rXU'tn+\\K7"})
    error = ConfigError("options.secret", "wJal/rXU'tn+\\K7", "another")
    assert redacted(str(error), secrets) == 'options.secret: "***" is not accepted; expected another'


@pytest.mark.parametrize("form", ["a/b+c=", "a%2Fb%2Bc%3D", "a/b%2Bc%3D"])
def test_quoted_as_in_urls_it_is_a_secret_too(form: str) -> None:
    assert redacted(f"GET https://host/?X-Token={form}&x=1", {"a/b+c="}) == "GET https://host/?X-Token=***&x=1"


def test_options_beside_a_secret_are_secret_and_where_a_store_is_is_not() -> None:
    parameters = {"url": "s3://KEY:SECRET@bucket/", "ufs.secret": "hidden", "ufs.region": "eu", "path": "/a"}
    secrets = {"AWS_ACCESS_KEY_ID": "AKIA", "endpoint_url": "http://s3", "empty": ""}
    assert secret_values(secrets, parameters) == {"AKIA", "hidden"}
    expected = {"path": "/a", "ufs.region": "eu", "ufs.secret": "***", "url": "s3://***@bucket/"}
    assert shown_map(parameters) == expected
    assert redacted("cannot list s3://KEY:SECRET@bucket/", ()) == "cannot list s3://***@bucket/"


def test_a_short_one_is_taken_as_a_word() -> None:
    assert redacted("port 11, key 1, key=1", {"1"}) == "port 11, key ***, key=***"


def test_one_secret_inside_another_leaves_nothing_of_either() -> None:
    assert redacted("it is longsecret", {"secret", "longsecret"}) == "it is ***"


_NO_STARS = st.characters(exclude_characters="*", codec="utf-8")


@given(st.text(_NO_STARS, min_size=4), st.text(), st.text())
def test_no_text_shows_a_secret(secret: str, before: str, after: str) -> None:
    assert secret not in redacted(before + secret + after, {secret})
