//! Linear-recurrence kernels on plain slices: no framework, no Burn
