//! Sequence-mixing layers and channel mixers for Burn
