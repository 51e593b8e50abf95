//! Answers requests for single measurements, so that another program can alternate ours with its own.
//!
//! A request is a line of JSON: a [`Case`] with `seconds` and `samples`. The answer is a line of JSON: the [`Row`] with the
//! samples in `wall_ms`, or `{"error": ...}`. The last benchmarks stay in memory, so that asking again costs the runs only.

use crate::runner::Prepared;
use crate::{Case, Effort, Error, Row, Runner};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, Write};

#[derive(Deserialize)]
struct Request {
    #[serde(flatten)]
    case: Case,
    seconds: f64,
    samples: usize,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Answer {
    Measured {
        #[serde(flatten)]
        row: Box<Row>,
        wall_ms: Vec<f64>,
    },
    Failed {
        error: String,
    },
}

/// Benchmarks that stay ready.
const READY: usize = 3;

/// Reads requests until the end of `input`.
///
/// # Errors
/// If `input` or `output` breaks; bad requests are answered.
pub fn serve(runner: &Runner, input: impl BufRead, mut output: impl Write) -> Result<(), Error> {
    let mut ready: Vec<(Case, Prepared)> = Vec::new();
    for line in input.lines() {
        let line = line?;
        if line.trim().is_empty() {
            continue;
        }
        let answer = answer(runner, &mut ready, &line).unwrap_or_else(|error| Answer::Failed { error });
        let text = serde_json::to_string(&answer).map_err(std::io::Error::from)?;
        writeln!(output, "{text}")?;
        output.flush()?;
    }
    Ok(())
}

fn answer(runner: &Runner, ready: &mut Vec<(Case, Prepared)>, line: &str) -> Result<Answer, String> {
    let Request { case, seconds, samples } = serde_json::from_str(line).map_err(|error| error.to_string())?;
    let at = match ready.iter().position(|(ready, _)| *ready == case) {
        Some(at) => at,
        None => {
            if ready.len() == READY {
                ready.remove(0);
            }
            ready.push((case.clone(), runner.prepare(&case).map_err(|error| error.to_string())?));
            ready.len() - 1
        }
    };
    let effort = Effort { seconds, samples };
    let (row, samples) = runner.time(&mut ready[at].1, effort).map_err(|error| error.to_string())?;
    let wall_ms = samples.wall.iter().map(|seconds| seconds * 1e3).collect();
    Ok(Answer::Measured { row: Box::new(row), wall_ms })
}
