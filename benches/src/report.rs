//! Rows of results, their table, and how they differ from earlier ones.

use crate::timing::quantile;
use crate::{Case, Ceilings, Error, Machine, Samples};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::Path;
use thalweg_kernels::cost::Cost;

/// The result of one benchmark.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// What was run.
    #[serde(flatten)]
    pub case: Case,
    /// Name of the device.
    #[serde(default = "crate::machine::cpu")]
    pub device: String,
    /// Threads.
    pub threads: usize,
    /// Median of the samples, milliseconds.
    pub median_ms: f64,
    /// The fastest sample.
    pub min_ms: f64,
    /// The spread: between the first and the third quartile.
    pub iqr_ms: f64,
    /// Median time on all processors together; 0 where unknown. Other work on the machine disturbs it less.
    pub cpu_ms: f64,
    /// Number of samples.
    pub samples: usize,
    /// Floating-point operations of a run.
    pub flops: u64,
    /// Compulsory bytes of a run.
    pub bytes: u64,
    /// GFLOP/s.
    pub gflops: f64,
    /// GB/s.
    pub gbytes: f64,
    /// The ceiling that binds: `product` or `copy`.
    pub bound: String,
    /// Fraction of that ceiling.
    pub fraction: f64,
    /// Tokens per second.
    pub tokens_per_s: f64,
    /// Largest error against the oracle, relative to the largest element.
    pub error: f64,
    /// The most that inputs and the first call took from the allocator, or that is taken on the GPU; 0 where
    /// unknown.
    pub peak_bytes: u64,
}

impl Row {
    pub(crate) fn new(
        case: &Case,
        samples: &Samples,
        (cost, tokens): (Cost, usize),
        ceilings: &Ceilings,
        error: f64,
        peak_bytes: u64,
    ) -> Self {
        let median = quantile(&samples.wall, 0.5);
        Self {
            case: case.clone(),
            device: ceilings.device.clone(),
            threads: ceilings.threads,
            median_ms: median * 1e3,
            min_ms: quantile(&samples.wall, 0.0) * 1e3,
            iqr_ms: (quantile(&samples.wall, 0.75) - quantile(&samples.wall, 0.25)) * 1e3,
            cpu_ms: quantile(&samples.cpu, 0.5) * 1e3,
            samples: samples.wall.len(),
            flops: cost.flops,
            bytes: cost.bytes,
            gflops: cost.flops as f64 / median / 1e9,
            gbytes: cost.bytes as f64 / median / 1e9,
            bound: if ceilings.copy_binds(cost) { "copy" } else { "product" }.into(),
            fraction: ceilings.floor(cost) / median,
            tokens_per_s: tokens as f64 / median,
            error,
            peak_bytes,
        }
    }

    /// The heading that goes with the rows' `Display`.
    pub fn heading() -> String {
        format!(
            "{:<84} {:>3} {:>10} {:>10} {:>9} {:>8} {:>7} {:>13} {:>11} {:>8}",
            "benchmark", "thr", "median ms", "min ms", "spread", "GFLOP/s", "GB/s", "of ceiling", "tokens/s", "error"
        )
    }

    fn is_same(&self, other: &Row) -> bool {
        self.case == other.case && self.device == other.device && self.threads == other.threads
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(
            f,
            "{:<84} {:>3} {:>10.4} {:>10.4} {:>9.4} {:>8.1} {:>7.1} {:>4.0} % {:<7} {:>10.0} {:>8.1e}",
            self.case.to_string(),
            self.threads,
            self.median_ms,
            self.min_ms,
            self.iqr_ms,
            self.gflops,
            self.gbytes,
            self.fraction * 100.0,
            self.bound,
            self.tokens_per_s,
            self.error
        )
    }
}

/// All of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Where.
    pub machine: Machine,
    /// One for each number of threads.
    pub ceilings: Vec<Ceilings>,
    /// What was measured.
    pub rows: Vec<Row>,
}

/// How a row differs from the same one of an earlier report.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Change {
    /// Not in the earlier report.
    New,
    /// No further apart than the spreads of both together.
    Same,
    /// This many times faster.
    Faster(f64),
    /// This many times slower.
    Slower(f64),
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Change::New => f.write_str("new"),
            Change::Same => f.write_str("same"),
            Change::Faster(times) => write!(f, "FASTER {times:.2}x"),
            Change::Slower(times) => write!(f, "SLOWER {times:.2}x"),
        }
    }
}

impl Report {
    /// An empty report of this machine.
    pub fn new() -> Self {
        Self { machine: Machine::here(), ceilings: Vec::new(), rows: Vec::new() }
    }

    /// Reads a report.
    ///
    /// # Errors
    /// If the file cannot be read or is no report.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::File { path: path.into(), source })?;
        serde_json::from_str(&text).map_err(|source| Error::Json { path: path.into(), source })
    }

    /// Writes the report.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), Error> {
        let text = serde_json::to_string_pretty(self).map_err(|source| Error::Json { path: path.into(), source })?;
        std::fs::write(path, text + "\n").map_err(|source| Error::File { path: path.into(), source })
    }

    /// What has become of `row` of this report since `earlier`: two medians differ if they are further apart than the
    /// two spreads together.
    pub fn change(row: &Row, earlier: &Report) -> Change {
        let Some(before) = earlier.rows.iter().find(|before| before.is_same(row)) else { return Change::New };
        if (row.median_ms - before.median_ms).abs() <= row.iqr_ms + before.iqr_ms {
            Change::Same
        } else if row.median_ms < before.median_ms {
            Change::Faster(before.median_ms / row.median_ms)
        } else {
            Change::Slower(row.median_ms / before.median_ms)
        }
    }
}

impl Default for Report {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Dtype, Part, Pass, Path};

    fn row(median: f64, spread: f64) -> Row {
        let case = Case {
            part: Part::Ops,
            name: "scan".into(),
            pass: Pass::Forward,
            shape: vec![1, 8, 4],
            chunk: None,
            dtype: Dtype::F32,
            path: Path::Native,
        };
        let samples = Samples { wall: vec![median - spread, median, median + spread], cpu: Vec::new() };
        let ceilings =
            Ceilings { device: crate::machine::cpu(), threads: 2, product: 100.0, copies: vec![(1 << 20, 10.0)] };
        Row::new(&case, &samples, (Cost { flops: 64, bytes: 384 }, 8), &ceilings, 0.0, 0)
    }

    #[test]
    fn changes_within_the_spread_are_none() {
        let earlier = Report { rows: vec![row(1.0, 0.1)], ..Report::new() };
        assert_eq!(Report::change(&row(1.15, 0.1), &earlier), Change::Same);
        assert_eq!(Report::change(&row(2.0, 0.1), &earlier), Change::Slower(2.0));
        assert_eq!(Report::change(&row(0.5, 0.1), &earlier), Change::Faster(2.0));
        let other = Row { threads: 1, ..row(1.0, 0.1) };
        assert_eq!(Report::change(&other, &earlier), Change::New);
    }

    #[test]
    fn a_report_survives_its_file() {
        let report = Report { rows: vec![row(1.0, 0.25)], ..Report::new() };
        let text = serde_json::to_string(&report).unwrap();
        let back = serde_json::from_str::<Report>(&text).unwrap();
        assert!(back.machine == report.machine && back.rows[0].is_same(&report.rows[0]));
        assert_eq!((back.rows[0].median_ms, back.rows[0].iqr_ms), (1000.0, 250.0));
        assert!(text.contains("\"name\":\"scan\"") && text.contains("\"bound\":\"copy\""), "{text}");
    }
}
