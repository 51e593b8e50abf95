//! Verify-then-time benchmarks
