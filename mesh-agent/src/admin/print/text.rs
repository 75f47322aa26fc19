//! Words, numbers and columns.

use time::OffsetDateTime;

/// Whether colours may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// For a terminal.
    Colour,
    /// For everything else.
    Plain,
}

impl Style {
    pub(super) fn good(self, text: &str) -> String {
        self.paint("32", text)
    }

    pub(super) fn bad(self, text: &str) -> String {
        self.paint("31", text)
    }

    pub(super) fn strong(self, text: &str) -> String {
        self.paint("1", text)
    }

    fn paint(self, code: &str, text: &str) -> String {
        match self {
            Self::Colour => format!("\u{1b}[{code}m{text}\u{1b}[0m"),
            Self::Plain => text.to_owned(),
        }
    }
}

/// Takes away what a terminal would obey, also line breaks.
pub(super) fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Takes away what a terminal would obey, but for line breaks: for messages.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { ' ' } else { c }).collect()
}

/// The time between, in its two largest units.
pub(super) fn until(from: OffsetDateTime, to: OffsetDateTime) -> String {
    let seconds = (to - from).whole_seconds();
    if seconds < 0 {
        return format!("-{}", until(to, from));
    }
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m {}s", seconds % 60),
        (0, _, _) => format!("{hours}h {minutes}m"),
        (_, _, _) => format!("{days}d {hours}h"),
    }
}

pub(super) fn ago(time: OffsetDateTime, now: OffsetDateTime) -> String {
    format!("{} ago", until(time, now))
}

/// A number of bytes with a binary unit.
pub(super) fn bytes(n: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if n < 1024 {
        return format!("{n} B");
    }
    let exponent = (n.ilog2() / 10) as usize;
    let value = n as f64 / 1024_f64.powi(exponent as i32);
    format!("{value:.1} {}", UNITS[exponent - 1])
}

/// Columns as wide as their widest cell.
pub(super) struct Table {
    header: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// With these headings, or none.
    pub(super) fn new(header: &[&str]) -> Self {
        Self { header: header.iter().map(|&cell| cell.to_owned()).collect(), rows: Vec::new() }
    }

    pub(super) fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.into());
    }

    pub(super) fn render(&self, style: Style) -> String {
        let headed = (!self.header.is_empty()).then_some(&self.header);
        let columns = headed.into_iter().chain(&self.rows).map(Vec::len).max().unwrap_or_default();
        let widths: Vec<usize> = (0..columns)
            .map(|column| {
                let cells = headed.into_iter().chain(&self.rows).filter_map(|row| row.get(column));
                cells.map(|cell| width(cell)).max().unwrap_or_default()
            })
            .collect();
        let render = |row: &Vec<String>| {
            let cells = row.iter().zip(&widths);
            let padded = cells
                .map(|(cell, width_of)| format!("{cell}{}", " ".repeat(width_of - width(cell))));
            padded.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
        };
        let header = headed.map(|row| style.strong(render(row).trim_end()) + "\n");
        header.into_iter().chain(self.rows.iter().map(render)).collect()
    }
}

/// How many columns a cell takes, without the escape sequences of its colours.
fn width(cell: &str) -> usize {
    let mut escaped = false;
    cell.chars()
        .filter(|&c| {
            let visible = !escaped && c != '\u{1b}';
            escaped = c == '\u{1b}' || (escaped && c != 'm');
            visible
        })
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_two_units() {
        for (seconds, text) in [
            (0, "0s"),
            (59, "59s"),
            (60, "1m 0s"),
            (3_599, "59m 59s"),
            (3_600, "1h 0m"),
            (86_399, "23h 59m"),
            (90_000, "1d 1h"),
            (-5, "-5s"),
        ] {
            let start = OffsetDateTime::UNIX_EPOCH;
            assert_eq!(until(start, start + time::Duration::seconds(seconds)), text);
        }
    }

    #[test]
    fn bytes_have_one_digit_after_the_point() {
        for (n, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (1 << 30, "1.0 GiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(bytes(n), text);
        }
    }

    #[test]
    fn columns_are_aligned_with_and_without_colours() {
        for style in [Style::Plain, Style::Colour] {
            let mut table = Table::new(&["A", "B"]);
            table.row([style.bad("long cell"), "x".to_owned()]);
            table.row(["s".to_owned(), "y".to_owned()]);
            let plain: Vec<_> = table
                .render(style)
                .replace("\u{1b}[31m", "")
                .replace("\u{1b}[1m", "")
                .replace("\u{1b}[0m", "")
                .lines()
                .map(str::to_owned)
                .collect();
            assert_eq!(plain, ["A          B", "long cell  x", "s          y"]);
        }
    }
}
