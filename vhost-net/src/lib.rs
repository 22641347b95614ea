//! The network card. It comes with a later issue; see the README for what works today.
