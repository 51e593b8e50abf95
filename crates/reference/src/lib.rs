//! The f64 oracle: each recurrence written one token at a time, with its adjoint
