#!/usr/bin/env python3
"""Makes golden.json: labels, nonce, wrapping and key slots, by other implementations than ours.

Needs: pip install cryptography argon2-cffi
Run:   ./golden.py > golden.json

It states the format a second time, from the documentation of `keys` and `slot`. If this file and the Rust
code disagree, a volume made by an older build does not open.
"""
import hashlib, hmac, json, struct
from argon2.low_level import Type, hash_secret_raw
from cryptography.hazmat.primitives.ciphers.aead import AESGCM


def hkdf(salt, key, label):
    """RFC 5869 for one block of SHA-256."""
    prk = hmac.new(salt or bytes(32), key, hashlib.sha256).digest()
    return hmac.new(prk, label.encode() + b"\x01", hashlib.sha256).digest()


def wrap(with_key, label, key, nonce, context):
    return nonce + AESGCM(hkdf(None, with_key, label)).encrypt(nonce, key, context)


def slot(kind, argon2, salt, kek, dek, nonce, context):
    header = struct.pack("<HHIII", kind, 1, *argon2) + salt
    return (header + wrap(kek, "offload v1 kek wraps dek", dek, nonce, header + context)).ljust(256, b"\0")


key = bytes(range(0x00, 0x20))
salt = bytes(range(0x20, 0x40))
dek = bytes(range(0x40, 0x60))
session = bytes(range(0x60, 0x80))
nonce = bytes(range(0x80, 0x8C))
context = b"volume 7, slot 0"
passphrase = b"correct horse battery staple"
argon2 = (256, 3, 2)

stretched = hash_secret_raw(
    passphrase, salt, time_cost=argon2[1], memory_cost=argon2[0], parallelism=argon2[2],
    hash_len=32, type=Type.ID, version=0x13,
)
result = {
    "key": key, "dek": dek, "session": session, "context": context, "passphrase": passphrase,
    "slot_key_file": slot(1, (0, 0, 0), salt, hkdf(salt, key, "offload v1 kek from key file"), dek, nonce, context),
    "slot_passphrase": slot(2, argon2, salt, hkdf(salt, stretched, "offload v1 kek from passphrase"), dek, nonce, context),
    "wrapped_session": wrap(dek, "offload v1 dek wraps session key", session, nonce, context),
}
# What each session key makes of sequence number 0x0102030405060708, these associated data, and 16 bytes of 0xa5.
seq_nonce = bytes(4) + struct.pack("<Q", 0x0102030405060708)
for use in ("data", "page", "log", "ring", "superblock"):
    derived = hkdf(None, session, f"offload v1 session {use}")
    result[f"sealed_{use}"] = AESGCM(derived).encrypt(seq_nonce, b"\xa5" * 16, b"associated data")
print(json.dumps({name: value.hex() for name, value in result.items()}, indent=1))
