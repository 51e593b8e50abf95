//! Tests that span crates: golden files, laws, gradients, decoding, learning
