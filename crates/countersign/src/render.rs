//! What a command prints: text for people, JSON for programs. Colours only on a terminal and never with `NO_COLOR`.

use std::io::{self, IsTerminal, Write};

use anstyle::{AnsiColor, Style};
use comfy_table::{Attribute, Cell, Color, ContentArrangement, Table, presets};
use serde::Serialize;
use time::{OffsetDateTime, format_description::well_known::Rfc3339, macros::format_description};

use crate::error::Done;

/// The form of a command's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Output {
    /// Text for people.
    #[default]
    Text,
    /// One JSON document; newline-delimited documents where the answer has no end.
    Json,
}

/// Paints words, or leaves them as they are.
#[derive(Debug, Clone, Copy)]
pub struct Paint {
    colours: bool,
}

impl Paint {
    /// For what goes to standard output.
    pub fn stdout() -> Self {
        Self::when(io::stdout().is_terminal())
    }

    /// For what goes to standard error.
    pub fn stderr() -> Self {
        Self::when(io::stderr().is_terminal())
    }

    /// Never paints.
    pub fn plain() -> Self {
        Self { colours: false }
    }

    fn when(terminal: bool) -> Self {
        let wanted = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let capable = std::env::var_os("TERM").is_none_or(|value| value != "dumb");
        Self { colours: terminal && wanted && capable }
    }

    /// Whether it paints.
    pub fn colours(self) -> bool {
        self.colours
    }

    fn paint(self, style: Style, text: &str) -> String {
        if self.colours { format!("{style}{text}{style:#}") } else { text.to_owned() }
    }

    /// Something permitted, added or ready.
    pub fn good(self, text: &str) -> String {
        self.paint(AnsiColor::Green.on_default(), text)
    }

    /// Something denied, removed or failed.
    pub fn bad(self, text: &str) -> String {
        self.paint(AnsiColor::Red.on_default().bold(), text)
    }

    /// Something to look at.
    pub fn warn(self, text: &str) -> String {
        self.paint(AnsiColor::Yellow.on_default(), text)
    }

    /// A label.
    pub fn note(self, text: &str) -> String {
        self.paint(AnsiColor::Cyan.on_default(), text)
    }

    /// Something in the background.
    pub fn dim(self, text: &str) -> String {
        self.paint(Style::new().dimmed(), text)
    }

    /// A heading.
    pub fn strong(self, text: &str) -> String {
        self.paint(Style::new().bold(), text)
    }
}

/// Prints to standard output. A reader that left (`| head`) ends the process quietly, as with every Unix command.
pub fn print(text: &str) {
    let mut out = io::stdout().lock();
    if out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_err() {
        std::process::exit(0);
    }
}

/// Prints to standard error; whoever closed it does not want to know.
pub fn print_error(text: &str) {
    let _ = io::stderr().lock().write_all(text.as_bytes());
}

/// Answers with `value`: as JSON, or as the text that `text` makes of it.
pub fn answer<T: Serialize>(output: Output, value: &T, text: impl FnOnce(&T, Paint) -> String) -> Done {
    match output {
        Output::Json => print(&json(value)),
        Output::Text => print(&text(value, Paint::stdout())),
    }
    Ok(())
}

/// One document on one line, or indented for a person at a terminal.
pub fn json<T: Serialize>(value: &T) -> String {
    let encode = if io::stdout().is_terminal() { serde_json::to_string_pretty } else { serde_json::to_string };
    encode(value).expect("every answer is JSON with string keys") + "\n"
}

/// One document on one line, for tails.
pub fn json_line<T: Serialize>(value: &T) -> String {
    serde_json::to_string(value).expect("every answer is JSON with string keys") + "\n"
}

/// A cell of a table.
pub fn cell(text: impl ToString) -> Cell {
    Cell::new(tame(&text.to_string()))
}

/// A cell that says that all is well, or that it is not.
pub fn verdict(text: impl ToString, good: bool) -> Cell {
    cell(text).fg(if good { Color::Green } else { Color::Red })
}

/// A table without lines, columns two spaces apart, as wide as it needs to be.
pub fn table(headings: &[&str], rows: impl IntoIterator<Item = Vec<Cell>>, paint: Paint) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(headings.iter().map(|heading| Cell::new(heading).add_attribute(Attribute::Dim)));
    if paint.colours {
        table.enforce_styling();
    } else {
        table.force_no_tty();
    }
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.trim_fmt() + "\n"
}

/// A moment, for people: the time of a day, with the date when it is not today.
pub fn moment(at_ms: u64) -> String {
    let Some(at) = instant(at_ms) else { return at_ms.to_string() };
    let today = OffsetDateTime::now_utc().date() == at.date();
    let form = if today {
        format_description!("[hour]:[minute]:[second]Z")
    } else {
        format_description!("[year]-[month]-[day] [hour]:[minute]:[second]Z")
    };
    at.format(form).unwrap_or_default()
}

/// A moment in full.
pub fn moment_full(at_ms: u64) -> String {
    instant(at_ms).and_then(|at| at.format(&Rfc3339).ok()).unwrap_or_else(|| at_ms.to_string())
}

/// How far away a moment is: `in 42m`, `3s ago`.
pub fn distance(at_ms: u64, now_ms: u64) -> String {
    let span = |ms: u64| match ms / 1000 {
        s @ 0..120 => format!("{s}s"),
        s @ 120..7200 => format!("{}m", s / 60),
        s @ 7200..172_800 => format!("{}h", s / 3600),
        s => format!("{}d", s / 86_400),
    };
    if at_ms > now_ms { format!("in {}", span(at_ms - now_ms)) } else { format!("{} ago", span(now_ms - at_ms)) }
}

/// The clock, in milliseconds since 1970.
pub fn now_ms() -> u64 {
    u64::try_from(OffsetDateTime::now_utc().unix_timestamp_nanos() / 1_000_000).unwrap_or(0)
}

fn instant(at_ms: u64) -> Option<OffsetDateTime> {
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(at_ms) * 1_000_000).ok()
}

/// Replaces what a terminal would obey: control characters in text that a stranger chose.
pub fn tame(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    #[test]
    fn a_table_has_one_line_for_each_row_and_no_trailing_space() {
        let rows = [vec![cell("web"), cell("active")], vec![cell("catalog"), cell("")]];
        expect![[r"
            NAME     STATE
            web      active
            catalog
        "]]
        .assert_eq(&table(&["NAME", "STATE"], rows, Paint::plain()));
    }

    #[test]
    fn a_distance_says_its_direction() {
        for (at, expected) in
            [(0, "100s ago"), (100_000, "0s ago"), (160_000, "in 60s"), (4_000_000, "in 65m"), (900_000_000, "in 10d")]
        {
            assert_eq!(distance(at, 100_000), expected);
        }
    }

    #[test]
    fn a_path_chosen_by_a_stranger_cannot_steer_the_terminal() {
        assert_eq!(tame("/a\x1b[2J\n"), "/a\u{fffd}[2J\u{fffd}");
    }
}
