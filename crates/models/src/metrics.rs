//! The numbers of a run as a file, one JSON object a line.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{Error, Result};
use crate::storage::write_atomically;
use crate::trainer::{Event, Observer};

/// The file in a run's folder.
pub const METRICS: &str = "metrics.jsonl";

/// Appends what a run reports to its metrics file.
#[derive(Debug)]
pub struct MetricsLog {
    path: PathBuf,
    file: File,
}

impl MetricsLog {
    /// Opens the file in `run` and drops what it has of steps after `step`: a run that was killed may have gone on after
    /// its last checkpoint, and will report those steps again.
    ///
    /// # Errors
    /// If the file cannot be read or written.
    pub fn open(run: &Path, step: usize) -> Result<Self> {
        let path = run.join(METRICS);
        if path.exists() {
            // The lines as they are, so that no number is written anew.
            let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
            let is_kept = |line: &&str| serde_json::from_str(line).is_ok_and(|line| step_of(&line) <= step);
            let kept: String = text.lines().filter(is_kept).flat_map(|line| [line, "\n"]).collect();
            // A disk that is full has no room for a copy.
            if kept != text {
                write_atomically(&path, kept.as_bytes())?;
            }
        }
        let file = OpenOptions::new().create(true).append(true).open(&path).map_err(Error::io(&path))?;
        Ok(Self { path, file })
    }
}

impl Observer for MetricsLog {
    fn observe(&mut self, event: &Event<'_>) -> Result<bool> {
        let line = match event {
            Event::Step(report) => serde_json::to_string(report),
            Event::Evaluation(evaluation) => serde_json::to_string(evaluation),
            Event::Evaluating(_) | Event::Saved(_) => return Ok(true),
        };
        let write = || writeln!(&self.file, "{}", line?);
        write().map_err(Error::io(&self.path))?;
        Ok(true)
    }
}

fn step_of(line: &Value) -> usize {
    line.get("step").and_then(Value::as_u64).unwrap_or(0) as usize
}

/// The lines of the metrics file in `run`; a last line that was cut off is left out.
///
/// # Errors
/// If the file cannot be read.
pub fn read(run: &Path) -> Result<Vec<Value>> {
    let path = run.join(METRICS);
    let file = File::open(&path).map_err(Error::io(&path))?;
    let lines = BufReader::new(file).lines().map_while(std::result::Result::ok);
    Ok(lines.filter_map(|line| serde_json::from_str(&line).ok()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trainer::StepReport;

    #[test]
    fn steps_after_the_checkpoint_are_dropped_and_reported_again() {
        let folder = tempfile::tempdir().unwrap();
        let report =
            |step| StepReport { step, loss: 1.5, accuracy: 0.0, grad_norm: 1.0, lr: 0.1, tokens_per_second: 9.0 };
        let mut log = MetricsLog::open(folder.path(), 0).unwrap();
        for step in 1..=5 {
            log.observe(&Event::Step(&report(step))).unwrap();
        }
        log.file.write_all(b"{\"step\":6,\"lo").unwrap();
        drop(log);
        let mut log = MetricsLog::open(folder.path(), 3).unwrap();
        log.observe(&Event::Step(&report(4))).unwrap();
        let steps: Vec<usize> = read(folder.path()).unwrap().iter().map(step_of).collect();
        assert_eq!(steps, [1, 2, 3, 4]);
    }
}
