//! The results as a picture: how much of plain TCP each subject reaches.

use std::fmt::Write as _;

use super::plan::{End, Load, Metric, Quantity, Route};
use super::results::Results;
use super::stats::Summary;
use super::subjects::plain;

const WIDTH: f64 = 920.0;
/// Where the bars begin, and where they reach what plain TCP does.
const LEFT: f64 = 240.0;
const FULL: f64 = 840.0;
const TOP: f64 = 92.0;
const BAR: f64 = 16.0;
const GAP: f64 = 14.0;
const COLOURS: [&str; 5] = ["#2e7d46", "#a9822a", "#5b6b7b", "#7a4fa3", "#2f6db0"];

/// Bars for each rate there is a ratio of.
pub(crate) fn render(results: &Results) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    write(&mut text, results).ok();
    text
}

fn write(text: &mut String, results: &Results) -> std::fmt::Result {
    let subjects: Vec<&String> =
        results.subjects.iter().filter(|subject| *subject != plain::NAME).collect();
    let metrics: Vec<Metric> = results
        .metrics()
        .into_iter()
        .filter(|metric| metric.quantity == Quantity::Rate && metric.load.is_relative())
        .collect();
    let bars = |metric: Metric| {
        let bars = subjects.iter().enumerate();
        bars.filter_map(move |(place, subject)| Some((place, results.ratio(subject, metric)?)))
    };
    let rows: usize = metrics.iter().map(|metric| bars(*metric).count()).sum();
    let height = TOP + rows as f64 * BAR + (metrics.len() + 1) as f64 * GAP + 40.0;
    writeln!(
        text,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"system-ui, sans-serif\" font-size=\"13\" fill=\"#1c2733\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#ffffff\"/>"
    )?;
    header(text, results, &subjects)?;
    let bottom = height - 40.0;
    for share in [0.0, 0.25, 0.5, 0.75, 1.0] {
        let x = position(share);
        writeln!(
            text,
            "<path d=\"M{x} {TOP}V{bottom}\" stroke=\"#c9d1d9\"/>\n\
             <text x=\"{x}\" y=\"{}\" text-anchor=\"middle\">{share}</text>",
            bottom + 18.0
        )?;
    }
    let mut y = TOP + GAP;
    for metric in metrics {
        let begin = y;
        for (place, ratio) in bars(metric) {
            bar(text, y, COLOURS[place % COLOURS.len()], &ratio)?;
            y += BAR;
        }
        let middle = f64::midpoint(begin, y) + 4.0;
        let x = LEFT - 10.0;
        let title = title(metric);
        writeln!(text, "<text x=\"{x}\" y=\"{middle}\" text-anchor=\"end\">{title}</text>")?;
        y += GAP;
    }
    writeln!(text, "</svg>")
}

fn header(text: &mut String, results: &Results, subjects: &[&String]) -> std::fmt::Result {
    let machine = &results.machine;
    writeln!(
        text,
        "<text x=\"20\" y=\"28\" font-size=\"16\" font-weight=\"600\">Share of plain TCP's rate, in the \
         same run; whiskers: lowest and highest round</text>\n\
         <text x=\"20\" y=\"50\" fill=\"#44505c\">{}: {}, {} CPUs, {}, commit {}, {} rounds</text>",
        escape(&machine.date),
        escape(&machine.processor),
        machine.cpus,
        escape(&machine.kernel),
        escape(&machine.commit),
        results.rounds
    )?;
    for (place, subject) in subjects.iter().enumerate() {
        let (x, colour) = (20.0 + 130.0 * place as f64, COLOURS[place % COLOURS.len()]);
        writeln!(
            text,
            "<rect x=\"{x}\" y=\"64\" width=\"12\" height=\"12\" fill=\"{colour}\"/>\n\
             <text x=\"{}\" y=\"75\">{}</text>",
            x + 18.0,
            escape(subject)
        )?;
    }
    Ok(())
}

fn bar(text: &mut String, y: f64, colour: &str, ratio: &Summary) -> std::fmt::Result {
    let width = position(ratio.median) - LEFT;
    let (low, high, middle) = (position(ratio.low), position(ratio.high), y + BAR / 2.0 - 1.0);
    writeln!(
        text,
        "<rect x=\"{LEFT}\" y=\"{y}\" width=\"{width:.1}\" height=\"{height}\" fill=\"{colour}\"/>\n\
         <path d=\"M{low:.1} {middle}H{high:.1}M{low:.1} {whisker}v6M{high:.1} {whisker}v6\" stroke=\"#1c2733\"/>\n\
         <text x=\"{label:.1}\" y=\"{base}\" font-size=\"11\">{median:.2}</text>",
        height = BAR - 2.0,
        whisker = middle - 3.0,
        label = high.max(LEFT + width) + 6.0,
        base = y + 11.0,
        median = ratio.median,
    )
}

/// Where a ratio is; what is far better than plain TCP is cut off.
fn position(ratio: f64) -> f64 {
    LEFT + ratio.clamp(0.0, 1.1) * (FULL - LEFT)
}

fn title(metric: Metric) -> String {
    let what = match metric.load {
        Load::Bulk { streams: 1 } => "1 bulk stream".into(),
        Load::Bulk { streams } => format!("{streams} bulk streams"),
        Load::KeepAlive { connections: 1 } => "requests, 1 connection".into(),
        Load::KeepAlive { connections } => format!("requests, {connections} connections"),
        Load::New { closes: End::Client } => "connections, client closes".into(),
        Load::New { closes: End::Server } => "connections, server closes".into(),
        Load::Sustained { closes: End::Client } => "for a minute, client closes".into(),
        Load::Sustained { closes: End::Server } => "for a minute, server closes".into(),
        Load::Beside | Load::Held | Load::Enrolment | Load::Crowd | Load::Remote => {
            metric.load.name()
        }
    };
    if metric.route == Route::Near { format!("{what}, one node") } else { what }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::results::{Machine, Sample};

    #[test]
    fn every_ratio_has_a_bar_and_a_whisker() {
        let metric = |quantity| Metric { route: Route::Far, load: Load::Beside, quantity };
        let rate = Metric { load: Load::Bulk { streams: 1 }, ..metric(Quantity::Rate) };
        let sample = |round, subject: &str, metric, value| Sample {
            round,
            subject: subject.into(),
            metric,
            value,
        };
        let results = Results {
            machine: Machine {
                date: "2026-01-01".into(),
                commit: "c0ffee".into(),
                processor: "A & B <3".into(),
                cpus: 2,
                kernel: "Linux".into(),
            },
            rounds: 2,
            seconds: 1,
            subjects: ["plain", "nodemesh"].map(String::from).into(),
            samples: vec![
                sample(0, "plain", rate, 20.0),
                sample(0, "nodemesh", rate, 10.0),
                sample(1, "plain", rate, 20.0),
                sample(1, "nodemesh", rate, 12.0),
                sample(0, "nodemesh", metric(Quantity::P99), 7.0),
            ],
            failures: Vec::new(),
            background: Vec::new(),
        };
        let svg = render(&results);
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
        assert!(svg.contains("A &amp; B &lt;3"), "text is escaped");
        // A ratio of 0.55: between 0.5 and 0.6.
        assert!(svg.contains("<rect x=\"240\" y=\"106\" width=\"330.0\""), "{svg}");
        assert!(svg.contains("M540.0 113H600.0"), "{svg}");
        assert_eq!(svg.matches("fill=\"#2e7d46\"").count(), 2, "the bar, and its legend");
    }
}
