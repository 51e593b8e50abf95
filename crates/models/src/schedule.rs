//! Learning rates over a run.

use serde::{Deserialize, Serialize};

/// Linear warm-up to a peak, then half a cosine down to a floor.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Cosine {
    /// The largest learning rate.
    pub peak: f64,
    /// The learning rate at the end, as a part of `peak`.
    pub floor: f64,
    /// Steps of warm-up.
    pub warmup: usize,
    /// Steps of the run.
    pub total: usize,
}

impl Cosine {
    /// The learning rate of step `step`, counted from 0.
    pub fn at(&self, step: usize) -> f64 {
        if step < self.warmup {
            return self.peak * (step + 1) as f64 / self.warmup as f64;
        }
        let span = self.total.saturating_sub(self.warmup + 1).max(1);
        let progress = ((step - self.warmup) as f64 / span as f64).min(1.0);
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
        self.peak * (self.floor + (1.0 - self.floor) * cosine)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_rises_to_the_peak_and_falls_to_the_floor() {
        let schedule = Cosine { peak: 2.0, floor: 0.1, warmup: 4, total: 101 };
        assert_eq!([0, 1, 3, 4].map(|step| schedule.at(step)), [0.5, 1.0, 2.0, 2.0]);
        assert!((schedule.at(52) - 1.1).abs() < 1e-9, "half way");
        assert!((schedule.at(100) - 0.2).abs() < 1e-9);
        assert!((schedule.at(1000) - 0.2).abs() < 1e-9, "stays there");
        assert!((5..101).all(|step| schedule.at(step) < schedule.at(step - 1)));
    }

    #[test]
    fn runs_without_room_for_warm_up_still_have_a_rate() {
        let schedule = Cosine { peak: 1.0, floor: 0.0, warmup: 0, total: 1 };
        assert_eq!(schedule.at(0), 1.0);
    }
}
