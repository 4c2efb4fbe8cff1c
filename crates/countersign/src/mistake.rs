//! A mistake in a file of the mesh directory, with its line and a caret.

use std::{ops::Range, sync::Arc};

use miette::{GraphicalReportHandler, GraphicalTheme, LabeledSpan, MietteDiagnostic, NamedSource};
use serde::{Serialize, Serializer, ser::SerializeStruct};

use crate::render::{Paint, tame};

/// Where it stands, what it is, how to mend it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// The file, below the mesh directory.
    pub file: Arc<str>,
    /// All of its text; empty when it could not be read.
    pub text: Arc<str>,
    /// The bytes of `text` that it is about.
    pub span: Range<usize>,
    /// What is wrong, lower case, no full stop.
    pub what: String,
    /// How to mend it.
    pub help: Option<String>,
}

impl Mistake {
    /// The line and the column of its first byte, both from 1.
    pub fn position(&self) -> (usize, usize) {
        let before = self.text.get(..self.span.start).unwrap_or(&self.text);
        let line_at = before.rfind('\n').map_or(0, |at| at + 1);
        (before.matches('\n').count() + 1, before[line_at..].chars().count() + 1)
    }

    /// The text with the line and the caret.
    pub fn render(&self, paint: Paint) -> String {
        let theme = if paint.colours() { GraphicalTheme::unicode() } else { GraphicalTheme::unicode_nocolor() };
        let handler = GraphicalReportHandler::new_themed(theme).with_links(false).with_width(100);
        let mut diagnostic = MietteDiagnostic::new(tame(&self.what));
        diagnostic.help = self.help.clone();
        let end = self.span.end.min(self.text.len());
        let start = self.span.start.min(end);
        // A span of many lines would hide where it begins.
        let end = self.text.get(start..end).and_then(|text| text.find('\n')).map_or(end, |at| start + at);
        if !self.text.is_empty() {
            diagnostic = diagnostic.with_label(LabeledSpan::underline(start..end));
        } else {
            diagnostic.message = format!("{}: {}", self.file, diagnostic.message);
        }
        let report =
            miette::Report::new(diagnostic).with_source_code(NamedSource::new(&*self.file, self.text.to_string()));
        let mut text = String::new();
        match handler.render_report(&mut text, report.as_ref()) {
            Ok(()) => text.lines().map(|line| line.trim_end().to_owned() + "\n").collect(),
            Err(_) => format!("{}: {}\n", self.file, self.what),
        }
    }
}

impl Serialize for Mistake {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let (line, column) = self.position();
        let mut to = to.serialize_struct("Mistake", 5)?;
        to.serialize_field("file", &*self.file)?;
        to.serialize_field("line", &line)?;
        to.serialize_field("column", &column)?;
        to.serialize_field("what", &self.what)?;
        to.serialize_field("help", &self.help)?;
        to.end()
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    #[test]
    fn a_mistake_shows_its_line_and_a_caret() {
        let text = "trust_domain = \"shop.example\"\n[services.wéb]\nrunn = [\"x\"]\n";
        let at = text.find("runn").unwrap();
        let mistake = Mistake {
            file: "mesh.toml".into(),
            text: text.into(),
            span: at..at + 4,
            what: "unknown key `runn`".into(),
            help: Some("did you mean `run`?".into()),
        };
        expect![[r#"
            error: shown below
              × unknown key `runn`
               ╭─[mesh.toml:3:1]
             2 │ [services.wéb]
             3 │ runn = ["x"]
               · ────
               ╰────
              help: did you mean `run`?
        "#]]
        .assert_eq(&format!("error: shown below\n{}", mistake.render(Paint::plain())));
        assert_eq!(mistake.position(), (3, 1));
        assert_eq!(serde_json::to_value(&mistake).unwrap()["line"], 3);
    }

    #[test]
    fn a_span_beyond_the_text_does_not_break_the_telling() {
        for (text, span) in [("", 0..0), ("ab", 5..9), ("é", 1..2), ("a\nb\nc", 0..5)] {
            let mistake = Mistake { file: "f".into(), text: text.into(), span, what: "w".into(), help: None };
            assert!(mistake.render(Paint::plain()).contains('w'));
            mistake.position();
        }
    }
}
