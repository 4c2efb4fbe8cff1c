//! Mistakes in files of the mesh directory as a terminal or a program reads them: with the line and a caret, or with the
//! numbers of both.

use countersign_core::directory::Mistake;
use miette::{GraphicalReportHandler, GraphicalTheme};
use serde_json::{Value, json};

use crate::render::Paint;

/// The mistake with its line and a caret.
pub fn text(mistake: &Mistake, paint: Paint) -> String {
    let theme = if paint.colours() { GraphicalTheme::unicode() } else { GraphicalTheme::unicode_nocolor() };
    let handler = GraphicalReportHandler::new_themed(theme).with_links(false).with_width(100);
    let mut text = String::new();
    match handler.render_report(&mut text, mistake) {
        Ok(()) => text.lines().map(|line| line.trim_end().to_owned() + "\n").collect(),
        Err(_) => format!("{}: {}\n", mistake.file, mistake.what),
    }
}

/// The mistake with the numbers of its line and column, both from 1.
pub fn json(mistake: &Mistake) -> Value {
    let (line, column) = mistake.position();
    json!({ "file": &*mistake.file, "line": line, "column": column, "what": mistake.what, "help": mistake.help })
}

/// `1 mistake`, `3 mistakes`.
pub fn count(mistakes: &[Mistake]) -> String {
    match mistakes.len() {
        1 => "1 mistake".to_owned(),
        count => format!("{count} mistakes"),
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    #[test]
    fn a_mistake_shows_its_line_and_a_caret() {
        let file = "trust_domain = \"shop.example\"\n[services.wéb]\nrunn = [\"x\"]\n";
        let at = file.find("runn").unwrap();
        let mistake = Mistake {
            file: "mesh.toml".into(),
            text: file.into(),
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
        .assert_eq(&format!("error: shown below\n{}", text(&mistake, Paint::plain())));
        assert_eq!(json(&mistake)["line"], 3);
    }

    #[test]
    fn a_span_beyond_the_text_does_not_break_the_telling() {
        for (file, span) in [("", 0..0), ("ab", 5..9), ("a\nb\nc", 0..5)] {
            let mistake = Mistake { file: "f".into(), text: file.into(), span, what: "w".into(), help: None };
            assert!(text(&mistake, Paint::plain()).contains('w'));
            json(&mistake);
        }
    }
}
