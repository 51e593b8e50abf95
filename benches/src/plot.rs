//! Pictures of a report: time and memory against sequence length, and the roofline.

use crate::{Error, Part, Pass, Report, Row};
use plotters::prelude::*;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const SIZE: (u32, u32) = (960, 600);

/// Labels of the axes and of lines and points.
const LABEL: (&str, u32) = ("sans-serif", 15);

/// Okabe and Ito's colours, told apart by every eye.
const COLORS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(90, 90, 90),
    RGBColor(240, 228, 66),
];

/// Draws what the report has data for into `folder`, which is made if need be. Returns the files: for each pass
/// `time-PASS.svg`, `token-PASS.svg` (time per token) and `memory-PASS.svg` where a benchmark was run at several lengths, and `roofline.svg`.
///
/// # Errors
/// If a file cannot be written.
pub fn draw(report: &Report, folder: &Path) -> Result<Vec<PathBuf>, Error> {
    std::fs::create_dir_all(folder).map_err(|source| Error::File { path: folder.into(), source })?;
    let mut files = Vec::new();
    for &pass in Pass::ALL {
        let name = pass.name().replace('+', "-");
        let pictures: [(&str, &str, Value); 3] = [
            ("time", "milliseconds", |row| row.median_ms),
            ("token", "microseconds per token", |row| 1e6 / row.tokens_per_s),
            ("memory", "MB above the start", |row| row.peak_bytes as f64 / 1e6),
        ];
        for (kind, unit, value) in pictures {
            let series = by_length(report, pass, value);
            if !series.is_empty() {
                let file = folder.join(format!("{kind}-{name}.svg"));
                lengths(&file, &format!("{pass}: {unit} by sequence length"), unit, &series)
                    .map_err(|error| Error::Plot(error.to_string()))?;
                files.push(file);
            }
        }
    }
    let points: Vec<&Row> = report.rows.iter().filter(|row| row.case.part == Part::Ops && row.flops > 0).collect();
    if !points.is_empty() && !report.ceilings.is_empty() {
        let file = folder.join("roofline.svg");
        roofline(&file, report, &points).map_err(|error| Error::Plot(error.to_string()))?;
        files.push(file);
    }
    Ok(files)
}

/// What is drawn of a row.
type Value = fn(&Row) -> f64;

/// A line: its name and its points.
type Series = BTreeMap<String, Vec<(f64, f64)>>;

/// Values by sequence length, for each benchmark that was run at several; the rest of its description is its name.
fn by_length(report: &Report, pass: Pass, value: Value) -> Series {
    let mut series = Series::new();
    for row in report.rows.iter().filter(|row| row.case.pass == pass && value(row) > 0.0) {
        let case = &row.case;
        let name = format!("{} {} {}, {} threads", case.name, case.dtype, case.path, row.threads);
        series.entry(name).or_default().push((case.shape[1] as f64, value(row)));
    }
    series.retain(|_, points| {
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        points.dedup_by(|a, b| a.0 == b.0);
        points.len() > 1
    });
    series
}

/// The range of values, widened by a factor on each side.
fn range(values: impl Iterator<Item = f64>, low: f64, high: f64) -> std::ops::Range<f64> {
    let (least, most) = values.fold((f64::INFINITY, 0.0f64), |(a, b), x| (a.min(x), b.max(x)));
    least / low..most * high
}

type Drawn = Result<(), Box<dyn std::error::Error>>;

