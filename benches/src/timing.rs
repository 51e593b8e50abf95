//! Warm-up, repetitions and what is left of them.

use crate::Error;
use std::time::Instant;

/// How long to measure.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// Seconds of timed runs.
    pub seconds: f64,
    /// Samples at the least, however long they take.
    pub samples: usize,
}

impl Effort {
    /// For results that will be shown.
    pub const FULL: Effort = Effort { seconds: 1.5, samples: 7 };
    /// To see that everything runs.
    pub const QUICK: Effort = Effort { seconds: 0.1, samples: 3 };
}

/// Samples are at least this long, so that a call of some microseconds is not the clock's.
const SHORTEST: f64 = 1e-3;

/// A run of this many seconds is no different when it is warm.
const LONG: f64 = 0.2;

fn seconds(run: &mut impl FnMut() -> Result<(), Error>) -> Result<f64, Error> {
    let start = Instant::now();
    run()?;
    Ok(start.elapsed().as_secs_f64())
}

/// The samples of a benchmark, in seconds per run.
#[derive(Debug, Clone, Default)]
pub struct Samples {
    /// Wall-clock time.
    pub wall: Vec<f64>,
    /// Time on all processors together; empty where the system does not tell.
    pub cpu: Vec<f64>,
}

impl Samples {
    /// Times `run`, which makes `calls` calls, after an untimed run and, if that was short, one that tells how long a
    /// warm one takes.
    pub(crate) fn take(
        effort: Effort,
        calls: usize,
        mut run: impl FnMut() -> Result<(), Error>,
    ) -> Result<Samples, Error> {
        let mut once = seconds(&mut run)?;
        if once < LONG {
            once = seconds(&mut run)?;
        }
        let runs = (SHORTEST / once.max(1e-9)).ceil().max(1.0) as usize;
        let mut samples = Samples::default();
        let all = Instant::now();
        while samples.wall.len() < effort.samples || all.elapsed().as_secs_f64() < effort.seconds {
            let (start, cpu) = (Instant::now(), processor_seconds());
            for _ in 0..runs {
                run()?;
            }
            let calls = (runs * calls) as f64;
            samples.wall.push(start.elapsed().as_secs_f64() / calls);
            if let Some((before, after)) = cpu.zip(processor_seconds()) {
                samples.cpu.push((after - before) / calls);
            }
        }
        Ok(samples)
    }
}

/// The `q`-quantile (0 is the least, 1/2 the median), between neighbours by their distance; 0 of nothing.
pub(crate) fn quantile(samples: &[f64], q: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let at = q * last as f64;
    let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    low + (high - low) * at.fract()
}

/// Time that this process has spent on processors.
#[cfg(unix)]
fn processor_seconds() -> Option<f64> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // Safety: `time` is a timespec to write to.
    let status = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    (status == 0).then_some(time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9)
}

#[cfg(not(unix))]
fn processor_seconds() -> Option<f64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_interpolate() {
        let samples = [4.0, 1.0, 3.0, 2.0];
        assert_eq!([0.0, 0.5, 1.0].map(|q| quantile(&samples, q)), [1.0, 2.5, 4.0]);
        assert_eq!(quantile(&[], 0.5), 0.0);
    }

    #[test]
    fn an_error_stops_the_measurement() {
        assert!(Samples::take(Effort::QUICK, 1, || Err(Error::argument("x", "is bad"))).is_err());
    }
}
