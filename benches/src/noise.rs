//! Inputs that depend on their position only: a longer sequence begins like a shorter one, so that the first tokens of a
//! large run can be compared with the oracle's short one.

use thalweg_reference::random::Random;

/// `[rows, time, inner]` numbers made by `shape` from uniform ones in `[0, 1)`; `tensor` tells tensors apart.
pub(crate) fn fill(tensor: u64, [rows, time, inner]: [usize; 3], shape: impl Fn(f32) -> f32) -> Vec<f32> {
    let mut values = Vec::with_capacity(rows * time * inner);
    for row in 0..rows {
        for t in 0..time {
            let mut random = Random::new(tensor << 48 ^ (row as u64) << 32 ^ t as u64);
            values.extend((0..inner).map(|_| shape(random.uniform() as f32)));
        }
    }
    values
}

/// Uniform in `[-1, 1)`.
pub(crate) fn signed(tensor: u64, sizes: [usize; 3]) -> Vec<f32> {
    fill(tensor, sizes, |u| 2.0 * u - 1.0)
}

pub(crate) fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| f64::from(x)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_longer_sequence_begins_like_a_shorter_one() {
        assert_eq!(fill(3, [1, 9, 4], |u| u)[..20], fill(3, [2, 5, 4], |u| u)[..20]);
        assert_ne!(fill(3, [1, 1, 4], |u| u), fill(4, [1, 1, 4], |u| u));
    }
}