fn lengths(file: &Path, title: &str, unit: &str, series: &Series) -> Drawn {
    let points = || series.values().flatten();
    let root = SVGBackend::new(file, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 22))
        .margin(14)
        .x_label_area_size(46)
        .y_label_area_size(70)
        .build_cartesian_2d(
            range(points().map(|p| p.0), 1.1, 1.1).log_scale(),
            range(points().map(|p| p.1), 1.5, 1.5).log_scale(),
        )?;
    chart
        .configure_mesh()
        .x_desc("tokens")
        .y_desc(unit)
        .x_label_formatter(&|x| number(*x))
        .y_label_formatter(&|y| number(*y))
        .label_style(LABEL)
        .axis_desc_style(LABEL)
        .light_line_style(RGBColor(240, 240, 240))
        .bold_line_style(RGBColor(215, 215, 215))
        .draw()?;
    for (i, (name, points)) in series.iter().enumerate() {
        let color = COLORS[i % COLORS.len()];
        chart
            .draw_series(LineSeries::new(points.iter().copied(), color.stroke_width(2)).point_size(3))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(3)));
    }
    chart
        .configure_series_labels()
        .label_font(LABEL)
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(RGBColor(200, 200, 200))
        .draw()?;
    root.present()?;
    Ok(())
}

/// `1500` or `0.25`.
fn number(x: f64) -> String {
    if x >= 10.0 { format!("{x:.0}") } else { format!("{x:.3}").trim_end_matches('0').trim_end_matches('.').into() }
}

fn roofline(file: &Path, report: &Report, rows: &[&Row]) -> Drawn {
    let ceilings = report.ceilings.iter().max_by_key(|ceilings| ceilings.threads).ok_or("no ceilings")?;
    let rows: Vec<&&Row> = rows.iter().filter(|row| row.threads == ceilings.threads).collect();
    let intensity = |row: &Row| row.flops as f64 / row.bytes.max(1) as f64;
    let xs = range(rows.iter().map(|row| intensity(row)), 3.0, 4.0);
    let least = rows.iter().map(|row| row.gflops).fold(ceilings.product, f64::min);
    let root = SVGBackend::new(file, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let title = format!("roofline, {} threads, {}", ceilings.threads, report.machine.cpu);
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 22))
        .margin(14)
        .x_label_area_size(46)
        .y_label_area_size(70)
        .build_cartesian_2d(xs.clone().log_scale(), (least / 2.0..ceilings.product * 2.0).log_scale())?;
    chart
        .configure_mesh()
        .x_desc("FLOP per byte")
        .y_desc("GFLOP/s")
        .x_label_formatter(&|x| number(*x))
        .y_label_formatter(&|y| number(*y))
        .label_style(LABEL)
        .axis_desc_style(LABEL)
        .light_line_style(RGBColor(240, 240, 240))
        .bold_line_style(RGBColor(215, 215, 215))
        .draw()?;
    for (i, &(bytes, copy)) in ceilings.copies.iter().enumerate() {
        let color = RGBColor(120, 120, 120).mix(1.0 - 0.3 * i as f64);
        let knee = (ceilings.product / copy).clamp(xs.start, xs.end);
        let roof = [xs.start, knee, xs.end].map(|x| (x, (x * copy).min(ceilings.product)));
        let name = format!("copy of {} KiB, {copy:.0} GB/s", bytes >> 10);
        chart
            .draw_series(LineSeries::new(roof, color.stroke_width(2)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
    }
    for (i, pass) in Pass::ALL.iter().enumerate() {
        let color = COLORS[i];
        let of_pass: Vec<_> = rows.iter().filter(|row| row.case.pass == *pass).collect();
        if of_pass.is_empty() {
            continue;
        }
        chart
            .draw_series(of_pass.iter().map(|row| Circle::new((intensity(row), row.gflops), 4, color.filled())))?
            .label(pass.name())
            .legend(move |(x, y)| Circle::new((x + 9, y), 4, color.filled()));
        let style = ("sans-serif", 12).into_font().color(&color);
        chart.draw_series(of_pass.iter().map(|row| {
            let name = if row.case.dtype == crate::Dtype::F32 {
                row.case.name.clone()
            } else {
                format!("{} {}", row.case.name, row.case.dtype)
            };
            EmptyElement::at((intensity(row), row.gflops)) + Text::new(name, (7, -5), style.clone())
        }))?;
    }
    chart
        .configure_series_labels()
        .label_font(LABEL)
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE.mix(0.8))
        .border_style(RGBColor(200, 200, 200))
        .draw()?;
    root.present()?;
    Ok(())
}
