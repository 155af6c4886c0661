"""Signatures, and the values that are signed."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from elmwood.errors import Damaged
from elmwood.hub import messages, signing
from elmwood.hub.messages import Commitment, Report, Signed

VALUE = Commitment(lease="ab" * 16, token=3, commitment="cd" * 32)


def test_a_signed_value_opens_as_it_was_and_no_change_of_it_does():
    key = signing.new_key()
    signed = signing.sign(VALUE, key)
    through = Signed.model_validate_json(signed.model_dump_json())
    assert signing.open_signed(through, Commitment, signing.public(key)) == VALUE
    for change in ({"token": 4}, {"lease": "ac" * 16}, {"more": 1}):
        with pytest.raises(signing.Forged, match="signature"):
            signing.open_signed(signed.model_copy(update={"body": signed.body | change}), Commitment)
    with pytest.raises(signing.Forged, match="only"):
        signing.open_signed(signed, Commitment, "00" * 32)


@given(st.binary(max_size=50), st.sampled_from(["GET", "POST"]), st.text("/abc?=&", min_size=1, max_size=9), st.integers(-300, 300))
def test_a_signed_request_holds_for_its_own_method_target_and_body_only(body, method, target, late):
    key, now = signing.new_key(), 1_800_000_000
    headers = signing.sign_request(method, target, body, now + late, key)
    assert signing.check_request(method, target, body, headers, now).key == signing.public(key)
    for other in (("PATCH", target, body), (method, target + "x", body), (method, target, body + b"x")):
        with pytest.raises(signing.Forged):
            signing.check_request(*other, headers, now)
    with pytest.raises(signing.Forged, match="clock"):
        signing.check_request(method, target, body, headers, now + late + 301)


@pytest.mark.parametrize("change", [{"Elmwood-Time": "1e9"}, {"Elmwood-Nonce": "x"}, {"Elmwood-Key": "zz"}, {"Elmwood-Signature": ""}])
def test_malformed_headers_are_forged(change):
    headers = signing.sign_request("GET", "/", b"", 1_800_000_000, signing.new_key()) | change
    with pytest.raises(signing.Forged):
        signing.check_request("GET", "/", b"", headers, 1_800_000_000)


def test_keys_are_their_owners_alone_and_never_overwritten(tmp_path):
    path = tmp_path / "keys" / "hub.key"
    key = signing.load_or_make_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert signing.public(signing.load_or_make_key(path)) == signing.public(key)
    with pytest.raises(FileExistsError):
        signing.save_key(key, path)
    path.write_text("no key")
    with pytest.raises(Damaged, match="recovery code"):
        signing.load_key(path)


@pytest.mark.parametrize("extra", [{"more": 1}, {"token": 0}, {"token": "three"}, {"lease": "../etc"}, {"commitment": "CD" * 32}])
def test_messages_refuse_unknown_keys_and_values_out_of_bounds(extra):
    with pytest.raises(ValidationError):
        Commitment.model_validate_json(json.dumps(VALUE.model_dump() | extra))


def test_a_report_is_a_verdict_or_a_fault_and_a_rejection_has_a_code():
    with pytest.raises(ValidationError):
        Report(token=1)
    assert Report(token=1, fault="time").verdict is None
    with pytest.raises(ValidationError):
        Report(token=1, fault="time", gain=float("nan"))


@pytest.mark.parametrize("name", ["", "a" * 41, "a\nb", "a\u202eb", "a\u200bb"])
def test_names_have_no_characters_that_nobody_sees(name):
    with pytest.raises(ValidationError):
        messages.NewAccount(name=name, recovery="00" * 32)
