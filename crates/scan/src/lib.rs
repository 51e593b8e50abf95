//! Burn operations over the linear-recurrence kernels
