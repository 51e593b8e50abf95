//! The picture of a run: loss of training and of the held-out part over the steps.

use std::error::Error;
use std::path::{Path, PathBuf};

use plotters::prelude::*;
use serde_json::Value;

/// The picture's name in a run's folder.
const PICTURE: &str = "loss.svg";

/// Points of a line; more cannot be told apart.
const POINTS: usize = 800;

type Point = (f64, f64);

/// Draws `loss.svg` from the run's metrics. Without fonts of the system, the picture has no text but keeps its lines.
pub fn loss_curve(run: &Path) -> Result<PathBuf, Box<dyn Error>> {
    let lines = thalweg_models::metrics::read(run)?;
    let (train, held_out) = (points(&lines, "loss"), points(&lines, "held_out_loss"));
    if train.is_empty() {
        return Err("the run has no steps".into());
    }
    let path = run.join(PICTURE);
    draw(&path, &smooth(&train), &held_out)?;
    Ok(path)
}

fn points(lines: &[Value], key: &str) -> Vec<Point> {
    let point = |line: &Value| Some((line.get("step")?.as_f64()?, line.get(key)?.as_f64()?));
    lines.iter().filter_map(point).collect()
}

/// Means over stretches of the run.
fn smooth(points: &[Point]) -> Vec<Point> {
    let size = points.len().div_ceil(POINTS).max(1);
    let mean = |stretch: &[Point]| {
        let count = stretch.len() as f64;
        let sum = stretch.iter().fold((0.0, 0.0), |sum, point| (sum.0 + point.0, sum.1 + point.1));
        (sum.0 / count, sum.1 / count)
    };
    points.chunks(size).map(mean).collect()
}

fn draw(path: &Path, train: &[Point], held_out: &[Point]) -> Result<(), Box<dyn Error>> {
    let root = SVGBackend::new(path, (900, 520)).into_drawing_area();
    root.fill(&WHITE)?;
    let all = || train.iter().chain(held_out);
    let last = all().map(|point| point.0).fold(1.0, f64::max);
    let top = all().map(|point| point.1).fold(0.0, f64::max) * 1.05;
    let bottom = all().map(|point| point.1).fold(f64::INFINITY, f64::min) * 0.95;
    let mut chart = ChartBuilder::on(&root)
        .margin(16)
        .x_label_area_size(40)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..last, bottom..top.max(bottom + 1e-9))?;
    chart.configure_mesh().light_line_style(WHITE).x_desc("step").y_desc("loss, nats per token").draw()?;
    let (blue, orange) = (RGBColor(31, 119, 180), RGBColor(214, 93, 14));
    chart
        .draw_series(LineSeries::new(train.iter().copied(), blue.stroke_width(2)))?
        .label("training")
        .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], blue.stroke_width(2)));
    chart
        .draw_series(LineSeries::new(held_out.iter().copied(), orange.stroke_width(2)).point_size(3))?
        .label("held out")
        .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], orange.stroke_width(2)));
    chart.configure_series_labels().background_style(WHITE).border_style(BLACK).draw()?;
    root.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_run_becomes_a_picture_with_both_lines() {
        let folder = tempfile::tempdir().unwrap();
        assert!(super::loss_curve(folder.path()).is_err());
        let lines: String =
            (1..=2000).map(|step| format!("{{\"step\":{step},\"loss\":{}}}\n", 3.0 / step as f64)).collect();
        let lines = lines + "{\"step\":2000,\"held_out_loss\":0.5}\n";
        std::fs::write(folder.path().join(thalweg_models::metrics::METRICS), lines).unwrap();
        let picture = std::fs::read_to_string(super::loss_curve(folder.path()).unwrap()).unwrap();
        assert!(picture.contains("nats per token") && picture.contains("held out"));
    }
}
