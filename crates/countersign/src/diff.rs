//! The difference between two texts, as unified hunks.

use crate::render::Paint;

/// Unchanged lines around each change.
const CONTEXT_LINES: usize = 3;

/// The unified difference of two texts, without file names; empty when they are equal.
pub fn unified(old: &str, new: &str, paint: Paint) -> String {
    let mut text = String::new();
    let difference = similar::TextDiff::from_lines(old, new);
    for hunk in difference.unified_diff().context_radius(CONTEXT_LINES).iter_hunks() {
        text.push_str(&format!("{}\n", paint.note(&hunk.header().to_string())));
        for change in hunk.iter_changes() {
            let line = change.value().trim_end_matches('\n');
            text.push_str(&match change.tag() {
                similar::ChangeTag::Equal => format!(" {line}\n"),
                similar::ChangeTag::Delete => format!("{}\n", paint.bad(&format!("-{line}"))),
                similar::ChangeTag::Insert => format!("{}\n", paint.good(&format!("+{line}"))),
            });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    #[test]
    fn a_difference_shows_what_went_and_what_came() {
        expect![[r"
            @@ -1,2 +1,3 @@
             a
            -b
            +c
            +d
        "]]
        .assert_eq(&unified("a\nb\n", "a\nc\nd\n", Paint::plain()));
        assert_eq!(unified("a\n", "a\n", Paint::plain()), "");
    }
}
