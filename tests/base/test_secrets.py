"""Secrets do not show themselves; derived keys are stable and apart from each other."""

from __future__ import annotations

import pickle

import pytest

from farebox.base.secrets import Secret, admin_key, derive_key, key_hash, new_admin_key, new_customer_key

MASTER = Secret("correct horse battery staple, twice over")


def test_a_secret_shows_three_stars_everywhere_but_in_reveal():
    for shown in (repr(MASTER), str(MASTER), f"{MASTER}", f"{[MASTER]!r}"):
        assert "horse" not in shown
    assert MASTER.reveal().startswith("correct horse")


def test_a_secret_is_not_pickled():
    with pytest.raises(TypeError):
        pickle.dumps(MASTER)


def test_equal_secrets_are_equal_and_texts_are_not_secrets():
    assert Secret("a") == Secret("a")
    assert Secret("a") != Secret("b")
    assert Secret("a") != "a"


def test_each_purpose_and_each_mode_has_a_key_of_its_own():
    purposes = ["tokens/sandbox", "tokens/live", "quotes/sandbox", "quotes/live", "admin-key"]
    keys = {derive_key(MASTER, p) for p in purposes}
    assert len(keys) == len(purposes)
    assert all(len(k) == 32 for k in keys)


def test_derivation_stays_the_same_over_releases():
    # A changed derivation would lock every operator out and void every token: this is a published vector of ours.
    assert derive_key(Secret("x" * 32), "tokens/live").hex() == (
        "7f213265eb8605b785e6e83e2dba86d470ac21145223afd89331012b33d15e7d"
    )
    assert admin_key(Secret("x" * 32)) == "fbx_sk_ucr6r7p3yufbvxyoeaqhskkwaxz72zqs"


def test_made_keys_have_their_prefix_160_bits_and_are_never_the_same():
    assert new_admin_key().startswith("fbx_sk_")
    assert new_customer_key().startswith("fbx_ck_")
    assert {len(new_admin_key()), len(new_customer_key())} == {39}
    assert len({new_customer_key() for _ in range(100)}) == 100
    assert len(key_hash(new_customer_key())) == 32
