"""Ed25519 signatures of commits and manifests: who signed one, and whether he is trusted."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING

from ckptmgr.errors import UsageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

Trusted = Mapping[str, "Ed25519PublicKey"]
"""Public keys by their ids."""

COMMIT, MANIFEST = b"ckptmgr commit\0", b"ckptmgr manifest\0"
"""What is signed, in front of it: a signature of the one is none of the other."""

_PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----", re.DOTALL)
_HINT = "Make keys with `openssl genpkey -algorithm ed25519` (docs/encryption.md)."


@dataclass(frozen=True, slots=True)
class Signer:
    """A private key; nothing of it is in a text that is made of this."""

    id: str
    public: Ed25519PublicKey = field(repr=False)
    private: Ed25519PrivateKey = field(repr=False)

    def sign(self, what: bytes, payload: bytes) -> str:
        """The signature of a commit or manifest, in hex: equal inputs, equal signatures."""
        return self.private.sign(what + payload).hex()


def is_signed(trusted: Trusted, signer: str, signature: str, what: bytes, payload: bytes) -> bool:
    """Whether one of the trusted keys signed this commit or manifest."""
    from cryptography.exceptions import InvalidSignature

    public = trusted.get(signer)
    if public is None:
        return False
    try:
        public.verify(bytes.fromhex(signature), what + payload)
    except (InvalidSignature, ValueError):
        return False
    return True


def _id_of(public: Ed25519PublicKey) -> str:
    return blake2b(public.public_bytes_raw(), digest_size=8).hexdigest()


def parse_signer(text: bytes, *, subject: str) -> Signer:
    """A private key in PEM.

    Raises:
        UsageError: it is none, or of another kind, or needs a password.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        found = load_pem_private_key(text, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise UsageError("holds no private key in PEM", subject=subject, hint=_HINT) from None
    if not isinstance(found, Ed25519PrivateKey):
        raise UsageError("is not an Ed25519 key", subject=subject, hint=_HINT)
    public = found.public_key()
    return Signer(_id_of(public), public, found)


def parse_trusted(text: bytes, *, subject: str) -> Trusted:
    """Public keys in PEM, one after the other.

    Raises:
        UsageError: there is none, or one of another kind.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    trusted: dict[str, Ed25519PublicKey] = {}
    for pem in _PEM.findall(text):
        try:
            found = load_pem_public_key(pem)
        except (ValueError, UnsupportedAlgorithm):
            raise UsageError("holds a key that is none", subject=subject, hint=_HINT) from None
        if not isinstance(found, Ed25519PublicKey):
            raise UsageError("holds a key that is not Ed25519", subject=subject, hint=_HINT)
        trusted[_id_of(found)] = found
    if not trusted:
        raise UsageError("holds no public key in PEM", subject=subject, hint=_HINT)
    return trusted
