"""Keys of root alone, which units get by LoadCredential= as docs/systemd.md has it."""

from __future__ import annotations

import asyncio
import os

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ckptmgr.repository.catalog import Catalog
from ckptmgr.repository.envelope import Key
from ckptmgr.repository.keyring import CREDENTIALS
from ckptmgr.repository.signature import parse_trusted
from ckptmgr.store.local import LocalStore
from ckptmgr.types import StepId
from driven import TREE
from servers.machine import Machine
from systemd.conftest import Tenant

pytestmark = pytest.mark.root

SECRET = os.urandom(32)
PRIVATE = Ed25519PrivateKey.generate()
PUBLIC = PRIVATE.public_key().public_bytes(
    serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
)
FILES = {
    "ckptmgr.key": SECRET.hex(),
    "ckptmgr.sign": PRIVATE.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode(),
    "ckptmgr.verify": PUBLIC.decode(),
}


def given(booted: Machine, *names: str) -> list[str]:
    """The lines of a drop-in; the files are there, for root alone."""
    for name in names:
        booted.write(f"/etc/ckptmgr/{name}", FILES[name], mode=0o600)
    return [f"LoadCredential={name}:/etc/ckptmgr/{name}" for name in names]


def test_the_document_names_the_credentials_that_are_looked_for() -> None:
    text = (TREE / "docs/systemd.md").read_text()
    assert set(CREDENTIALS.values()) == set(FILES)
    for name in FILES:
        assert f"LoadCredential={name}:/etc/ckptmgr/{name}\n" in text


def test_a_daemon_encrypts_and_signs_and_a_unit_of_the_job_reads_it_back(
    booted: Machine, tenant: Tenant
) -> None:
    tenant.change("Service", *given(booted, "ckptmgr.key", "ckptmgr.sign"))
    assert booted.run("cat", "/etc/ckptmgr/ckptmgr.key", uid=tenant.uid).returncode
    tenant.start()
    with tenant.train(1) as training:
        training.await_event("finished")
        tenant.await_event("committed")
        key = Key.of(SECRET).id
        assert [job["key"] for job in tenant.status()["jobs"]] == [key]
    committed = asyncio.run(Catalog(LocalStore(str(tenant.rig.path))).decision(StepId(1, 1)))
    assert committed.signer in parse_trusted(PUBLIC, subject="the test")
    # Read back by a user who owns nothing: with the keys, with none, and with another public one.
    booted.run("chmod", "-R", "a+rX", tenant.home)
    name = f"keyed{tenant.uid}"
    booted.write(f"/etc/ckptmgr/jobs/{name}.env", f"CKPTMGR_URL=file://{tenant.home}/store\n")
    service = f"ckptmgr-verify@{name}.service"
    log = booted.path(f"/var/log/ckptmgr-verify-{name}.out")
    output = f"StandardOutput=truncate:/var/log/{log.name}"
    booted.drop_in(service, "Service", output, name="60-test")
    booted.systemctl("daemon-reload")
    booted.systemctl("start", service)
    assert f"not checked in what key {key} encrypts" in log.read_text()
    keys = given(booted, "ckptmgr.key", "ckptmgr.verify")
    booted.drop_in(service, "Service", output, *keys, name="60-test")
    booted.systemctl("daemon-reload")
    booted.systemctl("start", service)
    assert log.read_text() == "1.1 holds\n"
    stranger = Ed25519PrivateKey.generate().public_key()
    booted.write(
        "/etc/ckptmgr/ckptmgr.verify",
        stranger.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        ).decode(),
    )
    assert booted.run("systemctl", "start", service).returncode
    assert booted.property(service, "ExecMainStatus") == "3"
