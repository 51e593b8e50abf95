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

    /// The schedule of a run that goes on from `step` and ends after `total` steps. There is no jump: after the warm-up, the
    /// rate falls from where it is, in half a cosine, to the same floor at the new end; what has fallen to the floor stays
    /// there.
    #[must_use]
    pub fn refit(self, step: usize, total: usize) -> Self {
        if step <= self.warmup {
            return Self { total, ..self };
        }
        let peak = self.at(step);
        let floor = if peak > 0.0 { (self.floor * self.peak / peak).min(1.0) } else { 1.0 };
        Self { peak, floor, warmup: step, total }
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
    /// `a` up to `step`, then `b`: how far the rate moves in any one step, and the rates.
    fn moves(a: Cosine, step: usize, b: Cosine) -> (f64, Vec<f64>) {
        let rates: Vec<f64> = (0..b.total).map(|s| if s < step { a.at(s) } else { b.at(s) }).collect();
        (rates.windows(2).map(|pair| (pair[1] - pair[0]).abs()).fold(0.0, f64::max), rates)
    }

    #[test]
    fn another_end_makes_no_jump() {
        let planned = Cosine { peak: 1.0, floor: 0.1, warmup: 10, total: 100 };
        for (step, total) in [(4, 300), (10, 300), (11, 40), (55, 300), (55, 70), (99, 200), (100, 200)] {
            let (largest, rates) = moves(planned, step, planned.refit(step, total));
            // Half a cosine over n steps moves by pi / 2 / n at most.
            let bound = 0.1_f64.max(0.5 * std::f64::consts::PI / (total - step - 1) as f64);
            assert!(largest <= bound + 1e-12, "{step} {total}: {largest}");
            assert!((rates[total - 1] - 0.1).abs() < 1e-12, "{step} {total}: the same floor at the end");
            assert_eq!(planned.refit(step, total).at(step), planned.at(step), "{step} {total}");
        }
        let again = planned.refit(55, 300).refit(200, 400);
        assert_eq!(again.at(200), planned.refit(55, 300).at(200));
        assert!((again.at(399) - 0.1).abs() < 1e-12);
        let finished = Cosine { floor: 0.0, ..planned }.refit(100, 200);
        assert_eq!([finished.at(100), finished.at(199)], [0.0; 2], "not NaN");
    }
}
