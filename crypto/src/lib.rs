//! Keys, AEAD engines and key sources of the offload cards.
//!
//! # What is here, lowest first
//!
//! | module      | knows                                                                             |
//! |-------------|-----------------------------------------------------------------------------------|
//! | `locked`    | a value alone on its own memory page, locked against swap, wiped before release    |
//! | [`aead`]    | AES-256-GCM under one key, by two independent engines; the nonce is a sequence number |
//! | [`keys`]    | [`Secret32`](keys::Secret32), the key types, key derivation, wrapping one key under another |
//! | [`session`] | the AEAD keys of one activation of a volume                                       |
//! | [`source`]  | reading a key file or a passphrase file, and refusing careless ones               |
//! | [`slot`]    | the 256 bytes on disk that hold a volume's key                                    |
//! | [`hygiene`] | what a process does before it holds any key                                       |
//!
//! Imports run down this table only (`slot` uses `source`, `source` uses `keys`, and so on). Only
//! [`source`] and [`hygiene`] talk to the kernel about files and processes; the rest takes bytes.
//!
//! # The keys and who protects whom
//!
//! ```text
//!   key file ----HKDF(slot salt)----------+
//!                                         +--> Kek   wraps --> Dek         in the key slot
//!   passphrase --Argon2id(salt) --HKDF----+             |
//!                                                       +--HKDF--> wraps --> SessionKey
//!                                                                             | HKDF, a label each
//!                                                             data  page  log  ring  superblock
//! ```
//!
//! * The **KEK** never touches a disk. Whoever has the key file or the passphrase has it.
//! * The **DEK** is drawn once per volume. Changing the key file or the passphrase rewrites one slot.
//! * A **session key** is drawn for each activation. That makes a plain counter a sound nonce: it
//!   cannot repeat within an activation, and two activations share no key, even when somebody has
//!   copied the volume and both copies are written.
//! * Each use has its own derived key, so that a page can never stand in for data, and counters of
//!   different uses are independent. No derived key is used for two things; the DEK and the KEK
//!   themselves encrypt nothing, keys derived from them do.
//!
//! # Two engines
//!
//! `aws-lc-rs` (AWS-LC, assembly, formally verified in part) seals data. `aes-gcm` (RustCrypto, pure
//! Rust) wraps keys and can seal data, too. Both pass the NIST CAVP and Wycheproof vectors in
//! `tests/data`, and property tests hold them against each other: neither is trusted alone. `ring` was
//! left out since AWS-LC is its faster, maintained relative; AES-GCM-SIV since our nonces cannot repeat
//! and it must read the data twice; XTS since it does not authenticate.
//!
//! # What is protected in memory, and what is not
//!
//! * [`Secret32`](keys::Secret32) and the portable engine's key schedule live alone on their pages,
//!   which are locked with `mlock(2)` when `RLIMIT_MEMLOCK` allows it, and wiped before release.
//! * The AWS-LC engine's key schedule lives in AWS-LC's own heap block, whose address it does not
//!   tell. AWS-LC wipes it when it is freed; it **can be swapped out**. Locking it would take either
//!   `unsafe` or `mlockall(2)`, which would pin the guest's memory as well. Run cards with
//!   `MemorySwapMax=0` (systemd) or on encrypted swap.
//! * Core dumps and `ptrace(2)` by the same user are closed for the whole process by
//!   [`hygiene::harden_process`], which needs no `madvise(MADV_DONTDUMP)` per page.
//! * Copies in CPU registers and dead stack frames of the libraries are scrubbed on a best effort
//!   basis only. Root on the host, and anything that reads physical memory, gets the keys.

#![forbid(unsafe_code)]

pub mod aead;
#[cfg(test)]
mod golden;
pub mod hygiene;
pub mod keys;
mod locked;
pub mod session;
pub mod slot;
pub mod source;
